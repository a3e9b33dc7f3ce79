"""Orders of tokens are permutations that keep neighbours together."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.order import ORDERS, TokenOrder, boxes, gilbert, morton, raster

GRIDS = [TokenGrid(9, 16, 16), TokenGrid(1, 7, 5), TokenGrid(5, 6, 10), TokenGrid(3, 1, 4)]
BOX = TokenGrid(2, 4, 4)
VIDEO = TokenGrid(21, 30, 52)


def _orders(grid: TokenGrid) -> dict[str, TokenOrder]:
    return {
        "raster": raster(grid),
        "boxes": boxes(grid, BOX),
        "morton": morton(grid),
        "gilbert": gilbert(grid),
    }


def _cells(order: TokenOrder, grid: TokenGrid) -> torch.Tensor:
    """Frame, row and column of each place of the order, `[3, L]`."""
    token = order.places
    return torch.stack(
        [token // (grid.height * grid.width), token // grid.width % grid.height, token % grid.width]
    )


def _spread(order: TokenOrder, grid: TokenGrid, size: int) -> float:
    """Mean squared distance of a token to the middle of its tile of `size` tokens, in cells."""
    tiles = _cells(order, grid).double().split(size, dim=1)
    return torch.stack([tile.var(dim=1, correction=0).sum() for tile in tiles]).mean().item()


def _boxed(order: TokenOrder, grid: TokenGrid, size: int) -> float:
    """Mean volume of the box around a tile of `size` tokens, in cells; a last, short one is out."""
    tiles = _cells(order, grid)[:, : grid.tokens // size * size].unflatten(1, (-1, size))
    return (tiles.amax(2) - tiles.amin(2) + 1).prod(0).double().mean().item()


def _far_end(grid: TokenGrid) -> tuple[int, int, int]:
    """Where a walk by single steps from the first cell can end along the longest edge it may."""
    sizes = (grid.frames, grid.height, grid.width)
    longest = max(size for size in sizes if size % 2 == 0 or grid.tokens % 2 == 1)
    along = sizes.index(longest)
    frame, row, column = (longest - 1 if axis == along else 0 for axis in range(3))
    return frame, row, column


def _assert_walk(grid: TokenGrid) -> None:
    order = gilbert(grid)
    assert sorted(order.places.tolist()) == list(range(grid.tokens)), grid
    cells = _cells(order, grid)
    assert (cells.diff(dim=1).abs().sum(0) == 1).all(), grid
    assert not cells[:, 0].any(), grid
    assert tuple(cells[:, -1].tolist()) == _far_end(grid), grid


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["raster", "boxes", "morton", "gilbert"])
def test_apply_and_undo(grid: TokenGrid, name: str):
    order = _orders(grid)[name]
    x = torch.arange(2 * grid.tokens * 3).view(2, grid.tokens, 3)
    moved = order.apply(x)
    assert torch.equal(order.undo(moved), x)
    assert torch.equal(moved[:, 0], x[:, order.places[0]])
    assert torch.equal(order.apply(x.transpose(1, 2), dim=2), moved.transpose(1, 2))


def test_composition_is_one_after_the_other():
    grid = GRIDS[0]
    first, second = boxes(grid, BOX), morton(grid)
    x = torch.arange(grid.tokens)[None]
    assert torch.equal(first.then(second).apply(x), second.apply(first.apply(x)))
    assert torch.equal(first.then(first.inverse).places, torch.arange(grid.tokens))


def test_a_box_is_a_tile_where_it_divides_the_grid():
    grid = TokenGrid(4, 8, 12)
    corners: list[int] = []
    for tile in boxes(grid, BOX).places.split(BOX.tokens):
        corner = int(tile[0])
        corners.append(corner)
        rows = [corner + 96 * f + 12 * y + x for f in range(2) for y in range(4) for x in range(4)]
        assert tile.tolist() == rows
    assert corners == [0, 4, 8, 56, 52, 48, 240, 244, 248, 200, 196, 192]


@pytest.mark.parametrize("sizes", [(5, 9, 13), (4, 8, 12), (1, 7, 3), (3, 1, 9)])
def test_each_box_is_a_neighbour_of_the_one_before(sizes: tuple[int, int, int]):
    frame, row, column = (
        boxes(TokenGrid(*sizes), BOX).places // step % size // side
        for step, size, side in zip(
            (sizes[1] * sizes[2], sizes[2], 1), sizes, (2, 4, 4), strict=True
        )
    )
    box = torch.stack([frame, row, column], dim=1).unique_consecutive(dim=0)
    assert len(box) == len(box.unique(dim=0))
    assert bool((box.diff(dim=0).abs().sum(1) == 1).all())


def test_boxes_at_the_ends_are_cut():
    assert boxes(TokenGrid(1, 3, 3), TokenGrid(1, 2, 2)).places.tolist() == [
        *(0, 1, 3, 4),
        *(2, 5),
        8,
        *(6, 7),
    ]


def test_morton_on_a_square():
    assert morton(TokenGrid(1, 4, 4)).places[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("grid", [TokenGrid(9, 16, 16), TokenGrid(9, 32, 32)], ids=str)
def test_neighbours_stay_closer_than_in_raster_order(grid: TokenGrid):
    spread = {name: _spread(order, grid, 32) for name, order in _orders(grid).items()}
    assert spread["boxes"] < 0.5 * spread["raster"]
    assert spread["morton"] < 0.5 * spread["raster"]
    assert spread["gilbert"] < 0.5 * spread["raster"]


def test_gilbert_walks_every_small_grid_by_single_steps():
    for sizes in product(range(1, 7), repeat=3):
        _assert_walk(TokenGrid(*sizes))


def test_gilbert_walks_any_grid_by_single_steps():
    draw = random.Random(0)
    grids = [TokenGrid(*(draw.randint(1, 40) for _ in range(3))) for _ in range(25)]
    plane = [TokenGrid(1, draw.randint(1, 90), draw.randint(1, 90)) for _ in range(15)]
    thin = [TokenGrid(101, 2, 1), TokenGrid(2, 101, 2), TokenGrid(1, 1, 97), TokenGrid(3, 3, 75)]
    for grid in [*grids, *plane, *thin, VIDEO, TokenGrid(21, 45, 80)]:
        _assert_walk(grid)


def test_gilbert_on_a_square():
    assert gilbert(TokenGrid(1, 2, 2)).places.tolist() in ([0, 2, 3, 1], [0, 1, 3, 2])


@pytest.mark.parametrize("grid", [TokenGrid(16, 32, 32), TokenGrid(1, 64, 64)], ids=str)
def test_gilbert_fills_boxes_where_sides_are_powers_of_two(grid: TokenGrid):
    assert _boxed(gilbert(grid), grid, 128) == 128


def test_gilbert_keeps_neighbours_closest_where_sides_are_not():
    """Boxes of 207 cells around 128 tokens, of 395 in raster and 332 in morton order.

    Four boxes in a row have 140 cells around them, but their ends are far apart. Around 64
    tokens morton is ahead, 76 to 103, as most of its tiles are whole cubes.
    """
    boxed = {name: _boxed(order, VIDEO, 128) for name, order in _orders(VIDEO).items()}
    spread = {name: _spread(order, VIDEO, 128) for name, order in _orders(VIDEO).items()}
    assert boxed["gilbert"] < 210 and boxed["boxes"] < 141
    for name in ("raster", "boxes", "morton"):
        assert spread["gilbert"] < 0.7 * spread[name]
    for name in ("raster", "morton"):
        assert boxed["gilbert"] < 0.7 * boxed[name]


def test_gilbert_is_made_once():
    assert gilbert(TokenGrid(3, 4, 5)) is gilbert(TokenGrid(3, 4, 5))


@pytest.mark.parametrize("name", ORDERS)
def test_orders_by_name(name: str):
    grid = TokenGrid(4, 6, 6)
    assert torch.equal(ORDERS[name](grid).places, _orders(grid)[name].places)


def test_text_stays_in_its_place():
    picture = morton(TokenGrid(1, 2, 4))
    after, before = picture.beside_text(3), picture.beside_text(3, first=True)
    assert after.places[-3:].tolist() == [8, 9, 10]
    assert torch.equal(after.places[:8], picture.places)
    assert before.places[:3].tolist() == [0, 1, 2]
    assert torch.equal(before.places[3:], picture.places + 3)


@pytest.mark.parametrize("places", [[0, 0, 1], [1, 2, 3], [[0, 1]]])
def test_what_is_no_permutation_is_refused(places: list[int]):
    with pytest.raises(ValueError, match="no permutation"):
        TokenOrder(torch.tensor(places))


def test_orders_of_different_lengths_do_not_compose():
    with pytest.raises(ValueError, match="do not compose"):
        raster(GRIDS[0]).then(raster(GRIDS[1]))
