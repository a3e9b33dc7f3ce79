"""`x-attention`: tiles that hold most of the attention that antidiagonals show."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ...kernels.lists import permuted
from ...kernels.plan import BlockPlan, Tile, tile_lengths, tiles_of
from ...kernels.scores import heaviest_tiles, tile_scores
from ..options import option
from ..site import Site
from ..tiles import (
    TileMethod,
    density_beside,
    density_of,
    kept_of,
    likely_share,
)


class XAttention(TileMethod):
    """Each tile of queries keeps the fewest tiles of keys that hold `threshold` of its estimate.

    That is the attention of cells of `stride` tokens, in the order of the tiles: the logit of two
    cells is the mean of the logits on the antidiagonal between them, which meets every query and
    every key once. A softmax over cells of keys, summed over the cells of two tiles, is their mass.

    Source: XAttention (arXiv 2503.16428).
    Differs from the authors' code: tokens are ordered before they are cut into cells; tiles that
    are kept anyway count towards the threshold, and no first tile is kept for its own sake; the
    last cell, where it is short, is filled with its own mean and weighs as many tokens as it has,
    and padding weighs nothing; `least` is ours, and on `kinora-tiny` what keeps the verdict: by the
    threshold alone some rows keep too few; thresholds are not tuned by head.
    """

    name: ClassVar[str] = "x-attention"
    paper: ClassVar[str] = "arXiv 2503.16428"
    licence: ClassVar[str] = "the repository has no licence file"
    use_when: ClassVar[str] = (
        "attention runs along lines that means of tiles do not show. On `kinora-tiny` it gained "
        "nothing over means, at a higher price."
    )

    threshold: float = option(
        0.98, "Share of a row's estimated attention that the kept tiles hold", least=0, most=1
    )
    stride: Literal["1", "2", "4", "8", "16", "32"] = option(
        "8",
        "Tokens of a cell; choosing costs one part in so many of dense attention's first product",
    )
    least: float = option(
        0.5, "Share of the key tiles that each query tile keeps at the least", least=0, most=1
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        return None if self._everything(site) else self.sparse(q, k, site)

    def sparse(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan:
        """The plan, also where it keeps everything."""
        layout = self.layout(site, q.device)
        mass = antidiagonal_mass(
            q.detach(), k.detach(), layout.tile, int(self.stride), layout.places
        )
        columns = mass.shape[-1]
        indices, counts = heaviest_tiles(
            mass.float(), self.threshold, layout.always,
            least=kept_of(self.least, columns), width=columns,
        )  # fmt: skip
        return self.listed(indices, counts, site, layout)

    def predict(self, site: Site) -> float:
        """An estimate: what is kept depends on the numbers, see `likely_share`."""
        if self._everything(site):
            return 1.0
        at = self.at(site)
        return max(density_of(self.least, at), density_beside(likely_share(self.threshold), at))

    def longest(self, computed: float, text: int) -> float:
        """See `AttentionMethod`: lists have room for all tiles, so that no GPU is waited for."""
        del computed, text
        return 1.0

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        if self.forces_all(site):
            return self.why_forced(site)
        if self.threshold == 1:
            return "because only all tiles hold all attention"
        return f"because least {self.least:g} is all of {columns} tiles"

    def _everything(self, site: Site) -> bool:
        """Whether the options keep every tile whatever the numbers."""
        columns = tiles_of(site.tokens, self.tiling()[0].key)
        return (
            self.threshold == 1 or kept_of(self.least, columns) == columns or self.forces_all(site)
        )


def antidiagonal_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    tile: Tile,
    stride: int,
    order: torch.Tensor,
) -> torch.Tensor:
    """Attention between tiles as cells of `stride` tokens show it, `[B, H, Q, K]` float32 or more.

    As logarithms. Rows sum to the tokens of their tile / `stride`; with stride 1 it is the
    attention itself.

    Args:
        q, k: `[B, H, L, D]`.
        stride: a divisor of both sizes of a tile.
        order: `[L]` int64 in which tokens are cut into cells and tiles.
    """
    sizes = tile.query // stride, tile.key // stride
    # Last to first: products of what stands at the same place are then those of an antidiagonal.
    queries, weights = _cells(q, stride, order, backwards=True)
    keys, lengths = _cells(k, stride, order)
    scale = q.shape[-1] ** -0.5 / stride
    return tile_scores(queries, keys, sizes, "log-sum-exp", scale, (weights.log(), lengths.log()))


def _cells(
    x: torch.Tensor, stride: int, order: torch.Tensor, *, backwards: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, H, L, D]` to `[B, H, cells, stride * D]`, and the share of its tokens that a cell has.

    A short last cell is filled with the mean of its tokens, so that a vector added to all tokens is
    added to each place.
    """
    tokens = x.shape[2]
    start = tokens // stride * stride
    if backwards:
        turned = order[:start].view(-1, stride).flip(1).flatten(), order[start:].flip(0)
        order = torch.cat(turned)
    x = permuted(x, order)
    wide = torch.promote_types(x.dtype, torch.float32)
    share = tile_lengths(tokens, stride, x.device).to(wide) / stride
    if start < tokens:
        rest = x[:, :, start:]
        mean = rest.to(wide).mean(2, keepdim=True).to(x.dtype)
        mean = mean.expand(-1, -1, start + stride - tokens, -1)
        x = torch.cat([x[:, :, :start], *((mean, rest) if backwards else (rest, mean))], 2)
    return x.unflatten(2, (-1, stride)).flatten(3), share
