"""Orders of tokens are permutations that keep neighbours together."""

from __future__ import annotations

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.order import TokenOrder, boxes, morton, raster

GRIDS = [TokenGrid(9, 16, 16), TokenGrid(1, 7, 5), TokenGrid(5, 6, 10), TokenGrid(3, 1, 4)]
BOX = TokenGrid(2, 4, 4)


def _orders(grid: TokenGrid) -> dict[str, TokenOrder]:
    return {"raster": raster(grid), "boxes": boxes(grid, BOX), "morton": morton(grid)}


def _spread(order: TokenOrder, grid: TokenGrid, size: int) -> float:
    """Mean squared distance of a token to the middle of its tile of `size` tokens, in cells."""
    token = order.places
    place = torch.stack(
        [token // (grid.height * grid.width), token // grid.width % grid.height, token % grid.width]
    ).double()
    tiles = place.split(size, dim=1)
    return torch.stack([tile.var(dim=1, correction=0).sum() for tile in tiles]).mean().item()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["raster", "boxes", "morton"])
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
    for tile in boxes(grid, BOX).places.split(BOX.tokens):
        corner = int(tile[0])
        rows = [corner + 96 * f + 12 * y + x for f in range(2) for y in range(4) for x in range(4)]
        assert tile.tolist() == rows


def test_boxes_at_the_ends_are_cut():
    assert boxes(TokenGrid(1, 3, 3), TokenGrid(1, 2, 2)).places.tolist() == [
        *(0, 1, 3, 4),
        *(2, 5),
        *(6, 7),
        8,
    ]


def test_morton_on_a_square():
    assert morton(TokenGrid(1, 4, 4)).places[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("grid", [TokenGrid(9, 16, 16), TokenGrid(9, 32, 32)], ids=str)
def test_neighbours_stay_closer_than_in_raster_order(grid: TokenGrid):
    spread = {name: _spread(order, grid, 32) for name, order in _orders(grid).items()}
    assert spread["boxes"] < 0.5 * spread["raster"]
    assert spread["morton"] < 0.5 * spread["raster"]


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
