"""Ranges of tiles that are kept always, against the mask that says the same."""

from __future__ import annotations

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.spans import At, Spans
from kinora.accel.tiles import density_with, forced, kept_of, tile_of
from kinora.kernels.plan import Tile, tile_lengths, tiles_of

TILES = ("64x64", "128x64", "128x128", "256x128")
GRIDS = (TokenGrid(5, 9, 20), TokenGrid(1, 1, 1), TokenGrid(4, 16, 16))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("text", [0, 1, 70, 226, 1000])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("frame", [True, False])
def test_they_are_the_mask(tile: str, text: int, first: bool, frame: bool):
    for grid in GRIDS:
        at = At(tile_of(tile), "gilbert", grid, text, first, frame)
        spans, expected = Spans.of(at), forced(at)
        rows, columns = (torch.arange(it) for it in expected.shape)
        held = spans.holds(rows[:, None], columns)
        counts, keys = spans.sizes()
        assert torch.equal(counts, held.sum(-1)) and spans.longest() == int(counts.max())
        assert torch.equal(keys, held.long() @ tile_lengths(spans.tokens, spans.tile.key))
        held[spans.whole_rows().start : spans.whole_rows().stop] = True
        assert torch.equal(held, expected)
        assert spans.forces_all() == bool(expected.all())
        for keep in (1e-9, 0.3, 1):
            kept = kept_of(keep, len(columns))
            assert spans.density(kept) == pytest.approx(
                density_with(expected, kept, at.tile, spans.tokens), abs=1e-12
            )


@pytest.mark.parametrize("branch", [2, 5])
def test_a_block_keeps_what_any_of_its_rows_keeps(branch: int):
    for everywhere in ((), (range(3, 4),), (range(40), range(850, 901)), (range(100, 901),)):
        spans = Spans(901, Tile(32, 16), everywhere, range(0))
        rows, columns = torch.arange(29), torch.arange(57)
        held = spans.holds(rows[:, None], columns)
        assert torch.equal(spans.sizes()[0], held.sum(-1))
        above = spans.above(branch)
        expected = torch.zeros(tiles_of(29, branch), tiles_of(57, branch), dtype=torch.bool)
        row, column = held.nonzero().unbind(-1)
        expected[row // branch, column // branch] = True
        above_rows, above_columns = (torch.arange(it) for it in expected.shape)
        assert torch.equal(above.holds(above_rows[:, None], above_columns), expected)
        assert torch.equal(above.sizes()[0], expected.sum(-1))
