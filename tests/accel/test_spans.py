"""Ranges of tiles that are kept always, against the mask that says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import PermutedBlocks
from kinora.accel.site import Site
from kinora.accel.spans import At, Spans
from kinora.accel.tiles import forced, kept_of, tile_of
from kinora.kernels.plan import Tile, tile_lengths, tiles_of

TILES = ("64x64", "128x64", "128x128", "256x128")
GRIDS = (TokenGrid(5, 9, 20), TokenGrid(1, 1, 1), TokenGrid(4, 16, 16))


def density_with(always: torch.Tensor, kept: int, tile: Tile, tokens: int) -> float:
    """Of plans that keep `kept` tiles of each row, and those of `always`, `[Q, K]` bool."""
    always = always.double()
    heights, widths = (tile_lengths(tokens, size).double() for size in (tile.query, tile.key))
    # What scores choose beside the forced tiles is as long as those are on average: only a
    # ragged last tile is shorter.
    free = always.shape[1] - always.sum(-1)
    chosen = (kept - always.sum(-1)).clamp(min=0)
    held = always @ widths + chosen * (tokens - always @ widths) / free.clamp(min=1)
    return float(heights @ held) / tokens**2


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


@pytest.mark.parametrize("tile", [Tile(64, 64), Tile(256, 128), Tile(32, 48)])
@pytest.mark.parametrize("run", [0, 1, 40, 256, 1024])
def test_a_row_keeps_the_runs_that_its_queries_are_in(tile: Tile, run: int):
    tokens, everywhere = 901, (range(70), range(850, 901))
    spans = Spans(tokens, tile, everywhere, range(850, 901), run)
    token = torch.arange(tokens)
    alike = token[:, None] // run == token // run if run else torch.zeros(tokens, tokens).bool()
    for it in everywhere:
        alike[:, it.start : it.stop] = True
    rows, columns = (torch.arange(tiles_of(tokens, it)) for it in (tile.query, tile.key))
    expected = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    query, key = alike.nonzero().unbind(-1)
    expected[query // tile.query, key // tile.key] = True
    assert torch.equal(spans.holds(rows[:, None], columns), expected)
    counts, keys = spans.sizes()
    assert torch.equal(counts, expected.sum(-1))
    assert torch.equal(keys, expected.long() @ tile_lengths(tokens, tile.key))
    expected[850 // tile.query :] = True
    assert spans.forces_all() == bool(expected.all())
    kept = kept_of(0.3, len(columns))
    assert spans.density(kept) == pytest.approx(density_with(expected, kept, tile, tokens))


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


@pytest.mark.parametrize("segment", ["256", "frame", "clip"])
def test_a_large_size_is_predicted_without_a_mask_of_all_pairs_of_tiles(segment: Any):
    """Which of 64 million tokens would fit nowhere."""
    large = Site(TokenGrid(1000, 250, 256), 0, 1, 0, 1, text=70)
    found = PermutedBlocks(segment=segment, keep=0.3).predict(large)
    assert found == pytest.approx(0.3, abs=1e-3)
