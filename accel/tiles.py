"""Methods that plan by tiles of tokens in some order, and what they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ..kernels.lists import widest
from ..kernels.plan import BlockPlan, Tail, Tile, tiles_of
from .grid import TokenGrid
from .method import AttentionMethod
from .options import option
from .order import ORDERS, TokenOrder, first_frame_apart
from .site import Site
from .spans import At, Spans

TileName = Literal["64x64", "128x64", "128x128", "256x128"]
"""Queries by keys in a tile."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the tokens of a site are cut into tiles.

    Attributes:
        places: `[L]` int64, the token at each place of the order; tile 0 holds the first places.
        always: `[Q, K]` bool, tiles that are kept whatever a method chooses.
    """

    tile: Tile
    places: torch.Tensor
    always: torch.Tensor


class TileMethod(AttentionMethod):
    """Tokens are put in an order in which a tile is a compact piece of the clip; then `choose`.

    Text is attended to by all and attends to all, and a tile of queries keeps the tiles of keys
    that it overlaps, whatever is chosen. With `first_frame` that frame is attended to by all too;
    it is then cut into tiles of its own, so that few hold it.
    """

    tile: TileName = option(
        "128x64", "Queries by keys in a tile; smaller ones choose better and run slower"
    )
    order: Literal["raster", "morton", "gilbert"] = option(
        "gilbert", "Order in which tokens are cut into tiles"
    )
    tail: Literal["none", "complement"] = option(
        "complement", "What stands for the tiles that are left out: nothing, or their means"
    )
    first_frame: bool = option(
        False, "Whether all queries keep the first frame, as text; of few frames that is much"
    )

    def choose(self, q: torch.Tensor, k: torch.Tensor, site: Site, layout: Layout) -> torch.Tensor:
        """Tiles to keep beside `layout.always`, `[B or 1, H or 1, Q, K]` bool.

        Args:
            q, k: `[B, H, L, D]` as they come, not in the order of the layout.
        """
        raise NotImplementedError

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        layout = self.layout(site, q.device)
        mask = self.choose(q.detach(), k.detach(), site, layout) | layout.always
        return BlockPlan.from_mask(
            mask,
            tile=layout.tile,
            queries=site.tokens,
            keys=site.tokens,
            tail=self.tiling()[1],
            order=layout.places,
        )

    def listed(
        self, indices: torch.Tensor, counts: torch.Tensor, site: Site, layout: Layout
    ) -> BlockPlan:
        """The plan of such lists, which hold what is kept always too."""
        return BlockPlan(
            indices=indices,
            counts=counts,
            tile=layout.tile,
            queries=site.tokens,
            keys=site.tokens,
            tail=self.tiling()[1],
            order=layout.places,
        )

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        return tile_of(self.tile), self.tail

    def at(self, site: Site) -> At:
        """All that order and forced tiles depend on."""
        tile, text = tile_of(self.tile), (site.text, site.text_first)
        return At(tile, self.order, site.grid, *text, self.first_frame)

    def layout(self, site: Site, device: torch.device) -> Layout:
        """The order and the tiles that are kept always, on a device; copied there once."""
        at = self.at(site)
        return _on_cpu(at) if device.type == "cpu" else _copied(device, at)

    def forces_all(self, site: Site) -> bool:
        """Whether every tile is kept always, so that there is nothing to choose."""
        return Spans.of(self.at(site)).forces_all()

    def why_forced(self, site: Site, own: str = "the row's own") -> str:
        """Where `forces_all`: why it is dense, in words that follow "dense …"."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        frame = " or the first frame" if self.first_frame else ""
        return f"because each of {columns} tiles is {own} or has text{frame}"


def tile_of(name: str) -> Tile:
    """The tile that an option names, as in `256x128`."""
    query, _, key = name.partition("x")
    return Tile(int(query), int(key))


@lru_cache(maxsize=64)
def token_order(
    name: str, grid: TokenGrid, text: int, text_first: bool, first_frame: bool = False
) -> TokenOrder:
    """The order `name` of a grid, with text beside it; `first_frame` puts that one apart."""
    # Kept for later runs, which may not be in inference mode.
    with torch.inference_mode(False):
        order = first_frame_apart(ORDERS[name], grid) if first_frame else ORDERS[name](grid)
        return order.beside_text(text, first=text_first)


@lru_cache(maxsize=64)
def forced(at: At) -> torch.Tensor:
    """Tiles that are kept always, `[Q, K]` bool.

    Those of a query with itself, rows and columns that hold a token of text and, with
    `first_frame`, columns that hold one of that.
    """
    with torch.inference_mode(False):
        token = torch.arange(at.tokens)
        row, column = token // at.tile.query, token // at.tile.key
        shape = tiles_of(at.tokens, at.tile.query), tiles_of(at.tokens, at.tile.key)
        kept = torch.zeros(shape, dtype=torch.bool)
        kept[row, column] = True
        site = Site(at.grid, 0, 1, 0, 1, text=at.text, text_first=at.text_first)
        places = token_order(*at[1:]).places
        is_text = site.is_text()[places]
        kept[row[is_text]] = True
        kept[:, column[is_text]] = True
        if at.first_frame:
            picture = places - (at.text if at.text_first else 0)
            first = (picture >= 0) & (picture < at.grid.height * at.grid.width)
            kept[:, column[first]] = True
        return kept


@lru_cache(maxsize=64)
def longest(at: At) -> int:
    """The most forced tiles of a row."""
    return widest(forced(at), 0)


@lru_cache(maxsize=64)
def longest_choice(at: At) -> int:
    """The most forced tiles of a row that has others too; 0 where none has."""
    kept = forced(at)
    return int(kept[~kept.all(-1)].sum(-1).amax()) if not kept.all() else 0


def _on_cpu(at: At) -> Layout:
    return Layout(at.tile, token_order(*at[1:]).places, forced(at))


@lru_cache(maxsize=16)
def _copied(device: torch.device, at: At) -> Layout:
    with torch.inference_mode(False):
        layout = _on_cpu(at)
        return Layout(layout.tile, layout.places.to(device), layout.always.to(device))


def kept_of(keep: float, columns: int) -> int:
    """How many of `columns` tiles `keep` means; at least one."""
    return max(1, math.ceil(round(keep * columns, 6)))


def density_of(keep: float, at: At) -> float:
    """Of plans that keep the share `keep` of each row, with what is kept always; asked often.

    By ranges: of a large picture a mask of all pairs of tiles would not fit anywhere.
    """
    return Spans.of(at).density(kept_of(keep, tiles_of(at.tokens, at.tile.key)))


def density_beside(share: float, at: At) -> float:
    """Of plans that keep `share` of the pairs that are not kept always; asked often."""
    kept = Spans.of(at).density(0)
    return kept + share * (1 - kept)


def likely_share(mass: float) -> float:
    """Share of the tiles that holds `mass` of a row, as a guess for a kernel's cost.

    Of tokens at random it is `mass` itself. For 0.5 and 0.9 this is 0.25 and 0.75; of smooth fields
    0.1 to 0.3 and 0.5 to 0.8 were measured, more of larger tiles, of `kinora-tiny` about 0.2 and
    0.45, of tokens that attend little but to themselves as few as 0.02 and 0.05.
    """
    return mass / (3 - 2 * mass)


def budgets_by_head(
    weights: torch.Tensor, kept: int, least: int, rows: torch.Tensor
) -> torch.Tensor:
    """Tiles of a row for each head, together as many as `kept` for all: `[B, H]` int64.

    As many as hold the most weight in the mean of the rows, of all ways to share them out: of the
    next best tile of each head, the heaviest is taken until none is left. Equal ones go round.

    Source: budgets of heads by the largest weights among all of them, Ada-KV (arXiv 2407.11550),
    there for keys that are evicted.

    Args:
        weights: `[B, H, Q, K]`, of each row the best first behind the first `least`.
        least: tiles of every head, at most `kept`.
        rows: `[Q]` bool, which of them count.
    """
    batch, heads = weights.shape[:2]
    gains = weights[:, :, rows].mean(2).nan_to_num(0)
    gains[..., :least] = torch.inf
    # By place first, so that a stable sort has the heads take turns at what weighs alike.
    best = gains.mT.flatten(1).argsort(dim=-1, descending=True, stable=True)
    taken = best[:, : heads * kept] % heads
    return torch.zeros(batch, heads, dtype=torch.int64, device=weights.device).scatter_add_(
        1, taken, torch.ones_like(taken)
    )
