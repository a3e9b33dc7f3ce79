"""`top-blocks`: tiles of keys whose mean fits a tile of queries best."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...kernels.lists import pair_means, top_tiles
from ...kernels.plan import BlockPlan, tiles_of
from ..options import option
from ..site import Site
from ..tiles import TileMethod, density_of, kept_of, longest


class TopBlocks(TileMethod):
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
    licence: ClassVar[str] = "FastVideo (VSA) and SLA are Apache-2.0"
    use_when: ClassVar[str] = (
        "choosing must cost next to nothing and the density be known before: it is the simplest "
        "choice by content. Take small tiles; large ones cost videos."
    )

    keep: float = option(0.25, "Share of the key tiles that each query tile keeps", above=0, most=1)

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        tokens, (tile, tail) = site.tokens, self.tiling()
        columns = tiles_of(tokens, tile.key)
        kept = kept_of(self.keep, columns)
        if kept == columns:
            return None
        at = self.at(site)
        layout = self.layout(site, q.device)
        # Float32: in half precision ties would favour the first tiles.
        means = pair_means(q.detach(), k.detach(), tile, layout.places)
        indices, counts = top_tiles(*means, kept, layout.always, width=max(kept, longest(*at)))
        return BlockPlan(
            indices=indices,
            counts=counts,
            tile=tile,
            queries=tokens,
            keys=tokens,
            tail=tail,
            order=layout.places,
        )

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return density_of(self.keep, *self.at(site))

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        return f"because {self.keep:g} of {columns} tiles is all"
