"""`threshold-blocks`: tiles of keys whose mean scores above a threshold of its row."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from ...kernels.lists import above_tiles, mass_tiles, pair_means, permuted
from ...kernels.plan import BlockPlan, tile_lengths, tiles_of
from ...kernels.ranking import above, by_mass
from ...kernels.reference import pool
from ..options import option
from ..site import Site
from ..tiles import (
    Layout,
    TileMethod,
    density_beside,
    density_of,
    kept_of,
    likely_share,
)


class ThresholdBlocks(TileMethod):
    """Each tile of queries keeps the tiles of keys that score above a threshold of its own row.

    The score of two tiles is the product of their means. `rule = "sigma"` keeps scores above mean +
    `beta` x standard deviation of the row, without a sort: of scores like a bell curve the share
    1 - Phi(beta). `rule = "top"` keeps the best `keep` of the tiles and, where these hold less than
    `mass` of the row's softmax, as many more as do; a tile weighs exp(scale x score) x its tokens.
    `similar` above 0 keeps a tile of queries or of keys whole, a row or a column, where its tokens
    point in directions so different that their mean says little of them.

    Source: Sol-Attn (arXiv 2607.24027) for `sigma`, SpargeAttention2 (2602.13515) for `top`,
    SpargeAttn (2502.18137) for `similar` and, with `keep = 0`, for `mass`.
    Differs from the papers: the deviation is that of the scores, not estimated channel by channel;
    the tile that crosses `mass` is kept, and tiles that are kept anyway count towards it; tiles
    that are kept whole stay in the softmax, so that a larger `similar` only keeps more; nothing is
    trained or tuned by head; in tiles that are kept every product with values is made, which
    SpargeAttn leaves out where weights are small; Sol-Attn's tail of means is there only with
    `tail = "complement"`.
    """

    name: ClassVar[str] = "threshold-blocks"
    paper: ClassVar[str] = "arXiv 2607.24027, 2602.13515, 2502.18137"
    licence: ClassVar[str] = (
        "Sol-Attn and SpargeAttn are Apache-2.0; SpargeAttention2 was read in the paper alone"
    )
    use_when: ClassVar[str] = (
        "rows differ in how many tiles they need and choosing must stay cheap: `sigma` needs no "
        "sort. The density is known only after a run."
    )

    rule: Literal["sigma", "top"] = option(
        "sigma", "Threshold of a row: mean and deviation of its scores, or its best tiles"
    )
    beta: float = option(
        0.0,
        "Of rule sigma: deviations above the mean from which a tile is kept",
        least=-4,
        most=4,
        unit="standard deviations",
    )
    keep: float = option(
        0.5, "Of rule top: share of the key tiles that is kept at the least", least=0, most=1
    )
    mass: float = option(
        0.5, "Of rule top: share of a row's softmax that the kept tiles hold", least=0, most=1
    )
    similar: float = option(
        0.0,
        "Self-similarity, 0 to 1, below which a tile of queries or keys is kept whole; 0 is off",
        least=0,
        most=1,
    )

    def choose(self, q: torch.Tensor, k: torch.Tensor, site: Site, layout: Layout) -> torch.Tensor:
        """See `TileMethod`."""
        tile = layout.tile
        means_q, means_k = pair_means(q, k, tile, layout.places)
        lengths = tile_lengths(site.tokens, tile.key, q.device).to(means_k.dtype)
        # Subtracting it changes no softmax and no deviation, only rounding, of keys far from 0.
        mean = (means_k * (lengths / site.tokens)[:, None]).sum(-2, keepdim=True)
        scores = means_q @ (means_k - mean).mT
        if self.rule == "sigma":
            chosen = above(scores, self.beta)
        else:
            logits = scores * q.shape[-1] ** -0.5 + lengths.log()
            # Over the whole row, so that one score that is no number makes it all none.
            powers = logits.log_softmax(-1) * math.log2(math.e)
            columns = len(lengths)
            least = kept_of(self.keep, columns)
            chosen = by_mass(powers, self.mass, layout.always, least, columns)
        if self.similar > 0:
            rows = similarity(q, tile.query, layout.places) < self.similar
            columns = similarity(k, tile.key, layout.places, mean) < self.similar
            chosen = chosen | rows[..., :, None] | columns[..., None, :]
        return chosen

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        if self._everything(site):
            return None
        if self.similar > 0:
            return super().plan(q, k, site)
        layout = self.layout(site, q.device)
        tile, columns = layout.tile, tiles_of(site.tokens, layout.tile.key)
        means = pair_means(q.detach(), k.detach(), tile, layout.places)
        if self.rule == "sigma":
            return self.listed(*above_tiles(*means, self.beta, layout.always), site, layout)
        indices, counts = mass_tiles(
            *means,
            self.mass,
            q.shape[-1] ** -0.5,
            layout.always,
            least=kept_of(self.keep, columns),
            last=(site.tokens - (columns - 1) * tile.key) / tile.key,
            width=columns,
        )
        return self.listed(indices, counts, site, layout)

    def predict(self, site: Site) -> float:
        """An estimate: what is kept depends on the numbers.

        Rule sigma takes scores to be like a bell curve: within 0.03 of what was measured on random
        tokens and on smooth fields, up to two and a half times too much where few tiles stand out.
        Rule top guesses, see `likely_share`. Both take all tiles to be `similar` enough.
        """
        if self._everything(site):
            return 1.0
        at = self.at(site)
        if self.rule == "sigma":
            return density_beside(math.erfc(self.beta / math.sqrt(2)) / 2, at)
        return max(density_of(self.keep, at), density_beside(likely_share(self.mass), at))

    def longest(self, computed: float, text: int) -> float:
        """See `AttentionMethod`: lists have room for all tiles, so that no GPU is waited for."""
        del computed, text
        return 1.0

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        if self.forces_all(site):
            return self.why_forced(site)
        if self.rule == "sigma":
            return f"because of {columns} tiles none is {-self.beta:g} deviations below the mean"
        if self.mass == 1:
            return "because only all tiles hold the mass 1"
        return f"because keep {self.keep:g} is all of {columns} tiles"

    def _everything(self, site: Site) -> bool:
        """Whether the options keep every tile whatever the numbers."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        if self.forces_all(site):
            return True
        if self.rule == "sigma":
            # Of n numbers none is more than sqrt(n - 1) deviations away from their mean.
            return self.beta < -math.sqrt(columns - 1)
        return self.mass == 1 or kept_of(self.keep, columns) == columns


def similarity(
    x: torch.Tensor, size: int, order: torch.Tensor, centre: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cosine between all pairs of tokens of a tile, `[B, H, L, D]` to `[B, H, tiles]` float32.

    It is the squared length of the mean of the tokens at length 1, hence from 0 to 1; about 1 / n
    for n tokens at random, 1 for parallel ones. Tokens of length 0 count as unlike all.

    Args:
        order: `[L]` int64 in which tokens are cut into tiles of `size`; the last may be ragged.
        centre: `[B, H, 1, D]`, subtracted from each token.
    """
    tiles: list[torch.Tensor] = []
    for head in range(x.shape[1]):  # one after the other: they are copied in float32
        at = slice(head, head + 1)
        tokens = permuted(x[:, at], order).float()
        if centre is not None:
            tokens = tokens - centre[:, at]
        mean = pool(torch.nn.functional.normalize(tokens, dim=-1), size)
        tiles.append(mean.square().sum(-1))
    return torch.cat(tiles, 1)
