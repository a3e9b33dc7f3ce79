"""`kv-merge`: which keys become one, and what a run with it does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kinora.accel.attach import accelerate
from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.errors import AccelerationError, RecipeError
from kinora.accel.grid import TokenGrid
from kinora.accel.inspection import Lens
from kinora.accel.methods import KvMerge
from kinora.accel.methods.kv_merge import cells_of, sides_of
from kinora.accel.recipe import Recipe, changed, find
from kinora.accel.site import Site
from kinora.accel.wrappers import ByLayer, Quantised, Reuse, Within
from kinora.kernels.merging import KeyMerge, merged_attention

Build = Callable[[str], Any]
GRID = TokenGrid(3, 5, 7)  # ragged with every cell
CELLS = ["1x2x2", "2x2x2", "1x3x3", "2x4x4"]


def site(text: int = 0, first: bool = False, grid: TokenGrid = GRID) -> Site:
    return Site(grid, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, at.tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def merged(method: KvMerge, k: torch.Tensor, at: Site) -> KeyMerge:
    found = method.plan(k, k, at)
    assert found is not None
    found.check()
    return found


def groups(it: KeyMerge, b: int = 0, h: int = 0) -> list[list[int]]:
    """Tokens of each key of more than one."""
    return [
        [cell[0], *itertools.compress(cell[1:], joins)]
        for cell, joins in zip(it.cells.tolist(), it.joins[b, h].tolist(), strict=True)
        if any(joins)
    ]


def place(token: int, grid: TokenGrid = GRID) -> tuple[int, int, int]:
    rest, column = divmod(token, grid.width)
    return *divmod(rest, grid.height), column


def error(method: KvMerge, at: Site, q: Any, k: Any, v: Any) -> float:
    dense = scaled_dot_product_attention(q, k, v)
    out = merged_attention(q, k, v, merged(method, k, at))
    return float((out - dense).norm() / dense.norm())


# --- cells ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("grid", [GRID, TokenGrid(4, 8, 8), TokenGrid(1, 1, 9), TokenGrid(1, 1, 1)])
def test_cells_hold_each_token_once_and_begin_with_one_in_the_middle(cell: str, grid: TokenGrid):
    cells, sides = cells_of(grid, cell), sides_of(cell)
    told = [list(dict.fromkeys(row)) for row in cells.tolist()]
    assert sorted(itertools.chain(*told)) == list(range(grid.tokens))
    sizes = zip((grid.frames, grid.height, grid.width), sides, strict=True)
    assert len(cells) == math.prod(-(-a // b) for a, b in sizes)
    for row in told:
        places = [place(token, grid) for token in row]
        corners = [tuple(x // s for x, s in zip(it, sides, strict=True)) for it in places]
        assert len(set(corners)) == 1
        middle = [sum(axis) / len(places) for axis in zip(*places, strict=True)]
        far = [math.dist(it, middle) for it in places]
        assert far[0] == pytest.approx(min(far))
        nearest = [token for token, it in zip(row, far, strict=True) if it < min(far) + 1e-9]
        assert row[0] == min(nearest)


# --- what becomes one -------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "first"), [(0, False), (4, True), (7, False)])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("likeness", ["cosine", "distance"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_the_share_that_is_asked_for_is_left_text_stays_and_cells_are_kept_apart(
    text: int, first: bool, cell: Any, likeness: Any, keep: float
):
    at = site(text, first)
    method = KvMerge(keep=keep, cell=cell, likeness=likeness)
    it = merged(method, tensors(at)[1], at)
    assert it.left == math.ceil(keep * GRID.tokens) + text
    assert method.predict(at) == pytest.approx(float(it.density()), abs=1e-6)
    assert method.computed(at) == method.predict(at)
    assert (it.sizes().sum(-1) == at.tokens).all()
    written = at.is_text().nonzero()[:, 0].tolist()
    start = text if first else 0
    for b, h in itertools.product(range(2), range(3)):
        assert set(written) <= set(it.alone[b, h].tolist())
        for group in groups(it, b, h):
            corners = {
                tuple(x // s for x, s in zip(place(t - start), sides_of(cell), strict=True))
                for t in group
            }
            assert len(corners) == 1 and not set(group) & set(written)


@pytest.mark.parametrize("likeness", ["cosine", "distance"])
def test_those_most_like_the_first_of_their_cell_join_it(likeness: Any):
    """The definition, written out."""
    at, method = site(3, True), KvMerge(keep=0.6, cell="2x2x2", likeness=likeness)
    _, k, _ = tensors(at)
    it = merged(method, k, at)
    for b, h in itertools.product(range(2), range(3)):
        x = k[b, h]
        scored: dict[int, float] = {}
        for cell in (cells_of(GRID, "2x2x2") + 3).tolist():
            for token in set(cell) - {cell[0]}:
                a, c = x[token], x[cell[0]]
                near = -(a - c).norm() if likeness == "distance" else a @ c / (a.norm() * c.norm())
                scored[token] = float(near)
        best = sorted(scored, key=lambda token: -scored[token])[: method.merges(at)]
        joined = {token for group in groups(it, b, h) for token in group[1:]}
        assert joined == set(best) and 0 < len(joined) < len(scored)


def test_as_few_as_there_are_cells_and_all_of_them():
    at = site()
    _, k, _ = tensors(at)
    least = merged(KvMerge(keep=0.25), k, at)  # ragged cells: more than a quarter is left
    assert least.left == len(cells_of(GRID, "1x2x2")) > 0.25 * GRID.tokens
    assert KvMerge(keep=0.25).predict(at) == pytest.approx(least.left / at.tokens)
    whole = KvMerge(keep=1)
    assert whole.plan(k, k, at) is None and whole.predict(at) == 1
    assert whole.why_dense(at) == "because keep 1 in cells of 1x2x2 is all of 3×5×7 keys"
    one = site(grid=TokenGrid(1, 1, 1))
    assert KvMerge().plan(k[:, :, :1], k[:, :, :1], one) is None and KvMerge().predict(one) == 1


def test_all_heads_choose_together_where_they_share():
    at = site()
    _, k, _ = tensors(at)
    it = merged(KvMerge(heads="shared"), k, at)
    assert it.joins.shape[:2] == it.alone.shape[:2] == (2, 1)
    own = merged(KvMerge(), k, at)
    assert own.joins.shape[:2] == (2, 3) and not torch.equal(own.joins[:, 0], own.joins[:, 1])
    alike = k[:, :1].expand(-1, 3, -1, -1)
    together, apart = (merged(KvMerge(heads=heads), alike, at) for heads in ("shared", "own"))  # pyright: ignore[reportArgumentType]
    assert torch.equal(together.joins.expand_as(apart.joins), apart.joins)


def test_items_of_a_batch_choose_alone_and_always_the_same():
    at, method = site(2), KvMerge()
    _, k, _ = tensors(at)
    it = merged(method, k, at)
    for b in range(2):
        one = merged(method, k[b, None], at)
        assert torch.equal(one.joins, it.joins[b, None])
        assert torch.equal(one.alone, it.alone[b, None])
    other = dataclasses.replace(at, seed=5, step=7, layer=3, branch=1)
    assert torch.equal(merged(method, k, other).joins, it.joins)


def test_ties_go_to_the_first_and_what_is_no_number_joins_last():
    at = site()
    _, k, _ = (x[:1, :1] for x in tensors(at))
    same = merged(KvMerge(), torch.ones_like(k), at)
    count = KvMerge().merges(at)
    others = [t for row in cells_of(GRID, "1x2x2").tolist() for t in dict.fromkeys(row[1:])
              if t != row[0]]  # fmt: skip
    assert {t for group in groups(same) for t in group[1:]} == set(others[:count])
    broken = torch.ones_like(k)
    broken[:, :, others[0]] = torch.nan
    joined = {t for group in groups(merged(KvMerge(), broken, at)) for t in group[1:]}
    assert joined == set(others[1 : count + 1])


# --- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("likeness", ["cosine", "distance"])
@pytest.mark.parametrize(("text", "first"), [(0, False), (4, True), (7, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_identical_tokens_lose_nothing(likeness: Any, text: int, first: bool, cell: Any):
    at = site(text, first)
    q, k, v = tensors(at)
    start = text if first else 0
    for row in cells_of(GRID, cell).tolist():
        for x in (k, v):
            x[:, :, [start + t for t in row]] = x[:, :, start + row[0], None].clone()
    method = KvMerge(keep=0.4, cell=cell, likeness=likeness)
    assert error(method, at, q, k, v) < 1e-14
    k[:, :, start] += 1  # what is not alike is not
    v[:, :, start] += 1
    assert error(method.model_copy(update={"keep": 1e-3}), at, q, k, v) > 1e-4


def test_those_that_are_identical_are_found_among_others():
    at = site()
    q, k, v = tensors(at)
    budget = KvMerge(keep=0.7).merges(at)
    rows = cells_of(GRID, "1x2x2")
    pairs = [(row[0], t) for row in rows.tolist() for t in dict.fromkeys(row[1:]) if t != row[0]]
    generator = torch.Generator().manual_seed(1)
    for i in torch.randperm(len(pairs), generator=generator)[:budget].tolist():
        first, other = pairs[i]
        k[:, :, other], v[:, :, other] = k[:, :, first].clone(), v[:, :, first].clone()
    assert error(KvMerge(keep=0.7), at, q, k, v) < 1e-14
    assert error(KvMerge(keep=0.68), at, q, k, v) > 1e-3


def smooth(at: Site) -> list[torch.Tensor]:
    """Neighbours alike, as in pictures."""
    made: list[torch.Tensor] = []
    for x in tensors(at):
        volume = x.mT.flatten(0, 1).unflatten(2, (at.grid.frames, at.grid.height, at.grid.width))
        soft = torch.nn.functional.avg_pool3d(volume, 3, 1, 1).flatten(2)
        made.append(3 * soft.unflatten(0, x.shape[:2]).mT)
    return made


@pytest.mark.parametrize("likeness", ["cosine", "distance"])
def test_the_error_falls_as_more_is_left_and_chance_is_worse(likeness: Any):
    at = site(grid=TokenGrid(4, 9, 20))
    q, k, v = smooth(at)
    dense = scaled_dot_product_attention(q, k, v)
    found: list[float] = []
    for keep in (0.3, 0.5, 0.7, 0.9):
        method = KvMerge(keep=keep, likeness=likeness)
        found.append(error(method, at, q, k, v))
        scores = method.scores(k, at)
        drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
        out = merged_attention(q, k, v, method.with_likeness(drawn, at))
        assert found[-1] < float((out - dense).norm() / dense.norm())
    assert found == sorted(found, reverse=True)


def test_what_is_not_first_of_its_cell_may_be_anywhere_in_it():
    at, method = site(3, True), KvMerge(keep=0.5, cell="2x2x2")
    q, k, v = tensors(at)
    order = torch.arange(at.tokens)
    for row in (cells_of(GRID, "2x2x2") + 3).tolist():
        others = [t for t in dict.fromkeys(row[1:]) if t != row[0]]
        order[others] = torch.tensor(others[::-1], dtype=torch.int64)
    out = merged_attention(q, k, v, merged(method, k, at))
    k, v = k[:, :, order], v[:, :, order]
    again = merged_attention(q, k, v, merged(method, k, at))
    assert not torch.equal(order, torch.arange(at.tokens))
    torch.testing.assert_close(again, out)
    # And queries by themselves: each has its output wherever it stands.
    moved = merged_attention(q[:, :, order], k, v, merged(method, k, at))
    torch.testing.assert_close(moved, again[:, :, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_is_near_float64(dtype: torch.dtype):
    at, method = site(3), KvMerge()
    q, k, v = (x.to(dtype) for x in tensors(at))
    it = merged(method, k, at)
    assert torch.equal(it.joins, merged(method, k.float(), at).joins)
    out = merged_attention(q, k, v, it)
    exact = merged_attention(q.double(), k.double(), v.double(), it)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["keep=0.2"], "keep 0.2 is less than one key of each cell of 1x2x2, 0.25: keep more, or"),
        (["by_layer=keep 0.5 0.1"], "keep 0.1 is less than one key of each cell"),
        (["cell=1x3x3", "keep=0.1"], "of each cell of 1x3x3, 0.1111"),
        (["cell=3x3x3"], "attention.cell must be one of 1x2x2, 2x2x2, 1x3x3, 2x4x4"),
        (["qk=int8"], "attention.qk is int8, but kv-merge is computed in the precision of the inp"),
        (["pv=fp8"], "attention.pv is fp8, but kv-merge"),
    ],
)
def test_options_that_do_not_go_together(settings: list[str], told: str):
    given = ["attention.method=kv-merge", *(f"attention.{it}" for it in settings)]
    with pytest.raises(RecipeError) as caught:
        changed(find("dense"), given)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_other_precisions_are_refused_around_any_wrapper():
    assert Quantised(method=KvMerge()).precision() == KvMerge().precision()
    with pytest.raises(ValueError, match="computed in the precision of the input alone"):
        Quantised(method=ByLayer(method=KvMerge(), by_layer="keep 0.5 0.3"), qk="int8")


def test_its_options_are_read_and_written():
    given = ["keep=0.3", "cell=2x2x2", "heads=shared", "every=5", "from_step=0.2"]
    recipe = changed(
        find("dense"), ["attention.method=kv-merge", *(f"attention.{it}" for it in given)]
    )
    method = KvMerge(keep=0.3, cell="2x2x2", heads="shared")
    assert recipe.attention == Within(method=Reuse(method=method, every=5), from_step=0.2)
    assert "kv-merge (keep 0.3, cell 2x2x2" in recipe.words()


# --- runs -------------------------------------------------------------------------------------


def always(method: Any) -> Recipe:
    return Recipe(attention=method, when="always")


def test_a_run_is_near_the_dense_one_on_every_family(model: Any):
    dense = model()
    with accelerate(model, always(KvMerge())) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.kernels == {"sdpa": ran.calls} and not ran.dense
    assert 0.5 <= ran.density < 0.95  # text stays
    assert 1e-7 < (out - dense).norm() / dense.norm() < 0.1
    assert torch.equal(model(), dense)


def test_the_receipt_says_what_ran(build: Build):
    model = build("wan")
    method = Within(method=ByLayer(method=KvMerge(), by_layer="keep 0.75 0.25"), from_step=0.3)
    with accelerate(model, always(method)) as session:
        model()
    told = session.receipt.attention
    assert told is not None and told.precision == "input x input"
    assert told.density_by_layer == pytest.approx(
        [(1 + 2 * it) / 3 for it in (0.75, 0.25)], abs=1e-4
    )
    assert told.dense == {"in the first 30% of the steps": 4} and not told.fallbacks
    assert "8 of 12 attention calls by the sdpa kernel; 67% of all pairs" in "\n".join(
        session.receipt.words()
    )


def test_keep_1_runs_the_stock_attention(build: Build):
    model = build("wan")
    dense = model()
    with accelerate(model, always(KvMerge(keep=1))) as session:
        assert torch.equal(model(), dense)
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels and ran.density == 1


def test_a_merge_is_kept_for_as_many_steps_as_asked_and_shared(build: Build):
    asked: list[tuple[int, int]] = []

    class Spy(KvMerge):
        """Notes step and batch."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> KeyMerge | None:
            asked.append((site.step, q.shape[0]))
            return super().plan(q, k, site)

    model = build("cogvideox")  # guidance is in the batch
    with accelerate(model, always(Reuse(method=Spy(), every=0, branches="shared"))) as session:
        shared = model()
    layers = session.receipt.attention.layers if session.receipt.attention else 0
    assert asked == [(0, 2)] * layers + [(1, 1)] * layers
    with accelerate(model, always(KvMerge())):
        assert 0 < (model() - shared).norm() < 0.1 * shared.norm()


def test_what_merges_has_no_tiles_to_draw():
    with pytest.raises(AccelerationError, match="merges keys and keeps no tiles: there is nothing"):
        Lens(Within(method=KvMerge(), from_step=0.2), layer=0, step=0)


def test_predictions_count_the_keys_that_are_left():
    shape = Shape((transformer_layer(4, 64, 1024, text=7),) * 2)
    given: dict[str, Any] = {"dtype": torch.float32, "steps": 4, "always": False}
    grid = TokenGrid(9, 32, 32)
    found = predict(KvMerge(), shape, grid, device="cpu", **given)
    assert found.density == pytest.approx((4608 + 7) / 9223) and found.kernel == "sdpa"
    assert found.speedup > 1 and not found.dense
    more = predict(KvMerge(keep=0.95), shape, grid, device="cpu", **given)
    assert (
        more.density == more.speedup == 1 and "the sdpa kernel is predicted to take" in more.dense
    )
    kept = predict(Reuse(method=KvMerge(), every=4), shape, grid, device="cpu", **given)
    assert kept.workspace - found.workspace > 2 * 2 * 4 * 9223  # a merge of each layer and item
    # Nothing was measured there, so that nothing is claimed.
    assert predict(KvMerge(keep=0.3), shape, grid, device="cuda", **given).speedup == 1
