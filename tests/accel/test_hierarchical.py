"""`hierarchical`: what it finds against loops, what it keeps, and what that costs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import Hierarchical, TopBlocks, hierarchical
from kinora.accel.methods.hierarchical import descend
from kinora.accel.order import gilbert
from kinora.accel.site import Site
from kinora.accel.spans import At, Spans
from kinora.accel.tiles import tile_of, token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.lists import pair_means
from kinora.kernels.plan import BlockPlan

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile
IMAGE = TokenGrid(1, 37, 29)
TILES = ("64x64", "128x64", "128x128", "256x128")


def site(text: int = 0, first: bool = False, grid: TokenGrid = GRID) -> Site:
    return Site(grid, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site, heads: int = 3, dim: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, at.tokens, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qkv"]


def whole_numbers(at: Site) -> list[torch.Tensor]:
    """Queries, keys and values whose sums are exact in any order."""
    return [(4 * x).round() for x in tensors(at)]


def smooth(at: Site, window: int = 65) -> list[torch.Tensor]:
    """Neighbours alike, as in pictures."""
    order = token_order("gilbert", at.grid, at.text, at.text_first)
    found: list[torch.Tensor] = []
    for x in tensors(at):
        mean = torch.nn.functional.avg_pool1d(
            order.apply(x, 2).mT.flatten(0, 1), window, 1, window // 2
        )
        found.append(order.undo(mean.unflatten(0, x.shape[:2]).mT, 2) * 8)
    return found


def planned(method: Hierarchical, at: Site, q: torch.Tensor, k: torch.Tensor) -> BlockPlan:
    plan = method.plan(q, k, at)
    assert plan is not None
    plan.check()
    return plan


def made(**options: Any) -> Hierarchical:
    given: dict[str, Any] = {"blocks": 3, "branch": 2, "tile": "64x64", **options}
    return Hierarchical(**given)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def by_loops(q: torch.Tensor, k: torch.Tensor, method: Hierarchical, at: Site) -> list[set[int]]:
    """What each row keeps, from the tokens of one head in the order of the tiles."""
    tile, levels = tile_of(method.tile), method.depth(at)
    text = {*range(at.text)} if at.text_first else {*range(at.grid.tokens, at.tokens)}

    def forced(rows: range, columns: range) -> bool:
        return bool({*rows} & {*columns} or {*columns} & text)

    def block(size: int, number: int) -> range:
        return range(number * size, min((number + 1) * size, at.tokens))

    def find(level: int, row: int) -> list[int]:
        height, width = (it * method.branch**level for it in (tile.query, tile.key))
        columns = range(-(-at.tokens // width))
        if level < levels - 1:
            above = {*find(level + 1, row // method.branch)}
            columns = [it for it in columns if it // method.branch in above]
        rows = block(height, row)
        first = [it for it in columns if forced(rows, block(width, it))]
        query = q[[*rows]].mean(0)
        score = {it: float(query @ k[[*block(width, it)]].mean(0)) for it in columns}
        others = sorted((it for it in columns if it not in first), key=lambda it: (-score[it], it))
        return first + others[: max(0, method.blocks - len(first))]

    found = [{*find(0, row)} for row in range(-(-at.tokens // tile.query))]
    everything = {*range(-(-at.tokens // tile.key))}
    return [
        everything if {*block(tile.query, row)} & text else kept for row, kept in enumerate(found)
    ]


@pytest.mark.parametrize(("grid", "order"), [(GRID, "gilbert"), (IMAGE, "morton")])
@pytest.mark.parametrize("tile", ["64x64", "128x64"])
@pytest.mark.parametrize(("text", "first"), [(0, False), (70, False), (150, True)])
@pytest.mark.parametrize(("blocks", "branch"), [(3, 2), (2, 3), (5, 2), (1, 4)])
def test_it_finds_what_loops_find(
    grid: TokenGrid, order: str, tile: str, text: int, first: bool, blocks: int, branch: int
):
    at = site(text, first, grid)
    method = made(blocks=blocks, branch=branch, tile=tile, order=order)
    q, k, _ = tensors(at)
    plan = planned(method, at, q, k)
    assert method.depth(at) > 1 or blocks == 5
    assert plan.order is not None
    mask = plan.mask()
    for b, h in ((0, 0), (1, 2)):
        expected = by_loops(q[b, h, plan.order], k[b, h, plan.order], method, at)
        assert [{*row.nonzero()[:, 0].tolist()} for row in mask[b, h]] == expected


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("order", ["raster", "morton", "gilbert"])
def test_every_row_keeps_its_blocks_and_the_diagonal(tile: str, order: str):
    at = site(grid=TokenGrid(9, 18, 20))
    method = made(tile=tile, order=order)
    plan = planned(method, at, *tensors(at)[:2])
    assert (plan.counts == 3).all() and plan.indices.shape[3] == 3 and method.depth(at) > 1
    assert (plan.indices.diff(dim=-1) > 0).all()
    token = torch.arange(at.tokens)
    assert plan.mask()[..., token // plan.tile.query, token // plan.tile.key].all()
    assert method.predict(at) == pytest.approx(float(plan.density().mean()), abs=0.01)


@pytest.mark.parametrize("text", [1, 70, 226])
@pytest.mark.parametrize("first", [True, False])
def test_text_attends_and_is_attended_to_everywhere(text: int, first: bool):
    at = site(text, first)
    method = made(blocks=2)
    plan = planned(method, at, *tensors(at)[:2])
    assert plan.order is not None
    tiles = at.is_text()[plan.order].nonzero()[:, 0].div(64, rounding_mode="floor").unique()
    mask = plan.mask()
    assert mask[..., tiles].all() and mask[..., tiles, :].all() and not mask.all()
    assert method.predict(at) == pytest.approx(float(plan.density().mean()), abs=0.02)


@pytest.mark.parametrize("text", [0, 9])
def test_one_level_is_top_blocks(text: int):
    at = site(text)
    q, k, _ = tensors(at)
    flat = TopBlocks(keep=0.3, tile="64x64").plan(q, k, at)
    assert flat is not None
    blocks = math.ceil(0.3 * flat.columns)
    assert torch.equal(planned(made(blocks=blocks, levels=1), at, q, k).mask(), flat.mask())


def test_where_parents_tell_what_their_children_are_it_finds_the_best_of_all():
    """Of any two blocks of a level all tiles of one score above all tiles of the other."""
    at = site(grid=TokenGrid(4, 32, 32))  # 64 tiles
    q, k, _ = tensors(at)
    generator, tile = torch.Generator().manual_seed(0), torch.arange(64)
    score = torch.zeros(2, 3, 64, dtype=torch.int64)
    for size in (1, 2, 4, 8, 16, 32):
        better = torch.randint(2, (2, 3, 32 // size), generator=generator)  # of two neighbours
        score += size * (better[..., tile // (2 * size)] ^ (tile // size % 2))
    assert torch.equal(score.sort().values, tile.expand(2, 3, -1))
    q[:] = 1 / 16
    k[:, :, token_order("gilbert", at.grid, 0, False).places] = score.repeat_interleave(
        64, dim=2
    ).double()[..., None]
    method = made(blocks=5)
    assert method.depth(at) == 4
    mask = planned(method, at, q, k).mask()
    assert torch.equal(mask, planned(made(blocks=5, levels=1), at, q, k).mask())
    assert (mask >= (score >= 60)[:, :, None]).all()


@pytest.mark.parametrize("tile", ["64x64", "256x128"])
@pytest.mark.parametrize("text", [0, 70])
@pytest.mark.parametrize("grid", [GRID, IMAGE])
def test_keeping_every_block_is_dense(grid: TokenGrid, text: int, tile: str):
    at = site(text, grid=grid)
    q, k, v = (x[:1] for x in tensors(at))
    size = tile_of(tile)
    places = token_order("gilbert", grid, text, False).places
    means, spans = pair_means(q, k, size, places), Spans.of(At(size, "gilbert", grid, text))
    columns = means[1].shape[2]
    for levels in (1, 3):
        indices, counts = descend(*means, spans, columns, 2, levels)[0]
        for tail in ("none", "complement"):
            plan = BlockPlan(indices, counts, size, at.tokens, at.tokens, tail, places)
            plan.check()
            assert plan.density().eq(1).all()
            torch.testing.assert_close(block_attention(q, k, v, plan)[0], dense(q, k, v))
    whole = made(blocks=columns, tile=tile)
    assert whole.plan(q, k, at) is None and whole.predict(at) == 1
    assert str(columns) in whole.why_dense(at)


@pytest.mark.parametrize("grid", [GRID, IMAGE])
@pytest.mark.parametrize("text", [0, 70])
def test_the_tail_counts_each_key_once(grid: TokenGrid, text: int):
    at = site(text, grid=grid)
    q, k, _ = tensors(at, heads=1)
    plan = planned(made(), at, q, k)
    # Where all logits are 0, what a key weighs in the output is how often it was counted.
    once = torch.eye(at.tokens, dtype=torch.float64).expand(2, 1, -1, -1)
    out, lse = block_attention(torch.zeros_like(once), once, once, plan)
    torch.testing.assert_close(out * at.tokens, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(at.tokens)))


def test_tiles_of_equal_keys_are_attended_to_exactly():
    at = site()
    q, k, v = tensors(at)
    order = token_order("gilbert", GRID, 0, False)
    k, v = (order.undo(order.apply(x, 2)[:, :, torch.arange(900) // 64 * 64], 2) for x in (k, v))
    plan = planned(made(), at, q, k)
    torch.testing.assert_close(block_attention(q, k, v, plan)[0], dense(q, k, v))


def test_the_error_falls_as_more_is_kept_and_the_means_of_the_rest_help():
    at = site()
    q, k, v = smooth(at)
    whole = dense(q, k, v)

    def error(blocks: int, tail: str) -> float:
        out, _ = block_attention(q, k, v, planned(made(blocks=blocks, tail=tail), at, q, k))
        return float((out - whole).norm() / whole.norm())

    plain, pooled = ([error(it, tail) for it in (2, 5, 9, 13)] for tail in ("none", "complement"))
    assert plain == sorted(plain, reverse=True) and pooled == sorted(pooled, reverse=True)
    assert all(a < b for a, b in zip(pooled, plain, strict=True))


def test_on_smooth_tokens_it_finds_most_of_what_scoring_all_finds():
    at = site(grid=TokenGrid(8, 24, 24))
    q, k, _ = smooth(at, 513)
    found, flat = (planned(made(blocks=8, levels=it), at, q, k).mask() for it in (16, 1))
    chance = 8 / 72
    assert float((found & flat).sum() / flat.sum()) > 0.75 > 3 * chance


def test_heads_and_batch_items_choose_for_themselves():
    at, method = site(), made()
    q, k, _ = tensors(at)
    whole, one = planned(method, at, q, k), planned(method, at, q[1:, 2:], k[1:, 2:])
    assert torch.equal(whole.indices[1:, 2:], one.indices)
    assert not torch.equal(whole.mask()[0], whole.mask()[1])
    assert not torch.equal(whole.mask()[:, 0], whole.mask()[:, 1])


def test_the_order_is_where_tokens_stand_and_no_more():
    """Tokens given in the order, as a clip of one row, are chosen the same."""
    at = site(text=9)
    q, k, _ = tensors(at)
    plan = planned(made(), at, q, k)
    assert plan.order is not None
    line = site(text=9, grid=TokenGrid(1, 1, GRID.tokens))
    placed = q[:, :, plan.order], k[:, :, plan.order]
    assert torch.equal(planned(made(order="raster"), line, *placed).indices, plan.indices)


def test_neither_the_places_in_a_tile_nor_a_shift_of_all_keys_change_it():
    at = site(text=9)
    q, k, _ = whole_numbers(at)
    plan = planned(made(), at, q, k)
    assert plan.order is not None
    assert torch.equal(planned(made(), at, q, k + 512).indices, plan.indices)
    parts = [it.flip(0) for it in plan.order.split(64)]
    for x in (q, k):
        x[:, :, plan.order] = x[:, :, torch.cat(parts)]
    assert torch.equal(planned(made(), at, q, k).indices, plan.indices)


def test_equal_scores_keep_the_tile_itself_and_the_first_ones():
    at = site()
    q = torch.zeros(1, 1, at.tokens, 8)
    plan = planned(made(branch=2), at, q, q)
    assert made().depth(at) == 3
    kept = [{*row.tolist()} for row in plan.indices[0, 0]]
    assert kept == [{0, 1, 2} if i < 3 else {0, 1, i} for i in range(plan.rows)]


@pytest.mark.parametrize("blocks", [1, 3, 8, 32])
@pytest.mark.parametrize("branch", [2, 4, 16])
def test_there_are_as_many_levels_as_leave_something_to_choose(blocks: int, branch: int):
    for frames in (1, 2, 5, 21, 64):
        method, at = made(blocks=blocks, branch=branch), site(grid=TokenGrid(frames, 45, 80))
        columns, levels = math.ceil(at.tokens / 64), method.depth(at)
        top = math.ceil(columns / branch ** (levels - 1))
        assert top <= blocks * branch and (levels == 1 or top > blocks)
        assert made(blocks=blocks, branch=branch, levels=2).depth(at) == min(levels, 2)


def test_it_chooses_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch):
    at = site(text=3)
    q, k, _ = whole_numbers(at)
    expected = planned(made(), at, q, k)
    monkeypatch.setattr(hierarchical, "GATHERED_BYTES", 1)
    assert torch.equal(planned(made(), at, q, k).indices, expected.indices)


@pytest.mark.parametrize("grid", [TokenGrid(1, 9, 15), TokenGrid(1, 1, 1), TokenGrid(3, 1, 70)])
@pytest.mark.parametrize("tile", ["64x64", "256x128"])
def test_any_grid(grid: TokenGrid, tile: str):
    for text, blocks in itertools.product((0, 3, 300), (1, 2)):
        at = site(text, grid=grid)
        q, k, v = tensors(at)
        method = made(tile=tile, blocks=blocks)
        plan = method.plan(q, k, at)
        assert (plan is None) == (method.predict(at) == 1)
        if plan is not None:
            plan.check()
            assert block_attention(q, k, v, plan)[0].isfinite().all()
        else:
            assert method.why_dense(at)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_runs_in_any_precision(dtype: torch.dtype):
    at = site(text=5)
    q, k, v = (x.to(dtype) for x in tensors(at))
    plan = planned(made(), at, q, k)
    assert block_attention(q, k, v, plan)[0].dtype == dtype
    assert torch.equal(planned(made(), at, q.float(), k.float()).indices, plan.indices)


def test_what_is_not_a_number_is_kept_first():
    at = site(text=5)
    q, k, _ = tensors(at)
    q[0, 0, 3], k[1, 1, 5], q[0, 1, 4] = torch.nan, torch.nan, torch.inf
    plan = planned(made(), at, q, k)
    assert plan.order is not None
    assert plan.mask()[1, 1, :, int((plan.order == 5).nonzero()) // 64].all()


def test_gradients_pass_the_tiles_kept_and_the_means_of_the_others():
    at = site(text=2, grid=TokenGrid(3, 5, 23))  # 347 tokens: the last tile has 27
    q, k, v = (x[:1, :1, :, :2] for x in tensors(at))
    plan = planned(made(blocks=2), at, q, k)
    assert made(blocks=2).depth(at) > 1 and plan.tail == "complement"
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_attention(q, k, v, plan), given, fast_mode=True, atol=1e-7
    )


def test_torchs_default_dtype_changes_no_plan():
    at = site(text=7, grid=TokenGrid(5, 8, 21))  # of this test alone: orders are kept
    q, k, _ = (x.float() for x in tensors(at))

    def results() -> tuple[BlockPlan, float]:
        for kept in (token_order, hierarchical.places_on, gilbert, Spans.density):
            kept.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
        return planned(made(), at, q, k), made().predict(at)

    expected, predicted = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        plan, again = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plan.indices, expected.indices) and again == predicted


class Written(TorchDispatchMode):
    """Counts the numbers that operators write, and keeps the most that one wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.most = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for it in out if isinstance(out, tuple) else (out,):
                if isinstance(it, torch.Tensor):
                    self.total, self.most = self.total + it.numel(), max(self.most, it.numel())
        return out


def test_choosing_costs_in_proportion_to_the_tokens():
    counted: list[Written] = []
    sizes = [TokenGrid(16, side, side) for side in (32, 64, 128)]
    for grid in sizes:
        at, method = site(grid=grid), made(blocks=4, branch=4, order="raster")
        q = torch.randn(1, 1, grid.tokens, 2, generator=torch.Generator().manual_seed(0))
        planned(method, at, q, q)  # the order is made once
        with Written() as written:
            plan = method.plan(q, q, at)
        assert plan is not None and method.depth(at) > 2
        counted.append(written)
    for less, more in itertools.pairwise(counted):
        assert math.log(more.total / less.total, 4) < 1.1
        assert math.log(more.most / less.most, 4) < 1.1
    # Of 262,144 tokens there would be 16 million pairs of tiles.
    assert counted[-1].most < 4096**2 / 8
