"""Tiles that are kept always as ranges, where a mask of rows x columns would be too large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ..kernels.plan import Tile, tile_lengths, tiles_of
from .grid import TokenGrid


class At(NamedTuple):
    """All that an order of tokens and the tiles that are kept always depend on."""

    tile: Tile
    order: str
    grid: TokenGrid
    text: int = 0
    text_first: bool = False
    first_frame: bool = False

    @property
    def tokens(self) -> int:
        """`L`: tokens of the picture and of the text."""
        return self.grid.tokens + self.text

    @property
    def words(self) -> range:
        """Places of the text, which stands at one end of any order."""
        start = 0 if self.text_first else self.grid.tokens
        return range(start, start + self.text)

    @property
    def frame(self) -> range:
        """Places of the first frame, where it stands apart."""
        start = self.text if self.text_first else 0
        return range(start, start + self.grid.height * self.grid.width)


@dataclass(frozen=True, slots=True)
class Spans:
    """What `tiles.forced` says, of tiles or of blocks of tiles.

    A row always keeps the columns that hold its own queries, or the `run`s of tokens that these
    are in, and those that hold a token that `everywhere` has.

    Args:
        tokens: `L`.
        tile: queries and keys of a row and of a column.
        everywhere: places in the order that every row keeps, apart from each other, rising.
        whole: places whose rows keep everything; for `density` and `forces_all` alone.
        run: tokens of a run, from the first token on; 0: nothing is kept for the row's own sake.
    """

    tokens: int
    tile: Tile
    everywhere: tuple[range, ...]
    whole: range
    run: int = 1

    @classmethod
    def of(cls, at: At) -> Spans:
        """Of the tokens of a site."""
        everywhere = (at.words,)
        if at.first_frame:
            # Joined with text that stands before it.
            kept = range(0, at.frame.stop)
            everywhere = (kept,) if at.text_first else (kept, at.words)
        return cls(at.tokens, at.tile, everywhere, at.words)

    def above(self, branch: int) -> Spans:
        """Of blocks of `branch` rows and columns."""
        return replace(self, tile=Tile(self.tile.query * branch, self.tile.key * branch))

    def own(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first column of each row's own, and the one behind the last."""
        if not self.run:
            return torch.zeros_like(rows), torch.zeros_like(rows)
        first = rows * self.tile.query // self.run * self.run
        last = ((rows + 1) * self.tile.query).clamp(max=self.tokens) - 1
        behind = ((last // self.run + 1) * self.run).clamp(max=self.tokens)
        return first // self.tile.key, (behind - 1) // self.tile.key + 1

    def shared(self) -> tuple[range, ...]:
        """Columns that every row keeps."""
        return tuple(_covering(it, self.tile.key) for it in self.everywhere)

    def whole_rows(self) -> range:
        """Rows that keep everything."""
        return _covering(self.whole, self.tile.query)

    def holds(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Whether each of `rows` always keeps each of `columns`, bool."""
        start, stop = self.own(rows)
        held = (columns >= start) & (columns < stop)
        for it in self.shared():
            held |= (columns >= it.start) & (columns < it.stop)
        return held

    def sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many columns each row always keeps, and how many keys are in them, `[Q]` int64."""
        start, stop = self.own(torch.arange(tiles_of(self.tokens, self.tile.query)))
        columns, keys = stop - start, self._keys(start, stop)
        behind = 0  # the last range: two may meet in a column
        for it in self.shared():
            first = torch.tensor(max(it.start, behind))
            last = first.clamp(min=it.stop)
            # To be counted once.
            low = start.maximum(first)
            high = stop.minimum(last).maximum(low)
            columns = columns + (last - first) - (high - low)
            keys = keys + self._keys(first, last) - self._keys(low, high)
            behind = int(last)
        return columns, keys

    @lru_cache(maxsize=64)  # noqa: B019 # frozen, small and asked often
    def longest(self) -> int:
        """The most columns that `holds` of a row."""
        return int(self.sizes()[0].max())

    @lru_cache(maxsize=64)  # noqa: B019
    def density(self, kept: int) -> float:
        """Of plans that keep `kept` columns of each row, with what is kept always."""
        columns = tiles_of(self.tokens, self.tile.key)
        always, keys = (it.double() for it in self.sizes())
        # What scores choose is as long as the columns are on average: only the last may be ragged.
        chosen = (kept - always).clamp(min=0)
        held = keys + chosen * (self.tokens - keys) / (columns - always).clamp(min=1)
        held[self.whole_rows().start : self.whole_rows().stop] = self.tokens
        return float(tile_lengths(self.tokens, self.tile.query).double() @ held) / self.tokens**2

    @lru_cache(maxsize=64)  # noqa: B019
    def forces_all(self) -> bool:
        """Whether every column of every row is kept always."""
        columns = tiles_of(self.tokens, self.tile.key)
        all_of = self.sizes()[0] == columns
        all_of[self.whole_rows().start : self.whole_rows().stop] = True
        return bool(all_of.all())

    def _keys(self, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        """Keys in the columns from `start` to before `stop`."""
        start, stop = ((it * self.tile.key).clamp(max=self.tokens) for it in (start, stop))
        return stop - start


def _covering(places: range, size: int) -> range:
    """The tiles of `size` that hold any of `places`."""
    start = places.start // size
    return range(start, tiles_of(places.stop, size) if places else start)
