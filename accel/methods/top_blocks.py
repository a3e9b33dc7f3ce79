"""`top-blocks`: tiles of keys whose mean fits a tile of queries best."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ...kernels.lists import pair_means, top_tiles
from ...kernels.plan import BlockPlan, tiles_of
from ..options import option
from ..site import Site
from ..tiles import (
    Layout,
    TileMethod,
    budgets_by_head,
    density_of,
    kept_of,
    longest,
    longest_choice,
)


class TopBlocks(TileMethod):
    """Each tile of queries keeps the tiles of keys whose mean has the largest product with its own.

    Tokens are first ordered so that a tile is a compact piece of the clip. Of each row of tiles,
    per head, the best `keep` are kept; the tile itself and text are always among them, and queries
    of text attend to everything.

    With `budget = "by-head"` the heads of a layer share as many tiles as they would have together:
    each goes to the head where it holds the most attention that is not held yet, as the means of
    tiles show it. So heads that look at few tiles keep few in each row, and the others more. Each
    item of a batch shares its own.

    Source: the selection shared by VSA (arXiv 2505.13389), SLA (2509.24006) and MoBA; budgets by
    head after Ada-KV (2407.11550).
    Differs from them: nothing is trained and there is no coarse branch; `tail = "complement"` adds
    the mean of every tile left out in the same softmax, so that `keep = 1` is dense.
    """

    name: ClassVar[str] = "top-blocks"
    paper: ClassVar[str] = "arXiv 2505.13389, 2509.24006 (the selection only)"
    licence: ClassVar[str] = "FastVideo (VSA) and SLA are Apache-2.0"
    use_when: ClassVar[str] = (
        "choosing must cost next to nothing and the density be known before: it is the simplest "
        "choice by content. Take small tiles; large ones cost videos."
    )

    keep: float = option(0.4, "Share of the key tiles that each query tile keeps", above=0, most=1)
    budget: Literal["equal", "by-head"] = option(
        "equal", "Tiles of a layer: as many for each head, or more for heads that look at more"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        tile, _ = self.tiling()
        columns = tiles_of(site.tokens, tile.key)
        kept = kept_of(self.keep, columns)
        if kept == columns or self.forces_all(site):
            return None
        if self.budget == "by-head":
            return super().plan(q, k, site)
        at = self.at(site)
        layout = self.layout(site, q.device)
        # Float32: in half precision ties would favour the first tiles.
        means = pair_means(q.detach(), k.detach(), tile, layout.places)
        indices, counts = top_tiles(*means, kept, layout.always, width=max(kept, longest(at)))
        return self.listed(indices, counts, site, layout)

    def choose(self, q: torch.Tensor, k: torch.Tensor, site: Site, layout: Layout) -> torch.Tensor:
        """See `TileMethod`; equal budgets have a faster way, see `plan`."""
        means_q, means_k = pair_means(q, k, layout.tile, layout.places)
        scores = means_q @ means_k.mT
        # What is no number counts as the largest; forced tiles come before all.
        largest = torch.finfo(scores.dtype).max
        ranks = scores.nan_to_num(largest, largest, -largest).masked_fill(layout.always, torch.inf)
        best = ranks.argsort(dim=-1, descending=True, stable=True)
        columns = scores.shape[-1]
        kept = kept_of(self.keep, columns)
        budgets = torch.full(scores.shape[:2], kept, device=q.device)
        if self.budget == "by-head":
            weights = (scores * q.shape[-1] ** -0.5).softmax(-1).gather(-1, best)
            least = min(kept, longest_choice(self.at(site)))
            budgets = budgets_by_head(weights, kept, least, ~layout.always.all(-1))
        taken = torch.arange(columns, device=q.device) < budgets[..., None, None]
        return torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best, taken.expand_as(best))

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return density_of(self.keep, self.at(site))

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        if self.forces_all(site):
            return self.why_forced(site)
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        return f"because keep {self.keep:g} is all of {columns} tiles"
