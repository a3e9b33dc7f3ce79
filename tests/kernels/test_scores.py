"""Logits of groups and the heaviest tiles: as written out, and Triton as torch."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinora.kernels import scores
from kinora.kernels.scores import (
    group_logits,
    heaviest_tiles,
    join_rows,
    mean_attention,
    tile_scores,
)

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton"),
)
BACKENDS = ["torch", TRITON]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Reduce = Literal["largest", "log-sum-exp"]


def _case(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["largest", "log-sum-exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "group", "dim"), [
    (70, 96, 8, 20), (1, 4, 4, 64), (130, 256, 128, 16), (33, 300, 1, 80), (5, 160, 32, 8),
    (20, 77, 16, 8), (3, 5, 8, 4),
])  # fmt: skip
def test_it_is_what_is_written_out(
    backend: Any, reduce: Reduce, dtype: torch.dtype, rows: int, columns: int, group: int, dim: int
):
    a, b = _case(2, 3, rows, dim, dtype=dtype), _case(2, 3, columns, dim, seed=1, dtype=dtype)
    added = _case(columns, seed=2)
    added[columns // 2] = -torch.inf
    for more in (None, added):
        found = group_logits(a, b, group, reduce, 0.3, more, backend=backend)
        logits = 0.3 * a.double() @ b.double().mT + (0 if more is None else more.double())
        missing = -columns % group
        parts = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        parts = parts.unflatten(-1, (-1, group))
        expected = parts.amax(-1) if reduce == "largest" else parts.logsumexp(-1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["largest", "log-sum-exp"])
def test_what_is_no_number_makes_its_group_none(backend: Any, reduce: Reduce):
    a, b = _case(1, 1, 9, 16), _case(1, 1, 64, 16, seed=1)
    b[0, 0, 21, 3] = torch.nan
    found = group_logits(a, b, 16, reduce, 1.0, backend=backend)
    assert bool(found[..., 1].isnan().all()) and not bool(found[..., (0, 2, 3)].isnan().any())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["largest", "log-sum-exp"])
def test_infinite_logits_are_alike_in_both(backend: Any, reduce: Reduce):
    """Those of products that overflow: their group is infinite, what is less the row's is none."""
    a, b = torch.ones(1, 1, 3, 16, device=DEVICE), _case(1, 1, 64, 16, seed=1)
    a[0, 0, 1] = 1e25
    b[0, 0, 20] = 1e25
    found = group_logits(a, b, 16, reduce, 1.0, backend=backend)
    expected = group_logits(a.cpu(), b.cpu(), 16, reduce, 1.0, backend="torch")
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert found[0, 0, 1, 1] == torch.inf
    joined = join_rows(found, 2, reduce, backend=backend)
    expected = join_rows(found.cpu(), 2, reduce, backend="torch")
    torch.testing.assert_close(joined.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["largest", "log-sum-exp"])
def test_a_group_of_nothing_is_minus_infinity(backend: Any, reduce: Reduce):
    a, b, added = _case(1, 1, 9, 16), _case(1, 1, 64, 16, seed=1), torch.zeros(64, device=DEVICE)
    added[48:] = -torch.inf
    found = group_logits(a, b, 16, reduce, 1.0, added, backend=backend)
    assert bool((found[..., 3] == -torch.inf).all()) and bool(found[..., :3].isfinite().all())


@pytest.mark.parametrize("limit", [1, 3000, 2**20])
def test_chunks_are_the_whole(limit: int, monkeypatch: pytest.MonkeyPatch):
    a, b = _case(2, 3, 70, 20), _case(2, 3, 96, 20, seed=1)
    expected = group_logits(a, b, 8, "largest", 1.0, backend="torch")
    monkeypatch.setattr(scores, "LOGITS_BYTES", limit)
    torch.testing.assert_close(group_logits(a, b, 8, "largest", 1.0, backend="torch"), expected)


def test_double_stays_double():
    a, b = _case(1, 1, 7, 20, dtype=torch.float64), _case(1, 1, 8, 20, dtype=torch.float64)
    assert group_logits(a, b, 4, "log-sum-exp", 1.0).dtype == torch.float64


def test_groups_that_do_not_fit_are_refused():
    a, b = _case(1, 1, 7, 20), _case(1, 1, 12, 20)
    with pytest.raises(ValueError, match="groups of 0 columns; at least 1 is needed"):
        group_logits(a, b, 0, "largest", 1.0)
    with pytest.raises(ValueError, match="groups of 0 rows; at least 1 is needed"):
        join_rows(a, 0, "largest")
    with pytest.raises(ValueError, match="a power of two up to 128, not 6"):
        group_logits(a, b, 6, "largest", 1.0, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["largest", "log-sum-exp"])
@pytest.mark.parametrize(("rows", "columns", "high"), [(32, 40, 16), (35, 700, 16), (7, 3, 5)])
def test_rows_are_joined_as_written_out(
    backend: Any, reduce: Reduce, rows: int, columns: int, high: int
):
    logits, added = 5 * _case(2, 3, rows, columns), _case(rows, seed=1)
    logits[0, 0, 1, 0] = -torch.inf
    for more in (None, added):
        found = join_rows(logits, high, reduce, more, backend=backend)
        x = logits.double()
        whole = x.amax(-1) if reduce == "largest" else x.logsumexp(-1)
        x = x - whole[..., None] + (0 if more is None else more[:, None])
        parts = [it.amax(2) if reduce == "largest" else it.logsumexp(2) for it in x.split(high, 2)]
        torch.testing.assert_close(found.double(), torch.stack(parts, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["largest", "log-sum-exp"])
def test_what_is_no_number_makes_its_rows_none(backend: Any, reduce: Reduce):
    logits = _case(1, 1, 35, 700)
    logits[0, 0, 18, 650] = torch.nan
    found = join_rows(logits, 16, reduce, backend=backend)
    assert bool(found[0, 0, 1].isnan().all()) and bool(found[0, 0, (0, 2)].isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_attention(backend: Any, monkeypatch: pytest.MonkeyPatch):
    """With groups of tokens and log-sum-exp it is the attention between them, in chunks too."""
    q, k = _case(2, 3, 50, 16), _case(2, 3, 70, 16, seed=1)
    attention = (q @ k.mT * 0.25).softmax(-1)
    rows = torch.stack([it.sum(2) for it in attention.split(16, 2)], 2)
    expected = torch.stack([it.sum(3) for it in rows.split(8, 3)], 3)
    # One head at a time, two and one, all.
    for limit in (1, 2 * 4 * 2 * 50 * 9, 2**29):
        monkeypatch.setattr(scores, "JOINED_BYTES", limit)
        found = tile_scores(q, k, (16, 8), "log-sum-exp", 0.25, backend=backend)
        torch.testing.assert_close(found.exp(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(4, 300, 16), (130, 70, 20), (1, 5, 8)])
def test_the_mean_attention_to_each_key(
    backend: Any, dtype: torch.dtype, queries: int, keys: int, dim: int
):
    q = _case(2, 3, queries, dim, dtype=dtype)
    # As models have them in memory.
    k = _case(2, keys, 3, dim, seed=1, dtype=dtype).transpose(1, 2)
    found = mean_attention(q, k, 0.7, backend=backend)
    expected = (q.double() @ k.double().mT * 0.7).softmax(-1).mean(2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, device=DEVICE))


def test_the_mean_attention_in_chunks_is_the_whole(monkeypatch: pytest.MonkeyPatch):
    q, k = _case(2, 3, 4, 8), _case(2, 3, 30, 8, seed=1)
    whole = mean_attention(q, k, 0.3, backend="torch")
    monkeypatch.setattr(scores, "LOGITS_BYTES", 1)
    torch.testing.assert_close(mean_attention(q, k, 0.3, backend="torch"), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter, which computes it so
def test_the_mean_attention_of_what_is_no_number_is_none(backend: Any, wrong: float):
    q, k = _case(1, 2, 3, 8).abs(), _case(1, 2, 200, 8, seed=1).abs()
    k[0, 1, 150] = wrong
    found = mean_attention(q, k, 0.3, backend=backend)
    assert bool(found[0, 1].isnan().all()) and bool(found[0, 0].isfinite().all())


def _expected(row: list[float], mass: float, forced: list[bool], least: int, most: int) -> set[int]:
    """Written out: one tile after the other."""
    best = sorted(range(len(row)), key=lambda j: (not forced[j], -row[j]))
    kept = {j for j in best if forced[j]}
    held = 0.0
    for count, j in enumerate(best):
        if count >= most or (count >= least and held >= mass * sum(row) and mass < 1):
            break
        kept.add(j)
        held += row[j]
    return kept


@pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=[*TRITON.marks, pytest.mark.long])]
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_fewest_that_hold_the_mass(backend: Any, data: st.DataObject):
    columns = data.draw(st.integers(1, 40))
    least = data.draw(st.integers(0, columns))
    most = data.draw(st.integers(max(1, least), columns))
    mass = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    # Powers of two, all different: their sums are exact.
    powers = torch.rand(2, 2, 3, columns, generator=generator).argsort(-1) / 2
    forced = torch.rand(3, columns, generator=generator) < data.draw(st.sampled_from([0, 0.2]))
    weights = (powers * 0.6931471805599453).to(DEVICE)
    indices, counts = heaviest_tiles(
        weights, mass, forced.to(DEVICE), least=least, most=most, width=columns, backend=backend
    )
    for (b, h, i), count in zip(
        [(b, h, i) for b in range(2) for h in range(2) for i in range(3)],
        counts.flatten().tolist(),
        strict=True,
    ):
        found = indices[b, h, i, :count].tolist()
        assert found == sorted(set(found))
        row = (2 ** powers[b, h, i].double()).tolist()
        assert set(found) == _expected(row, mass, forced[i].tolist(), least, most)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_weighs_nothing_keeps_all(backend: Any):
    weights = torch.zeros(1, 1, 2, 5, device=DEVICE)
    weights[0, 0, 1] = torch.nan
    _, counts = heaviest_tiles(weights, 0.5, least=1, backend=backend)
    assert counts.flatten().tolist() == [3, 5]


@pytest.mark.parametrize(
    ("given_", "told"),
    [({"least": 3, "most": 2}, "least 3, most 2"), ({"most": 6}, "<= 5"), ({"mass": 1.5}, "mass")],
)
def test_numbers_out_of_range_are_refused(given_: dict[str, Any], told: str):
    changed: dict[str, Any] = {"mass": 0.5, **given_}
    with pytest.raises(ValueError, match=told):
        heaviest_tiles(torch.zeros(1, 1, 2, 5), **changed)
