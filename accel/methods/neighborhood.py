"""`neighborhood`: windows in frames, height and width that follow each token or each few tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import torch

from ...kernels import bits
from ...kernels.plan import BlockPlan, Tail, Tile, tile_lengths, tiles_of
from ..grid import TokenGrid
from ..method import AttentionMethod
from ..options import option
from ..order import boxes
from ..site import Site
from ..tiles import tile_of
from .sliding_tile import BOXES

Axis = tuple[float, int, int, bool]
"""Of one axis: window as a share or in tokens, stride (0: the box's side), dilation, causal."""

MOST = 4096
"""Tokens along an axis that options can say; what a grid is too small for ends at its size."""

_CAUSAL = {
    "none": "", "frames": "f", "height": "h", "width": "w", "frames-height": "fh",
    "frames-width": "fw", "height-width": "hw", "all": "fhw",
}  # fmt: skip


class Neighborhood(AttentionMethod):
    """Each token attends to a window of tokens around it, moved inward at the borders.

    Along each axis a window has so many tokens, at the borders too. With a stride so many tokens in
    a row share the window of the one in their middle; a dilation leaves so many tokens from one of
    a window to the next; a causal axis has none behind the query. A token is attended to where all
    axes have it; text attends to all and is attended to by all. Masks are exact to the token, and
    density is that of tokens.

    A window that is a share has an odd number of tokens or, where the stride is the box's side, of
    boxes: the nearest to the share. Shares, and windows, strides and dilations that a grid is too
    small for and that end at its size, let a recipe serve any size.

    A box has as many tokens as a tile of queries, and tokens stand box by box. Where strides are
    the box's sides, windows whole boxes, and boxes divide the grid, every tile is in a window or
    out of it: nothing is masked and nothing computed in vain. Everywhere else a tile is computed
    where any of its pairs of tokens is in a window. Of the boxes of that many tokens the one is
    taken that needs no masks, of those the one whose windows are nearest to the shares, and of
    those the one whose plan has the fewest tiles.

    Source: Neighborhood Attention (arXiv 2204.07143), dilated (arXiv 2209.15001) and with strides
    (Generalized Neighborhood Attention, arXiv 2504.16922), whose `stride` is ours; its window
    of 18 x 24 x 24 of 30 x 48 x 80 tokens is 0.6, 0.5 and 0.3, the default is wider.
    Differs from the paper: windows may be shares; text and the picture are in one softmax.
    Differs from the authors' code: a stride or window that does not fit a grid is cut to it instead
    of refused.
    """

    name: ClassVar[str] = "neighborhood"
    paper: ClassVar[str] = "arXiv 2504.16922"
    licence: ClassVar[str] = "NATTEN is MIT"
    use_when: ClassVar[str] = (
        "attention is local and windows shall be exact: a plan is made once and its density is "
        "exact before a run. Grids that boxes divide run at full speed; others compute whole tiles "
        "and mask them."
    )

    frames: float = option(
        0.8,
        "Frames in a window: up to 1 a share, 1 for all; above it a number of tokens, rounded up",
        above=0,
        most=MOST,
    )
    height: float = option(1.0, "Height of a window, likewise", above=0, most=MOST)
    width: float = option(1.0, "Width of a window, likewise", above=0, most=MOST)
    stride_frames: int = option(
        0,
        "Frames that share a window; 0 for the side of a box, which is fastest",
        least=0,
        most=MOST,
    )
    stride_height: int = option(0, "Rows that share a window, likewise", least=0, most=MOST)
    stride_width: int = option(0, "Columns that share a window, likewise", least=0, most=MOST)
    dilation_frames: int = option(1, "Frames from one in a window to the next", least=1, most=MOST)
    dilation_height: int = option(1, "Rows from one in a window to the next", least=1, most=MOST)
    dilation_width: int = option(1, "Columns from one in a window to the next", least=1, most=MOST)
    causal: Literal[
        "none", "frames", "height", "width", "frames-height", "frames-width", "height-width", "all"
    ] = option("none", "Axes along which nothing behind the query is attended to")
    tile: Literal["64x64", "128x64", "128x128", "256x128"] = option(
        "128x64",
        "Queries by keys in a tile; a box has as many tokens as queries: smaller ones mask less "
        "and run slower",
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`; of `q` only the device matters, and plans are shared."""
        del k
        if self.predict(site) >= 1:
            return None
        at = site.grid, site.text, site.text_first
        return _planned(q.device, self.tiling()[0], self.axes, *at)

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`; exact."""
        return self.windows(site).density

    def computed(self, site: Site) -> float:
        """See `AttentionMethod`; at the most, where boxes do not divide the grid."""
        return self.windows(site).computed

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        return tile_of(self.tile), "none"

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        return f"because the window is all {site.grid} tokens"

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """The options by axis."""
        causal = _CAUSAL[self.causal]
        return (
            (self.frames, self.stride_frames, self.dilation_frames, "f" in causal),
            (self.height, self.stride_height, self.dilation_height, "h" in causal),
            (self.width, self.stride_width, self.dilation_width, "w" in causal),
        )

    def windows(self, site: Site) -> Windows:
        """What is attended to at a site."""
        return fitted(self.tiling()[0], self.axes, site.grid, site.text)


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a site and the tiles that they reach, text behind the picture.

    Attributes:
        box: its sides in tokens.
        near: of each axis, `[n, n]` bool: which positions each attends to.
        lines: of each axis, `[n]` int64: positions as boxes have them, see `_lines`.
        tiles: `[Q, K]` bool, those that may hold a pair of tokens in a window.
        whole: `[Q, K]` bool, those whose pairs are all in windows.
        off: how far the tokens of a window are from the shares, as a ratio's logarithm.
        pairs: of tokens in windows, and with text.
        tokens: of picture and text.
    """

    box: TokenGrid
    near: tuple[torch.Tensor, ...]
    lines: tuple[torch.Tensor, ...]
    tile: Tile
    tiles: torch.Tensor
    whole: torch.Tensor
    off: float
    pairs: int
    tokens: int

    @cached_property
    def density(self) -> float:
        """Share of the pairs of tokens that are attended to."""
        return self.pairs / self.tokens**2

    @cached_property
    def computed(self) -> float:
        """Share of the pairs of tokens that are in `tiles`; `density` where nothing is masked."""
        return self.density if self.exact else self.area / self.tokens**2

    @cached_property
    def exact(self) -> bool:
        """Whether tiles are in windows or out of them, so that nothing is masked."""
        return torch.equal(self.tiles, self.whole)

    @cached_property
    def area(self) -> int:
        """Pairs of tokens in `tiles`."""
        heights, widths = (
            tile_lengths(self.tokens, size) for size in (self.tile.query, self.tile.key)
        )
        return int(((self.tiles * widths).sum(-1) * heights).sum())

    def positions(self, grid: TokenGrid) -> torch.Tensor:
        """`[3, picture]` int64: frame, row and column of the token at each place."""
        places = boxes(grid, self.box).places
        frame, row, column = self.lines
        return torch.stack(
            [
                frame[places // (grid.height * grid.width)],
                row[places // grid.width % grid.height],
                column[places % grid.width],
            ]
        )


@lru_cache(maxsize=32)
def fitted(tile: Tile, axes: tuple[Axis, ...], grid: TokenGrid, text: int) -> Windows:
    """The windows of the best box, see `Neighborhood`; of equal ones the nearest to a cube."""
    # Kept for later runs, which may not be in inference mode.
    with torch.inference_mode(False):
        found = (windows_of(box, tile, axes, grid, text) for box in BOXES[tile.query])
        return min(found, key=lambda it: (not it.exact, it.off, it.area))


def windows_of(
    box: TokenGrid, tile: Tile, axes: tuple[Axis, ...], grid: TokenGrid, text: int
) -> Windows:
    """The windows of `box`, which may have any number of tokens."""
    near: list[torch.Tensor] = []
    lines: list[torch.Tensor] = []
    ratio = 1.0
    for size, side, axis in zip(_sides(grid), _sides(box), axes, strict=True):
        window, stride, dilation = sizes_of(size, side, axis)
        near.append(axis_windows(size, window, stride, dilation, axis[3]))
        lines.append(_lines(size, dilation))
        most = size // dilation
        ratio *= window / (axis[0] * most if axis[0] <= 1 else min(math.ceil(axis[0]), most))
    picture = math.prod(int(it.sum()) for it in near)
    tokens = grid.tokens + text
    shape = tiles_of(tokens, tile.query), tiles_of(tokens, tile.key)
    tiles = torch.ones(shape, dtype=torch.bool)
    found = Windows(
        box, tuple(near), tuple(lines), tile, tiles, tiles.clone(),
        round(abs(math.log(ratio)), 6), picture + tokens**2 - grid.tokens**2, tokens,
    )  # fmt: skip
    # A pair of tokens is in a window where each axis has it, and any query of a tile meets any of
    # its keys: so a tile is whole where each axis is, and has a pair only where each axis has.
    for mask, at in zip(near, found.positions(grid), strict=True):
        rows, columns = (
            _holds(at, len(mask), size, count)
            for size, count in zip((tile.query, tile.key), shape, strict=True)
        )
        found.tiles.logical_and_(rows @ mask.float() @ columns.mT > 0)
        found.whole.logical_and_(rows @ (~mask).float() @ columns.mT == 0)
    if text:
        found.tiles[grid.tokens // tile.query :] = True
        found.tiles[:, grid.tokens // tile.key :] = True
    return found


def sizes_of(size: int, side: int, axis: Axis) -> tuple[int, int, int]:
    """Window, stride and dilation in tokens along an axis of `size`, where a box has `side`."""
    given, stride, dilation, _ = axis
    dilation = min(dilation, size)
    most = size // dilation
    if given == 1:
        window = most
    elif given > 1:
        window = min(math.ceil(given), most)
    else:
        unit = 1 if stride else side
        # The odd number nearest to the share; rounded, so that .3 of 10 is 3.
        window = min(unit * (2 * int(round(given * most / unit, 6) // 2) + 1), most)
    return window, min(stride or side, window), dilation


def axis_windows(
    size: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> torch.Tensor:
    """Which of `size` tokens in a row each attends to, `[size, size]` bool.

    Args:
        window: tokens in a window; times `dilation` at most `size`.
        stride: tokens that share a window, at most `window`.
        dilation: tokens from one in a window to the next.
        causal: whether a window ends at its query; it then is not moved inward.

    Raises:
        ValueError: sizes that do not go together.
    """
    if not (1 <= stride <= window and dilation >= 1 and window * dilation <= size):
        raise ValueError(
            f"a window of {window}, stride {stride} and dilation {dilation} on {size} tokens; the "
            "stride is at most the window and window times dilation at most the tokens"
        )
    token = torch.arange(size)
    group, at = token % dilation, token // dilation
    last = (size - 1 - group) // dilation  # of the tokens that the dilation puts together
    first = at // stride * stride
    leader = (first + (stride - 1 if causal else stride // 2)).minimum(last)
    if causal:
        start, end = leader - window + 1, at
    else:
        before, behind = window // 2, (window - 1) // 2
        # Never both at once: each group has as many tokens as a window.
        middle = leader.clamp(min=before).minimum(last - behind)
        start, end = middle - before, middle + behind
    inside = (start[:, None] <= at) & (at <= end[:, None])
    return inside & (group[:, None] == group)


def _lines(size: int, dilation: int) -> torch.Tensor:
    """Positions along an axis, those that a dilation puts together side by side, `[size]`."""
    return torch.cat([torch.arange(start, size, dilation) for start in range(dilation)])


def _holds(at: torch.Tensor, size: int, tile: int, tiles: int) -> torch.Tensor:
    """Whether a tile has a token at a position: `[tiles, size]` float32, 0 or 1; `at` `[L]`."""
    held = torch.zeros(tiles, size, dtype=torch.float32)
    held[torch.arange(len(at)) // tile, at] = 1
    return held


@lru_cache(maxsize=4)
def _planned(
    device: torch.device,
    tile: Tile,
    axes: tuple[Axis, ...],
    grid: TokenGrid,
    text: int,
    text_first: bool,
) -> BlockPlan:
    with torch.inference_mode(False):
        found = fitted(tile, axes, grid, text)
        frame, row, column = found.positions(grid)
        picture = (frame * grid.height + row) * grid.width + column
        last = torch.arange(text)  # behind the picture, also where models put it first
        order = torch.cat([picture + text, last] if text_first else [picture, last + grid.tokens])
        tokens = len(order)
        if found.exact:
            return BlockPlan.from_mask(
                found.tiles[None, None], tile=tile, queries=tokens, keys=tokens, order=order
            ).to(device)
        part, masks = _masked(found, grid)
        plan = BlockPlan.from_mask(
            (part | found.whole)[None, None],
            tile=tile, queries=tokens, keys=tokens, order=order, first=part[None, None],
        )  # fmt: skip
        # Rows with fewer masks have whole tiles where others have masks.
        shape = len(masks), max(map(len, masks)), tile.query, bits.words_of(tile.key)
        within = torch.full(shape, -1, dtype=torch.int32)
        for held, words in zip(within, masks, strict=True):
            held[: len(words)] = words
        return replace(plan, within=within[None, None]).to(device)


def _masked(found: Windows, grid: TokenGrid) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Tiles of which some pairs are in windows, `[Q, K]` bool; a row's masks `[n, tile.query, W]`.

    No mask of all pairs of tokens is written down: of each position along an axis there are words
    for all keys, and a query's are those of its three positions, joined.
    """
    tile, (rows, columns) = found.tile, found.tiles.shape
    at = found.positions(grid)
    missing = columns * tile.key - grid.tokens
    by_axis: list[torch.Tensor] = []
    for mask, position in zip(found.near, at, strict=True):
        keys = torch.nn.functional.pad(mask[:, position], (0, missing))
        by_axis.append(bits.pack(keys.unflatten(1, (columns, tile.key))))  # [n, K, W]
    place = torch.arange(columns * tile.key)
    is_text = (place >= grid.tokens) & (place < found.tokens)
    text = bits.pack(is_text.unflatten(0, (columns, tile.key)))
    every = bits.first(tile_lengths(found.tokens, tile.key), text.shape[1])
    partly = found.tiles & ~found.whole
    masks: list[torch.Tensor] = []
    for row in range(rows):
        chosen = partly[row].nonzero()[:, 0]
        start = row * tile.query
        own = at[:, start : start + tile.query]
        frame, height, width = (
            it[:, chosen].index_select(0, position)
            for it, position in zip(by_axis, own, strict=True)
        )
        words = torch.zeros(tile.query, len(chosen), text.shape[1], dtype=torch.int32)
        words[: own.shape[1]] = (frame & height & width) | text[chosen]
        words[own.shape[1] : found.tokens - start] = every[chosen]
        some = words.any(-1).any(0)
        partly[row, chosen[~some]] = False
        masks.append(words[:, some].transpose(0, 1))
    return partly, masks


def _sides(grid: TokenGrid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width
