"""`top-blocks`: tiles of keys whose mean fits a tile of queries best."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from ...kernels.lists import pair_means, top_tiles, widest
from ...kernels.plan import BlockPlan, Tail, Tile, tile_lengths, tiles_of
from ..grid import TokenGrid
from ..method import AttentionMethod
from ..options import option
from ..order import ORDERS, TokenOrder
from ..site import Site


class TopBlocks(AttentionMethod):
    """Each tile of queries keeps the tiles of keys whose mean has the largest product with its own.

    Tokens are first ordered so that a tile is a compact piece of the clip. Of each row of tiles,
    per head, the best `keep` are kept; the tile itself and text are always among them, and queries
    of text attend to everything.

    Source: the selection shared by VSA (arXiv 2505.13389), SLA (2509.24006) and MoBA.
    Differs from them: nothing is trained and there is no coarse branch; `tail = "complement"` adds
    the mean of every tile left out in the same softmax, so that `keep = 1` is dense.
    """

    name: ClassVar[str] = "top-blocks"
    paper: ClassVar[str] = "arXiv 2505.13389, 2509.24006 (the selection only)"

    keep: float = option(0.25, "Share of the key tiles that each query tile keeps", above=0, most=1)
    tile: Literal["64x64", "128x64", "128x128", "256x128"] = option(
        "256x128", "Queries by keys in a tile; smaller ones choose better and run slower"
    )
    order: Literal["raster", "morton", "gilbert"] = option(
        "gilbert", "Order in which tokens are cut into tiles"
    )
    tail: Literal["none", "complement"] = option(
        "none", "What stands for the tiles that are left out: nothing, or their means"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        tokens, (tile, tail) = site.tokens, self.tiling()
        columns = tiles_of(tokens, tile.key)
        kept = kept_of(self.keep, columns)
        if kept == columns:
            return None
        at = tile, self.order, site.grid, site.text, site.text_first
        order, always = _beside(q.device, *at)
        # Float32: in half precision ties would favour the first tiles.
        means = pair_means(q.detach(), k.detach(), tile, order)
        indices, counts = top_tiles(*means, kept, always, width=max(kept, _longest(*at)))
        return BlockPlan(
            indices=indices,
            counts=counts,
            tile=tile,
            queries=tokens,
            keys=tokens,
            tail=tail,
            order=order,
        )

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        query, _, key = self.tile.partition("x")
        return Tile(int(query), int(key)), self.tail

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return _density(
            self.keep, self.tiling()[0], self.order, site.grid, site.text, site.text_first
        )

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        return f"because {self.keep:g} of {columns} tiles is all"


def kept_of(keep: float, columns: int) -> int:
    """How many of `columns` tiles `keep` means; at least one."""
    return math.ceil(round(keep * columns, 6))


@lru_cache(maxsize=64)
def _density(
    keep: float, tile: Tile, order: str, grid: TokenGrid, text: int, text_first: bool
) -> float:
    """What `predict` says; it is the same for every step and layer, and asked at each."""
    always = forced(tile, order, grid, text, text_first).double()
    tokens, columns = grid.tokens + text, always.shape[1]
    heights, widths = (tile_lengths(tokens, size).double() for size in (tile.query, tile.key))
    # What scores choose beside the forced tiles is as long as those are on average: only a
    # ragged last tile is shorter.
    free = columns - always.sum(-1)
    chosen = (kept_of(keep, columns) - always.sum(-1)).clamp(min=0)
    kept = always @ widths + chosen * (tokens - always @ widths) / free.clamp(min=1)
    return float(heights @ kept) / tokens**2


@lru_cache(maxsize=64)
def token_order(name: str, grid: TokenGrid, text: int, text_first: bool) -> TokenOrder:
    """The order `name` of a grid, with text beside it."""
    # Kept for later runs, which may not be in inference mode.
    with torch.inference_mode(False):
        return ORDERS[name](grid).beside_text(text, first=text_first)


@lru_cache(maxsize=64)
def forced(tile: Tile, order: str, grid: TokenGrid, text: int, text_first: bool) -> torch.Tensor:
    """Tiles of a query with itself, and rows and columns that hold a token of text, `[Q, K]`."""
    with torch.inference_mode(False):
        return _forced(tile, Site(grid, 0, 1, 0, 1, text=text, text_first=text_first), order)


@lru_cache(maxsize=64)
def _longest(tile: Tile, order: str, grid: TokenGrid, text: int, text_first: bool) -> int:
    """The most forced tiles of a row."""
    return widest(forced(tile, order, grid, text, text_first), 0)


def _beside(
    device: torch.device, tile: Tile, order: str, grid: TokenGrid, text: int, text_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the order and forced tiles on a device; what is copied there is copied once."""
    if device.type != "cpu":
        return _copied(device, tile, order, grid, text, text_first)
    return token_order(order, grid, text, text_first).places, forced(
        tile, order, grid, text, text_first
    )


@lru_cache(maxsize=16)
def _copied(
    device: torch.device, tile: Tile, order: str, grid: TokenGrid, text: int, text_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        places, always = _beside(torch.device("cpu"), tile, order, grid, text, text_first)
        return places.to(device), always.to(device)


def _forced(tile: Tile, site: Site, order: str) -> torch.Tensor:
    token = torch.arange(site.tokens)
    row, column = token // tile.query, token // tile.key
    kept = torch.zeros(
        tiles_of(site.tokens, tile.query), tiles_of(site.tokens, tile.key), dtype=torch.bool
    )
    kept[row, column] = True
    is_text = site.is_text()[token_order(order, site.grid, site.text, site.text_first).places]
    kept[row[is_text]] = True
    kept[:, column[is_text]] = True
    return kept
