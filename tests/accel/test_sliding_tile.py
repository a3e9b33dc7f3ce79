"""`sliding-tile`: windows of whole boxes, on any grid, and that it does what it predicts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import SlidingTile
from kinora.accel.methods.sliding_tile import BOXES, Windows, axis_windows, windows_of
from kinora.accel.order import boxes
from kinora.accel.site import Site
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile

RAGGED = TokenGrid(5, 9, 20)  # 900 tokens, which no box divides
EVEN = TokenGrid(8, 16, 24)
CANVAS = TokenGrid(20, 48, 80)  # 5 x 6 x 10 boxes of 4 x 8 x 8, as on the paper's canvas
BOX = TokenGrid(4, 8, 8)
TILES = ["64x64", "128x64", "128x128", "256x128"]
SMALL = [
    (TokenGrid(3, 5, 7), TokenGrid(2, 2, 2), Tile(8, 4), (0.5, 0.5, 0.5)),
    (TokenGrid(3, 5, 7), TokenGrid(1, 2, 4), Tile(8, 8), (0.3, 0.9, 0.5)),
    (TokenGrid(1, 9, 11), TokenGrid(1, 2, 4), Tile(8, 2), (1, 0.4, 0.4)),
    (TokenGrid(1, 9, 11), TokenGrid(4, 2, 2), Tile(16, 8), (0.2, 0.2, 0.2)),
    (TokenGrid(4, 4, 6), TokenGrid(2, 2, 2), Tile(8, 4), (0.5, 1, 0.6)),
    (TokenGrid(2, 1, 23), TokenGrid(1, 1, 4), Tile(4, 4), (0.5, 0.5, 0.5)),
    (TokenGrid(2, 3, 5), TokenGrid(2, 2, 2), Tile(5, 3), (0.01, 0.01, 0.01)),
]


def site(grid: TokenGrid = RAGGED, text: int = 0, first: bool = False, step: int = 2) -> Site:
    return Site(grid, layer=1, layers=4, step=step, steps=10, text=text, text_first=first)


def tensors(at: Site, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, at.tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"]


def planned(method: SlidingTile, at: Site) -> BlockPlan:
    q, k, _ = tensors(at, torch.float32)
    plan = method.plan(q, k, at)
    assert plan is not None
    plan.check()
    return plan


def axes(grid: TokenGrid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width


def attended(at: Site, box: TokenGrid, shares: tuple[float, float, float]) -> torch.Tensor:
    """The window token by token, `[L, L]`, by loops over everything."""
    cells = list(itertools.product(*map(range, axes(at.grid))))
    picture = at.text if at.text_first else 0
    found = torch.zeros(at.tokens, at.tokens, dtype=torch.bool)
    found[at.is_text()], found[:, at.is_text()] = True, True
    for (i, query), (j, key) in itertools.product(enumerate(cells), repeat=2):
        inside = True
        for size, side, share, a, b in zip(
            axes(at.grid), axes(box), shares, query, key, strict=True
        ):
            count = math.ceil(size / side)
            window = max(1, math.ceil(share * count - 1e-9))
            first = a // side - window // 2
            while first < 0:
                first += 1
            while first + window > count:
                first -= 1
            inside = inside and first <= b // side < first + window
        found[picture + i, picture + j] = inside
    return found


def by_tile(tokens: torch.Tensor, places: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Tiles with any pair, by loops."""
    tokens = tokens[places][:, places]
    return torch.stack(
        [
            torch.stack([part.any() for part in rows.split(tile.key, dim=1)])
            for rows in tokens.split(tile.query, dim=0)
        ]
    )


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_window_has_its_boxes_at_the_borders_too(count: int):
    for window in range(1, count + 1):
        near = axis_windows(count, window)
        assert (near.sum(-1) == window).all() and near.diagonal().all()
        half = window // 2
        for box in range(half, count - window + half + 1):  # those with room on both sides
            assert near[box].nonzero()[:, 0].tolist() == [*range(box - half, box - half + window)]
        assert torch.equal(near[:half], near[half].expand(half, -1))  # at the border
    for less, more in itertools.pairwise(axis_windows(count, it + 1) for it in range(count)):
        assert (less <= more).all()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("text", [0, 1, 11])
@pytest.mark.parametrize("given", SMALL, ids=lambda given: f"{given[0]} {given[1]}")
def test_a_tile_is_kept_where_any_of_its_pairs_is_in_a_window(
    given: tuple[TokenGrid, TokenGrid, Tile, tuple[float, float, float]], text: int, first: bool
):
    grid, box, tile, shares = given
    at = site(grid, text, first)
    found = windows_of(box, tile, shares, grid, text, first)
    assert sorted(found.places.tolist()) == list(range(at.tokens))
    tokens = attended(at, box, shares)
    assert torch.equal(found.mask, by_tile(tokens, found.places, tile))
    # So nothing in a window is lost.
    kept = found.mask.repeat_interleave(tile.query, 0).repeat_interleave(tile.key, 1)
    kept = kept[: at.tokens, : at.tokens]
    assert (tokens[found.places][:, found.places] <= kept).all()
    assert found.pairs == kept.sum()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1, 0.3, 0.4), (0.01, 1e-9, 0.01)])
def test_where_boxes_divide_the_grid_exactly_the_window_is_kept(
    tile: str, shares: tuple[float, float, float]
):
    frames, height, width = shares
    method = SlidingTile(frames=frames, height=height, width=width, tile=tile)  # pyright: ignore[reportArgumentType]
    plan, found = planned(method, site(EVEN)), method.windows(site(EVEN))
    assert all(b % a == 0 for a, b in zip(axes(found.box), axes(EVEN), strict=True))
    window = [
        max(1, math.ceil(s * n - 1e-9)) for s, n in zip(shares, axes(found.count), strict=True)
    ]
    assert found.box.tokens == plan.tile.query and not found.whole
    assert (plan.counts == math.prod(window) * plan.tile.query // plan.tile.key).all()
    assert method.predict(site(EVEN)) == math.prod(window) / found.count.tokens
    # Text behind the picture, also where the model puts it first, moves no box off its tile.
    for first in (True, False):
        beside = planned(method, site(EVEN, 70, first)).mask()[0, 0]
        assert torch.equal(beside[: plan.rows, : plan.columns], plan.mask()[0, 0])


def golden(*window: int) -> Windows:
    frames, height, width = (w / n for w, n in zip(window, (5, 6, 10), strict=True))
    return windows_of(BOX, Tile(256, 128), (frames, height, width), CANVAS, 0, False)


def test_the_densities_of_the_papers_windows():
    density = {
        (3, 3, 5): 0.15, (5, 3, 3): 0.15, (1, 6, 10): 0.2, (5, 1, 10): 1 / 6, (5, 6, 1): 0.1,
        (5, 6, 10): 1.0, (5, 5, 5): 5 / 12, (3, 3, 3): 0.09, (2, 4, 6): 0.16,
    }  # fmt: skip
    assert {window: golden(*window).density for window in density} == pytest.approx(density)
    # The plan searched for HunyuanVideo: so many of 72,000 heads, layers and steps have each.
    shipped = {
        (5, 6, 10): 21600, (5, 3, 3): 20380, (1, 6, 10): 15916, (3, 3, 5): 7396,
        (5, 1, 10): 5244, (5, 6, 1): 1464,
    }  # fmt: skip
    total = sum(golden(*window).density * heads for window, heads in shipped.items())
    assert total / 72000 == pytest.approx(0.41625, abs=5e-6)


def test_the_box_is_the_one_that_keeps_least():
    assert SlidingTile(tile="256x128").windows(site(CANVAS)).box == BOX
    for grid, name in itertools.product(
        (RAGGED, TokenGrid(1, 40, 33), TokenGrid(6, 30, 44)), TILES
    ):
        method = SlidingTile(tile=name)  # pyright: ignore[reportArgumentType]
        tile = method.tiling()[0]
        every = [windows_of(it, tile, method.shares, grid, 0, False) for it in BOXES[tile.query]]
        assert method.predict(site(grid)) == min(it.density for it in every) >= 0.15
    picture = SlidingTile(height=0.5, width=0.5, tile="256x128").windows(site(TokenGrid(1, 64, 64)))
    assert picture.box == TokenGrid(1, 16, 16)
    for tokens, found in BOXES.items():
        assert all(it.tokens == tokens for it in found) and len(set(found)) == len(found)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tail", ["none", "complement"])
@pytest.mark.parametrize(
    "grid", [RAGGED, EVEN, TokenGrid(1, 40, 33), TokenGrid(17, 6, 11)], ids=str
)
def test_the_predicted_density_is_executed(grid: TokenGrid, tile: str, tail: str):
    for text, first in ((0, False), (5, True), (226, False)):
        at = site(grid, text, first)
        method = SlidingTile(frames=0.4, height=0.4, width=0.4, tile=tile, tail=tail)  # pyright: ignore[reportArgumentType]
        q, k, _ = tensors(at)
        plan = method.plan(q, k, at)
        predicted = method.predict(at)
        assert (plan is None) == (predicted == 1)
        if plan is not None:
            assert plan.density().tolist() == [[pytest.approx(predicted, abs=1e-7)]]
            assert (plan.tile, plan.tail) == method.tiling()


@pytest.mark.parametrize("first", [True, False])
def test_text_attends_and_is_attended_to_everywhere(first: bool):
    at = site(text=70, first=first)
    plan = planned(SlidingTile(frames=0.1, height=0.1, width=0.1, tile="64x64"), at)
    assert plan.order is not None
    tiles = at.is_text()[plan.order].nonzero()[:, 0].div(64, rounding_mode="floor").unique()
    mask = plan.mask()
    assert mask[..., tiles].all() and mask[..., tiles, :].all() and not mask.all()
    token = torch.arange(at.tokens) // 64
    assert mask[..., token, token].all()


def test_a_window_of_the_whole_grid_is_dense():
    q, k, _ = tensors(site())
    whole = SlidingTile(frames=1, height=1, width=1, tile="256x128")
    assert whole.plan(q, k, site()) is None and whole.predict(site()) == 1
    assert "the window is all 2×2×3 boxes of 4×8×8" in whole.why_dense(site())
    # Windows of one box of two, whose tiles reach the other one.
    small = site(TokenGrid(1, 3, 25))
    one = SlidingTile(frames=1, height=1, width=0.1, tile="64x64")
    q, k, _ = tensors(small)
    assert one.plan(q, k, small) is None and one.predict(small) == 1
    assert "reach every tile" in one.why_dense(small)


@pytest.mark.parametrize("axis", ["frames", "height", "width"])
@pytest.mark.parametrize("grid", [RAGGED, EVEN], ids=str)
def test_a_wider_window_keeps_more(grid: TokenGrid, axis: str):
    base = {"frames": 0.3, "height": 0.3, "width": 0.3}
    shares = [{**base, axis: share} for share in (0.001, 0.3, 0.6, 1.0)]
    for box, tile in ((BOX, Tile(256, 128)), (TokenGrid(2, 4, 8), Tile(64, 64))):
        every = [
            windows_of(box, tile, (it["frames"], it["height"], it["width"]), grid, 7, False)
            for it in shares
        ]
        for less, more in itertools.pairwise(every):
            assert (less.mask <= more.mask).all()
        assert every[0].pairs < every[-1].pairs
    found = [SlidingTile(**it).predict(site(grid)) for it in shares]  # pyright: ignore[reportArgumentType]
    assert found == sorted(found)


@pytest.mark.parametrize("grid", [RAGGED, EVEN], ids=str)
def test_it_is_attention_over_the_tokens_of_the_kept_tiles(grid: TokenGrid):
    at = site(grid, text=9, first=True)
    method = SlidingTile(frames=0.5, height=0.5, width=0.5, tile="64x64", tail="none")
    q, k, v = (x[:1, :2] for x in tensors(at))
    plan = method.plan(q, k, at)
    assert plan is not None and plan.order is not None
    tile = plan.order.argsort() // 64
    kept = plan.mask()[0, 0][tile][:, tile]
    weights = torch.softmax((q @ k.mT / 4).masked_fill(~kept, -torch.inf), -1)
    out, _ = block_attention(q, k, v, plan)
    torch.testing.assert_close(out, weights @ v)


def test_the_error_falls_with_the_window_and_the_means_of_the_rest_help():
    at = site()
    _, _, v = tensors(at)
    # Tokens attend to those near them, as in pictures.
    cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in axes(RAGGED)))
    angles = torch.cat([cells * 0.4, cells * 0.9], dim=-1)
    waves = torch.cat([angles.cos(), angles.sin(), 0 * angles[:, :4]], dim=-1)
    q = k = (2 * waves).expand(2, 3, -1, -1)
    dense = torch.softmax(q @ k.mT / 4, -1) @ v

    def error(share: float, tail: str) -> float:
        method = SlidingTile(frames=share, height=share, width=share, tile="64x64", tail=tail)  # pyright: ignore[reportArgumentType]
        plan = method.plan(q, k, at)
        assert plan is not None
        return float((block_attention(q, k, v, plan)[0] - dense).norm() / dense.norm())

    plain = [error(share, "none") for share in (0.1, 0.4, 0.6, 0.8)]
    pooled = [error(share, "complement") for share in (0.1, 0.4, 0.6, 0.8)]
    assert plain == sorted(plain, reverse=True) and pooled == sorted(pooled, reverse=True)
    assert all(a < b for a, b in zip(pooled, plain, strict=True))


def test_plans_depend_on_the_grid_alone_and_are_made_once():
    method = SlidingTile(tile="64x64")
    q, k, _ = tensors(site())
    plan = method.plan(q, k, site())
    assert plan is not None and plan.indices.shape[:2] == (1, 1)
    again = SlidingTile(tile="64x64").plan(k[:1, :1], q[:1, :1], site(step=9))
    assert again is plan
    # On a device without numbers too: none of them is looked at.
    other = method.plan(q.to("meta"), k.to("meta"), site())
    assert other is not None and other.indices.device.type == "meta" and other.order is not None
    assert other.order.device.type == "meta" and method.plan(q, k, site()) is plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_runs_in_any_precision(dtype: torch.dtype):
    at = site(text=5)
    q, k, v = tensors(at, dtype)
    plan = SlidingTile(tile="64x64").plan(q, k, at)
    assert plan is not None
    out, _ = block_attention(q, k, v, plan)
    assert out.dtype == dtype and out.isfinite().all()


def test_a_plan_of_inference_mode_serves_gradients():
    at = site(TokenGrid(5, 9, 21))  # of this test alone: plans are kept
    with torch.inference_mode():
        q, k, _ = tensors(at)
        SlidingTile(tile="64x64").plan(q, k, at)
    q, k, v = (x.requires_grad_() for x in tensors(at))
    plan = SlidingTile(tile="64x64").plan(q, k, at)
    assert plan is not None and plan.order is not None and not plan.order.is_inference()
    block_attention(q, k, v, plan)[0].sum().backward()
    assert q.grad is not None


def test_the_picture_stands_box_by_box():
    found = SlidingTile(tile="256x128").windows(site(EVEN, text=3, first=True))
    assert torch.equal(found.places[:-3], boxes(EVEN, found.box).places + 3)
    assert found.places[-3:].tolist() == [0, 1, 2]
