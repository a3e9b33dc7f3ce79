"""`sliding-tile`: windows in frames, height and width that move by whole boxes of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from ...kernels.plan import BlockPlan, Tail, Tile, tile_lengths
from ..grid import TokenGrid
from ..method import AttentionMethod
from ..options import option
from ..order import boxes
from ..site import Site
from ..tiles import kept_of, tile_of

Shares = tuple[float, float, float]
"""Of frames, height and width."""

BOXES = {
    tokens: tuple(TokenGrid(*sides) for sides in found)
    for tokens, found in {
        64: [(4, 4, 4), (2, 8, 4), (2, 4, 8), (1, 8, 8)],
        128: [(4, 8, 4), (4, 4, 8), (8, 4, 4), (2, 8, 8), (1, 16, 8), (1, 8, 16)],
        256: [(4, 8, 8), (8, 8, 4), (8, 4, 8), (2, 16, 8), (2, 8, 16), (1, 16, 16)],
    }.items()
}
"""Boxes of as many tokens as a tile of queries, those nearest to a cube first."""


class SlidingTile(AttentionMethod):
    """Each box of tokens attends to a window of whole boxes around it, moved inward at the borders.

    A box has as many tokens as a tile of queries, and tokens stand box by box, so that a tile is in
    a window or out of it. Every box has a window of the same number of boxes along each axis, the
    share of that axis rounded up; text attends to all and is attended to by all. The plan depends
    on the grid alone: it is made once, and its density is known before.

    On grids that a box does not divide, boxes at the far ends are cut, those behind them begin
    within tiles, and a tile is kept where any of its pairs of tokens is in a window: more than the
    windows, never less. Of the boxes of that many tokens the one is taken whose plan keeps least.

    Source: Sliding Tile Attention (arXiv 2502.04507), whose window of 3 x 3 x 5 boxes of 5 x 6 x 10
    is 0.6, 0.5 and 0.5; the default is wider.
    Differs from the paper: any grid instead of those that its boxes of 6 x 8 x 8 tokens divide, and
    windows as shares, which mean the same on each of them. Differs from the authors' code: a window
    of an even number w of boxes has w and not w + 1, one more before than behind; windows are the
    same for all heads and steps, without a search; `tail = "complement"` is ours.
    """

    name: ClassVar[str] = "sliding-tile"
    paper: ClassVar[str] = "arXiv 2502.04507"
    licence: ClassVar[str] = "FastVideo, which held the method, is Apache-2.0"
    use_when: ClassVar[str] = (
        "attention is local, or plans must not depend on what is shown: a plan is made once and "
        "its density is exact before a run. It loses most where heads look far."
    )

    frames: float = option(
        0.8,
        "Share of the frames in a window, rounded up to whole boxes; 1 for all, on any grid",
        above=0,
        most=1,
    )
    height: float = option(
        0.8, "Share of the height in a window, rounded up to whole boxes", above=0, most=1
    )
    width: float = option(
        0.8, "Share of the width in a window, rounded up to whole boxes", above=0, most=1
    )
    tile: Literal["64x64", "128x64", "128x128", "256x128"] = option(
        "128x64",
        "Queries by keys in a tile; a box has as many tokens as queries: smaller ones make finer "
        "windows and run slower",
    )
    tail: Literal["none", "complement"] = option(
        "complement", "What stands for the tiles outside the window: nothing, or their means"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`; of `q` only the device matters, and plans are shared."""
        del k
        if self.predict(site) >= 1:
            return None
        at = site.grid, site.text, site.text_first
        return _planned(q.device, *self.tiling(), self.shares, *at)

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`; exact."""
        return self.windows(site).density

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        return tile_of(self.tile), self.tail

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        found = self.windows(site)
        if found.whole:
            return f"because the window is all {found.count} boxes of {found.box}"
        return f"because the windows of boxes of {found.box} reach every tile"

    @property
    def shares(self) -> Shares:
        """The window."""
        return self.frames, self.height, self.width

    def windows(self, site: Site) -> Windows:
        """What is kept at a site, on the CPU."""
        return fitted(self.tiling()[0], self.shares, site.grid, site.text, site.text_first)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The tiles of a site that hold pairs of tokens in a window.

    Attributes:
        box: its sides in tokens.
        count: boxes along frames, height and width.
        whole: whether a window is all of them.
        places: `[L]` int64, the token at each place: box by box, then text.
        mask: `[Q, K]` bool.
        pairs: of tokens in tiles that are kept.
    """

    box: TokenGrid
    count: TokenGrid
    whole: bool
    places: torch.Tensor
    mask: torch.Tensor
    pairs: int

    @property
    def density(self) -> float:
        """Share of the pairs of tokens that are kept."""
        return self.pairs / len(self.places) ** 2


@lru_cache(maxsize=32)
def fitted(tile: Tile, shares: Shares, grid: TokenGrid, text: int, text_first: bool) -> Windows:
    """The windows of the box that keeps least; of equal ones the nearest to a cube."""
    # Kept for later runs, which may not be in inference mode.
    with torch.inference_mode(False):
        found = (windows_of(box, tile, shares, grid, text, text_first) for box in BOXES[tile.query])
        return min(found, key=lambda it: it.pairs)


def windows_of(
    box: TokenGrid, tile: Tile, shares: Shares, grid: TokenGrid, text: int, text_first: bool
) -> Windows:
    """The windows of `box`, which may have any number of tokens."""
    sides, sizes = _axes(box), _axes(grid)
    counts = [math.ceil(size / side) for size, side in zip(sizes, sides, strict=True)]
    kept = [max(1, kept_of(share, count)) for share, count in zip(shares, counts, strict=True)]
    picture = boxes(grid, box).places
    last = torch.arange(text)  # behind the picture, also where models put it first: boxes fit tiles
    places = torch.cat([picture + text, last] if text_first else [picture, last + grid.tokens])
    near = torch.ones(1, 1, dtype=torch.bool)  # box by box
    for count, window in zip(counts, kept, strict=True):
        along = axis_windows(count, window)
        near = (near[:, None, :, None] & along[None, :, None, :]).flatten(2).flatten(0, 1)
    # Boxes as they follow each other; a tile holds those from a first to a last one.
    walk, owner = torch.unique_consecutive(
        _box_of(picture, sizes, sides, counts), return_inverse=True
    )
    near = near[walk][:, walk]
    heights, widths = (tile_lengths(len(places), size) for size in (tile.query, tile.key))
    mask = _any_of(near.mT, owner, tile.key, len(widths)).mT
    mask = _any_of(mask, owner, tile.query, len(heights))
    if text:
        mask[grid.tokens // tile.query :] = True
        mask[:, grid.tokens // tile.key :] = True
    pairs = int(((mask * widths).sum(-1) * heights).sum())
    return Windows(box, TokenGrid(*counts), kept == counts, places, mask, pairs)


def axis_windows(count: int, window: int) -> torch.Tensor:
    """Which of `count` boxes in a row each attends to, `[count, count]` bool: `window` of them.

    They lie around the box and, at the borders, where they still fit.
    """
    box = torch.arange(count)
    first = (box - window // 2).clamp(0, count - window)[:, None]
    return (first <= box) & (box < first + window)


@lru_cache(maxsize=16)
def _planned(
    device: torch.device,
    tile: Tile,
    tail: Tail,
    shares: Shares,
    grid: TokenGrid,
    text: int,
    text_first: bool,
) -> BlockPlan:
    with torch.inference_mode(False):
        found = fitted(tile, shares, grid, text, text_first)
        tokens = len(found.places)
        return BlockPlan.from_mask(
            found.mask[None, None],
            tile=tile,
            queries=tokens,
            keys=tokens,
            tail=tail,
            order=found.places,
        ).to(device)


def _axes(grid: TokenGrid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width


def _box_of(
    token: torch.Tensor, sizes: tuple[int, ...], sides: tuple[int, ...], counts: list[int]
) -> torch.Tensor:
    """The number of the box that each token is in, `[L]` int64."""
    _, height, width = sizes
    at = (token // (height * width), token // width % height, token % width)
    frame, row, column = (position // side for position, side in zip(at, sides, strict=True))
    return (frame * counts[1] + row) * counts[2] + column


def _any_of(rows: torch.Tensor, owner: torch.Tensor, size: int, tiles: int) -> torch.Tensor:
    """What any of the boxes in a tile has: `[boxes, N]` bool to `[tiles, N]` bool.

    Args:
        owner: `[L]` int64, the box of each token of the picture, none less than the one before.
        size: tokens of a tile; those behind the picture count as its last box.
    """
    before = torch.nn.functional.pad(rows.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    start = torch.arange(tiles) * size
    first = owner[start.clamp(max=len(owner) - 1)]
    last = owner[(start + size - 1).clamp(max=len(owner) - 1)]
    return before[last + 1] > before[first]
