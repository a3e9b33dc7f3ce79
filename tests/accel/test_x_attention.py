"""`x-attention`: its scores as their definition reads, and what holds whatever the numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import XAttention
from kinora.accel.methods.x_attention import antidiagonal_mass
from kinora.accel.site import Site
from kinora.accel.tiles import forced, token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile, tile_lengths

from .captured import captured

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile, and with strides above 4
TILES = ("64x64", "128x64", "128x128", "256x128")
STRIDES = ("1", "2", "4", "8", "16", "32")


def site(text: int = 0, first: bool = False) -> Site:
    return Site(GRID, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site, seed: int = 0, smooth: bool = True) -> list[torch.Tensor]:
    """Of 2 items and 3 heads; `smooth`: neighbours are alike, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, at.tokens, 16)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if not smooth:
        return made
    order = token_order("gilbert", GRID, at.text, at.text_first)
    for x in made:
        flat = order.apply(x, 2).mT.flatten(0, 1)
        wide = torch.nn.functional.avg_pool1d(flat, 65, 1, 32, count_include_pad=False)
        x.copy_(order.undo(wide.unflatten(0, shape[:2]).mT, 2) * 10)
    return made


def by_threshold(**options: Any) -> XAttention:
    """Without a least unless one is given, so that numbers decide."""
    given: dict[str, Any] = {"least": 0.0, **options}
    return XAttention(**given)


def planned(at: Site, seed: int = 0, smooth: bool = True, **options: Any) -> BlockPlan:
    q, k, _ = tensors(at, seed, smooth)
    plan = by_threshold(**options).plan(q, k, at)
    assert plan is not None
    plan.check()  # no row is empty
    return plan


def always(method: XAttention, at: Site) -> torch.Tensor:
    return forced(method.at(at))


def naive(q: torch.Tensor, k: torch.Tensor, tile: Tile, stride: int) -> torch.Tensor:
    """Mass between the tiles of one head, `q` and `k` `[L, D]`, pair by pair of tokens."""
    length, dim = q.shape
    lengths = [len(it) for it in torch.arange(length).split(stride)]
    whole: list[list[torch.Tensor]] = []
    for x in (q, k):
        cells = [
            torch.cat([it, it.mean(0).expand(stride - len(it), dim)]) for it in x.split(stride)
        ]
        whole.append(cells)
    logits = torch.stack(
        [
            torch.stack([(a.flip(0) * b).sum() / (math.sqrt(dim) * stride) for b in whole[1]])
            for a in whole[0]
        ]
    )
    # A cell's weight is as many tokens as it has.
    weights = logits.exp() * torch.tensor(lengths, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    rows, columns = (-(-length // size) for size in (tile.query, tile.key))
    mass = torch.zeros(rows, columns, dtype=torch.float64)
    for i, j in itertools.product(range(len(lengths)), repeat=2):
        part = weights[i, j] * lengths[i] / stride
        mass[i * stride // tile.query, j * stride // tile.key] += part
    return mass


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("tokens", [256, 200, 197, 129, 65, 33])
def test_mass_is_what_the_definition_says(stride: int, tokens: int):
    generator = torch.Generator().manual_seed(tokens)
    q, k = torch.randn(2, 2, 2, tokens, 8, generator=generator, dtype=torch.float64) * 3
    order, tile = torch.randperm(tokens, generator=generator), Tile(64, 32)
    found = antidiagonal_mass(q, k, tile, stride, order).exp()
    for b, h in itertools.product(range(2), repeat=2):
        expected = naive(q[b, h, order], k[b, h, order], tile, stride)
        torch.testing.assert_close(found[b, h], expected)


def test_logits_are_sums_of_antidiagonals():
    stride, tokens = 8, 64
    q, k = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(0)).double()
    mass = antidiagonal_mass(
        q[None, None], k[None, None], Tile(8, 8), stride, torch.arange(64)
    ).exp()
    products = (q @ k.T).unflatten(0, (-1, stride)).unflatten(2, (-1, stride)).transpose(1, 2)
    antidiagonal = torch.eye(stride, dtype=torch.bool).flip(0)
    logits = products[:, :, antidiagonal].sum(-1) / (2 * stride)
    torch.testing.assert_close(mass[0, 0], logits.softmax(-1))


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("tile", [Tile(64, 64), Tile(256, 128)])
@pytest.mark.parametrize("text", [0, 7])
def test_rows_sum_to_the_tokens_of_their_tile_by_the_stride(stride: str, tile: Tile, text: int):
    at = site(text)
    q, k, _ = tensors(at)
    mass = antidiagonal_mass(q, k, tile, int(stride), torch.arange(at.tokens)).exp()
    expected = tile_lengths(at.tokens, tile.query).double() / int(stride)
    torch.testing.assert_close(mass.sum(-1), expected.expand(2, 3, -1))


@pytest.mark.parametrize("tile", [Tile(64, 64), Tile(128, 64), Tile(256, 128)])
def test_stride_1_is_the_attention_between_tiles(tile: Tile):
    at = site(7)
    q, k, _ = tensors(at, smooth=False)
    order = token_order("gilbert", GRID, 7, False).places
    weights = torch.softmax(q[:, :, order] @ k[:, :, order].mT / 4, -1)
    rows = torch.stack([it.sum(2) for it in weights.split(tile.query, 2)], 2)
    expected = torch.stack([it.sum(3) for it in rows.split(tile.key, 3)], 3)
    torch.testing.assert_close(antidiagonal_mass(q, k, tile, 1, order).exp(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 8])
def test_chunks_are_the_whole(dtype: torch.dtype, stride: int, monkeypatch: pytest.MonkeyPatch):
    at = site(7)
    q, k = (x.to(dtype) for x in tensors(at)[:2])
    order = token_order("gilbert", GRID, 7, False).places
    whole = antidiagonal_mass(q, k, Tile(64, 64), stride, order)
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr("kinora.kernels.scores.JOINED_BYTES", 1)
    again = antidiagonal_mass(q, k, Tile(64, 64), stride, order)
    torch.testing.assert_close(again, whole)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("options", [{"threshold": 0.7}, {"threshold": 0.4, "least": 0.3}])
@pytest.mark.parametrize("text", [0, 70])
def test_the_kept_tiles_are_the_fewest_that_hold_the_threshold(
    stride: str, options: dict[str, Any], text: int
):
    at, method = site(text), by_threshold(**options, stride=stride, tile="64x64")
    q, k, _ = tensors(at)
    layout, kept = method.layout(at, q.device), always(method, at)
    mass = antidiagonal_mass(q, k, layout.tile, int(stride), layout.places).exp()
    mask = planned(at, **options, stride=stride, tile="64x64").mask()
    for b, h, i in itertools.product(*map(range, mask.shape[:3])):
        row = mass[b, h, i].tolist()
        best = sorted(range(len(row)), key=lambda j: (not bool(kept[i, j]), -row[j]))
        expected, held = set(best[: math.ceil(method.least * len(row))]), 0.0
        expected |= {j for j in best if kept[i, j]}
        for j in best:
            if held >= method.threshold * sum(row):
                break
            expected.add(j)
            held += row[j]
        assert set(mask[b, h, i].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(
    "steps",
    [
        [{"threshold": it} for it in (0, 0.3, 0.6, 0.9)],
        [{"threshold": 0.2, "least": it} for it in (0, 0.3, 0.6, 0.9)],
    ],
)
@pytest.mark.parametrize("text", [0, 70])
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(steps: list[dict[str, Any]], text: int):
    masks = [planned(site(text), tile="64x64", **options).mask() for options in steps]
    for less, more in itertools.pairwise(masks):
        assert (less <= more).all() and not torch.equal(less, more)


@pytest.mark.parametrize("options", [{"threshold": 1}, {"least": 1}, {"least": 0.95}])
def test_the_largest_budgets_are_dense(options: dict[str, Any]):
    at, method = site(), by_threshold(**{"tile": "64x64", **options})
    q, k, v = tensors(at)
    assert method.plan(q, k, at) is None and method.predict(at) == 1
    assert method.why_dense(at).startswith("because ")
    plan = method.sparse(q, k, at)
    assert plan.mask().all()
    dense = torch.softmax(q @ k.mT / 4, -1) @ v
    torch.testing.assert_close(block_attention(q, k, v, plan)[0], dense)


@pytest.mark.parametrize(("text", "first"), [(0, False), (1, True), (70, True), (226, False)])
@pytest.mark.parametrize("tile", TILES)
def test_what_is_always_kept_is_kept_at_any_budget(text: int, first: bool, tile: str):
    at, method = site(text, first), by_threshold(threshold=0, tile=tile)
    plan, kept = planned(at, threshold=0, tile=tile), always(method, at)
    assert torch.equal(plan.mask(), kept.expand_as(plan.mask()))
    assert method.predict(at) == pytest.approx(float(plan.density().mean()), abs=1e-6)
    for threshold, least in ((0.3, 0), (0.9, 0), (0, 0.4)):
        more = planned(at, threshold=threshold, least=least, tile=tile).mask()
        assert (kept <= more).all()


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("stride", ["1", "8"])
def test_the_error_falls_as_more_is_kept(stride: str, smooth: bool):
    at = site(7)
    q, k, v = tensors(at, smooth=smooth)
    weights, errors = torch.softmax(q @ k.mT / 4, -1), list[float]()
    for threshold in (0.2, 0.5, 0.8, 0.95):
        plan = planned(at, smooth=smooth, tile="64x64", threshold=threshold, stride=stride)
        assert plan.order is not None
        errors.append(float((block_attention(q, k, v, plan)[0] - weights @ v).norm()))
        if stride == "1":  # the estimate is the attention itself, of all queries of a tile
            held = captured(weights, plan)[:, :, plan.order].split(64, 2)
            assert all((it.mean(-1) >= threshold - 1e-9).all() for it in held)
    assert errors == sorted(errors, reverse=True)


def test_a_tile_is_found_where_means_hide_it():
    """Keys that alternate and queries that alternate against them, so that antidiagonals meet."""
    at, one = site(), torch.tensor([1.0, -1.0], dtype=torch.float64)
    q, k, _ = (x * 0.1 for x in tensors(at, smooth=False))
    order = token_order("gilbert", GRID, 0, False).places
    target = order[7 * 64 : 8 * 64]
    k[:, :, target] += 12 * one.repeat(32)[:, None]
    q[:, :, order] -= one.repeat(450)[:, None]
    assert k[:, :, target].mean(2).abs().max() < 0.1
    mask = planned_of(q, k, at, threshold=0.5, tile="64x64")
    assert mask[..., 7].all() and mask.double().mean() < 0.2


def planned_of(q: torch.Tensor, k: torch.Tensor, at: Site, **options: Any) -> torch.Tensor:
    plan = by_threshold(**options).plan(q, k, at)
    assert plan is not None
    return plan.mask()


def test_it_is_predicted_between_smooth_and_random_tokens():
    at = site()
    for threshold in (0.3, 0.5, 0.9):
        options: dict[str, Any] = {"tile": "64x64", "threshold": threshold}
        predicted = by_threshold(**options).predict(at)
        low, high = (
            float(planned(at, smooth=it, **options).density().mean()) for it in (True, False)
        )
        assert low <= predicted <= high
    floor = planned(at, tile="64x64", threshold=0, least=0.4).density().mean()
    told = XAttention(tile="64x64", threshold=0, least=0.4).predict(at)
    assert told == pytest.approx(float(floor), abs=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stride", ["1", "8"])
def test_a_gpu_chooses_the_same(dtype: torch.dtype, stride: str):
    at, options = site(7), {"tile": "64x64", "stride": stride}
    q, k = (x.to(dtype) for x in tensors(at)[:2])
    expected, found = planned_of(q, k, at, **options), planned_of(q.cuda(), k.cuda(), at, **options)
    assert found.is_cuda and (found.cpu() != expected).float().mean() < 0.005
