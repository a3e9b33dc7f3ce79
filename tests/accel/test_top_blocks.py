"""`top-blocks`: what it keeps, and that its predictions are what it does."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import TopBlocks
from kinora.accel.site import Site
from kinora.accel.tiles import token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile


def site(text: int = 0, first: bool = False) -> Site:
    return Site(GRID, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site, heads: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, at.tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def planned(method: TopBlocks, at: Site, seed: int = 0) -> BlockPlan:
    q, k, _ = tensors(at, seed=seed)
    plan = method.plan(q, k, at)
    assert plan is not None
    return plan


@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "256x128"])
@pytest.mark.parametrize("order", ["raster", "morton", "gilbert"])
def test_every_row_keeps_its_share_and_the_diagonal(tile: str, order: str):
    method = TopBlocks(keep=0.3, tile=tile, order=order)  # pyright: ignore[reportArgumentType]
    plan = planned(method, site())
    kept = math.ceil(0.3 * plan.columns)
    assert (plan.counts == kept).all()
    token = torch.arange(GRID.tokens)
    assert plan.mask()[..., token // plan.tile.query, token // plan.tile.key].all()
    # Where the ragged last tile is chosen is not known before; of random keys it is more often.
    assert method.predict(site()) == pytest.approx(float(plan.density().mean()), abs=0.06)


@pytest.mark.parametrize("text", [1, 70, 226])
@pytest.mark.parametrize("first", [True, False])
def test_text_attends_and_is_attended_to_everywhere(text: int, first: bool):
    at = site(text, first)
    method = TopBlocks(keep=0.1, tile="64x64")
    plan = planned(method, at)
    assert plan.order is not None
    tiles = at.is_text()[plan.order].nonzero()[:, 0].div(64, rounding_mode="floor").unique()
    mask = plan.mask()
    assert mask[..., tiles].all() and mask[..., tiles, :].all() and not mask.all()
    assert method.predict(at) == pytest.approx(float(plan.density().mean()), abs=0.02)


def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps():
    masks = [planned(TopBlocks(keep=keep, tile="64x64"), site()).mask() for keep in (0.1, 0.3, 0.6)]
    for less, more in itertools.pairwise(masks):
        assert (less <= more).all() and not torch.equal(less, more)


def test_the_least_keep_keeps_one_tile():
    assert (planned(TopBlocks(keep=1e-9, tile="64x64"), site()).counts == 1).all()


def test_keep_1_is_dense():
    q, k, _ = tensors(site())
    assert TopBlocks(keep=1).plan(q, k, site()) is None and TopBlocks(keep=1).predict(site()) == 1


def test_the_error_falls_as_more_is_kept_and_the_means_of_the_rest_help():
    at = site()
    q, k, v = tensors(at)
    # Neighbours alike, as in pictures: what is left out is not noise.
    order = token_order("gilbert", GRID, 0, False)
    for x in (q, k, v):
        smooth = torch.nn.functional.avg_pool1d(order.apply(x, 2).mT.flatten(0, 1), 65, 1, 32)
        x.copy_(order.undo(smooth.unflatten(0, x.shape[:2]).mT, 2) * 8)
    dense = torch.softmax(q @ k.mT / 4, -1) @ v

    def error(keep: float, tail: str) -> float:
        method = TopBlocks(keep=keep, tile="64x64", tail=tail)  # pyright: ignore[reportArgumentType]
        plan = method.plan(q, k, at)
        assert plan is not None
        return float((block_attention(q, k, v, plan)[0] - dense).norm() / dense.norm())

    plain = [error(keep, "none") for keep in (0.1, 0.3, 0.6, 0.9)]
    pooled = [error(keep, "complement") for keep in (0.1, 0.3, 0.6, 0.9)]
    assert plain == sorted(plain, reverse=True) and pooled == sorted(pooled, reverse=True)
    assert all(a < b for a, b in zip(pooled, plain, strict=True))


def test_the_tiles_that_matter_are_found():
    """Queries that point at one tile's keys keep that tile."""
    at = site()
    q, k, _ = tensors(at)
    order = token_order("gilbert", GRID, 0, False)
    target = 7
    places = order.places[target * 64 : (target + 1) * 64]
    direction = torch.ones(16, dtype=torch.float64)
    k[:, :, places] += 4 * direction
    q += 4 * direction
    plan = TopBlocks(keep=0.1, tile="64x64").plan(q, k, at)
    assert plan is not None and plan.mask()[..., target].all()


def test_heads_and_batch_items_choose_for_themselves():
    at = site()
    q, k, _ = tensors(at)
    method = TopBlocks(keep=0.2, tile="64x64")
    whole = method.plan(q, k, at)
    one = method.plan(q[1:, 2:], k[1:, 2:], at)
    assert whole is not None and one is not None
    assert torch.equal(whole.mask()[1:, 2:], one.mask())
    assert not torch.equal(whole.mask()[0], whole.mask()[1])


def test_equal_scores_keep_the_tile_itself_and_the_first_ones():
    at = site()
    q = torch.zeros(1, 1, at.tokens, 8)
    plan = TopBlocks(keep=0.2, tile="64x64").plan(q, q, at)
    assert plan is not None
    kept = [set(row[:3].tolist()) for row in plan.indices[0, 0]]
    assert kept == [{0, 1, 2} if i < 3 else {0, 1, i} for i in range(plan.rows)]
