"""What holds for every method that plans by tiles, whatever it chooses by."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from kinora.accel import order, tiles
from kinora.accel.grid import TokenGrid
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import (
    METHODS,
    Blade,
    Hierarchical,
    PermutedBlocks,
    SlidingTile,
    ThresholdBlocks,
    TopBlocks,
    XAttention,
)
from kinora.accel.site import Site
from kinora.accel.tiles import TileMethod, forced, token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan

GRID = TokenGrid(6, 9, 20)  # 1080 tokens, 180 of a frame: ragged with every tile
SMALL: list[TileMethod] = [
    TopBlocks(keep=0.2, tile="64x64"),
    TopBlocks(keep=0.2, tile="64x64", budget="by-head"),
    ThresholdBlocks(beta=2, tile="64x64"),
    ThresholdBlocks(rule="top", keep=0.1, mass=0.2, tile="64x64"),
    XAttention(threshold=0.2, least=0, tile="64x64"),
    Blade(keep=0.25, tile="64x64", tail="none"),
    Hierarchical(blocks=4, branch=3, tile="64x64", tail="none"),
    PermutedBlocks(keep=0.4, segment="256", tile="64x64"),
    PermutedBlocks(keep=0.1, segment="clip", tile="64x64"),
]
"""Each at a small budget."""
small = pytest.mark.parametrize("method", SMALL, ids=lambda it: it.words())


def site(text: int = 0, first: bool = False, grid: TokenGrid = GRID) -> Site:
    return Site(grid, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, at.tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def planned(method: AttentionMethod, at: Site) -> BlockPlan:
    q, k, _ = tensors(at)
    plan = method.plan(q, k, at)
    assert isinstance(plan, BlockPlan)
    plan.check()
    return plan


def guarded(method: TileMethod, **changes: Any) -> TileMethod:
    return method.model_copy(update={"first_frame": True, **changes})


def test_words_say_what_is_on():
    assert TopBlocks(first_frame=True).words().endswith(", first frame)")
    assert "first frame" not in TopBlocks().words()


def test_all_of_them_are_here():
    known = {name for name, method in METHODS.items() if issubclass(method, TileMethod)}
    assert known == {method.name for method in SMALL}


@small
@pytest.mark.parametrize(("text", "first"), [(0, False), (70, True), (7, False)])
def test_the_first_frame_is_kept_by_all_queries_and_little_more(
    method: TileMethod, text: int, first: bool
):
    at = site(text, first)
    guard = guarded(method)
    plan = planned(guard, at)
    assert plan.order is not None
    start = text if first else 0
    ours = ((plan.order >= start) & (plan.order < start + 180)).nonzero()[:, 0] // 64
    columns = ours.unique()
    assert plan.mask()[..., columns].all() and not plan.mask().all()
    assert len(columns) <= 180 // 64 + 2  # apart from the others, so that few tiles hold it
    assert guard.predict(at) > method.predict(at)
    # Queries of it choose as others do.
    forced_to_it = forced(guard.at(at))
    assert not forced_to_it[columns].all()


@pytest.mark.parametrize(
    ("method", "off"),
    [
        (TopBlocks(keep=1e-9, tile="64x64"), 1e-6),
        (ThresholdBlocks(rule="top", keep=0, mass=0, tile="128x64"), 1e-6),
        (XAttention(threshold=0, least=0, tile="64x64"), 1e-6),
        # Where the ragged last tile is chosen is not known before.
        (TopBlocks(keep=0.6, tile="64x64"), 0.03),
        (Blade(keep=0.6, mass=1, tile="64x64"), 0.03),
    ],
    ids=lambda it: getattr(it, "name", None),
)
def test_the_density_with_the_first_frame_is_predicted(method: TileMethod, off: float):
    for at in (site(), site(70, True)):
        guard = guarded(method)
        density = float(planned(guard, at).density().mean())
        assert guard.predict(at) == pytest.approx(density, abs=off) and density < 1


@small
def test_a_picture_is_all_first_frame_and_dense(method: TileMethod):
    at = site(7, grid=TokenGrid(1, 30, 36))
    guard = guarded(method)
    q, k, _ = tensors(at)
    assert guard.plan(q, k, at) is None and guard.predict(at) == 1
    told = guard.why_dense(at)
    assert "the row's own" in told and told.endswith("or has text or the first frame")
    assert method.predict(at) < 1


@pytest.mark.parametrize("name", ["raster", "morton", "gilbert"])
@pytest.mark.parametrize(("text", "first"), [(0, False), (5, True), (5, False)])
def test_the_first_frame_stands_apart_in_every_order(name: str, text: int, first: bool):
    places = token_order(name, GRID, text, first, True).places
    assert places.sort().values.tolist() == list(range(GRID.tokens + text))
    start = text if first else 0
    picture = places[start : start + GRID.tokens] - start
    assert picture[:180].max() < 180 <= picture[180:].min()
    alone = token_order(name, TokenGrid(1, 9, 20), 0, False).places
    rest = token_order(name, TokenGrid(5, 9, 20), 0, False).places
    assert torch.equal(picture, torch.cat([alone, rest + 180]))


@small
def test_with_the_first_frame_the_whole_mask_is_dense_attention(method: TileMethod):
    at, guard = site(7, True), guarded(method)
    q, k, v = tensors(at)
    plan = planned(guard, at)
    whole = BlockPlan.from_mask(
        torch.ones_like(plan.mask()), tile=plan.tile, queries=at.tokens, keys=at.tokens,
        order=plan.order,
    )  # fmt: skip
    dense = torch.softmax(q @ k.mT / 4, -1) @ v
    torch.testing.assert_close(block_attention(q, k, v, whole)[0], dense)


MORE: list[TileMethod] = [
    *SMALL,
    ThresholdBlocks(beta=-0.3, similar=0.016, tile="64x64"),
    ThresholdBlocks(rule="top", keep=0.3, mass=0.4, similar=0.016, tile="64x64"),
    ThresholdBlocks(rule="top", keep=0.0, mass=0.6, tile="64x64"),
    *(XAttention(threshold=0.6, least=0, stride=it, tile="64x64") for it in ("1", "4", "32")),
    Blade(keep=0.4, mass=0.7, samples=64, tile="64x64"),
]
"""Other options too."""
more = pytest.mark.parametrize("method", MORE, ids=lambda it: it.words())


@more
@pytest.mark.parametrize("text", [0, 7])
def test_heads_and_batch_items_choose_for_themselves_and_always_the_same(
    method: TileMethod, text: int
):
    at = site(text)
    q, k, _ = tensors(at)
    whole, again = planned(method, at), planned(method, at)
    assert torch.equal(whole.indices, again.indices) and torch.equal(whole.counts, again.counts)
    mask = whole.mask()
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[:, 0], mask[:, 1])
    if isinstance(method, Blade):
        return  # what it draws goes by the place of item and head
    # A budget by head is shared by all of them.
    heads = slice(None) if getattr(method, "budget", "") == "by-head" else slice(2, 3)
    one = method.plan(q[1:, heads], k[1:, heads], at)
    assert one is not None and torch.equal(mask[1:, heads], one.mask())


@more
@pytest.mark.parametrize("text", [0, 7])
def test_a_vector_added_to_all_keys_changes_no_plan(method: TileMethod, text: int):
    at = site(text)
    q, k, _ = tensors(at)
    generator = torch.Generator().manual_seed(5)
    shift = torch.randn(2, 3, 1, 16, generator=generator, dtype=torch.float64) * 3
    expected, found = method.plan(q, k, at), method.plan(q, k + shift, at)
    assert expected is not None and found is not None
    assert torch.equal(found.mask(), expected.mask())


@more
def test_half_precision_chooses_as_its_values_in_float64_do(method: TileMethod):
    at = site(7)
    q, k = (x.bfloat16() for x in tensors(at)[:2])
    masks: list[torch.Tensor] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        plan = method.plan(q.to(dtype), k.to(dtype), at)
        assert plan is not None
        masks.append(plan.mask())
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[2])


@small
def test_where_text_and_the_tile_itself_are_all_it_is_dense(method: TileMethod):
    at = site(5, grid=TokenGrid(1, 8, 8))
    method = method.model_copy(update={"tile": "128x128"})
    q, k, _ = tensors(at)
    assert method.plan(q, k, at) is None and method.predict(at) == 1
    assert "the row's own" in method.why_dense(at) and "or has text" in method.why_dense(at)


DEFAULTS: tuple[AttentionMethod, ...] = (
    *SMALL,
    *(TopBlocks(keep=0.3, order=it, tail="complement", tile="64x64") for it in tiles.ORDERS),  # pyright: ignore[reportArgumentType]
    TopBlocks(keep=0.3, first_frame=True, tile="64x64"),
    ThresholdBlocks(beta=-0.3, similar=0.05, tile="64x64"),
    ThresholdBlocks(rule="top", keep=0.0, mass=0.6, tile="64x64"),
    Blade(tile="64x64"),
    SlidingTile(tile="128x64"),
)


@pytest.mark.parametrize("method", DEFAULTS, ids=lambda it: it.words())
def test_torchs_default_dtype_changes_no_plan(method: AttentionMethod):
    at = dataclasses.replace(site(text=7), grid=TokenGrid(5, 8, 21))
    q, k, _ = (x.float() for x in tensors(at))

    def results() -> tuple[BlockPlan, float]:
        for module in (tiles, order, importlib.import_module(type(method).__module__)):
            for kept in vars(module).values():
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()
        plan = method.plan(q, k, at)
        assert isinstance(plan, BlockPlan)
        return plan, method.predict(at)

    expected, predicted = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        plan, again = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plan.mask(), expected.mask()) and again == predicted
    assert plan.order is not None and expected.order is not None
    assert torch.equal(plan.order, expected.order)
