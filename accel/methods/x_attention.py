"""`x-attention`: tiles that hold most of the attention that antidiagonals show."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from ...kernels.lists import permuted
from ...kernels.plan import BlockPlan, Tile, tile_lengths, tiles_of
from ..options import option
from ..site import Site
from ..tiles import (
    Layout,
    TileMethod,
    density_beside,
    density_of,
    heaviest,
    kept_of,
    likely_share,
    products,
)

LOGITS_BYTES = 2**27
"""Strided logits of one chunk of tiles of queries, if more than one; two or three such tensors are
alive at a time."""


class XAttention(TileMethod):
    """Each tile of queries keeps the fewest tiles of keys that hold `threshold` of its attention.

    The attention is that of cells of `stride` tokens, in the order of the tiles: the logit of two
    cells is the mean of the logits on the antidiagonal between them, which meets every query and
    every key once. A softmax over cells of keys, summed over the cells of two tiles, is their mass.

    Source: XAttention (arXiv 2503.16428).
    Differs from the authors' code: tokens are ordered before they are cut into cells; tiles that
    are kept anyway count towards the threshold, and no first tile is kept for its own sake; the
    last cell, where it is short, is filled with its own mean and weighs as many tokens as it has,
    and padding weighs nothing; `least` is ours; thresholds are not tuned by head.
    """

    name: ClassVar[str] = "x-attention"
    paper: ClassVar[str] = "arXiv 2503.16428"
    licence: ClassVar[str] = "the repository has no licence file"
    use_when: ClassVar[str] = (
        "attention runs along lines that means of tiles do not show. On `kinora-tiny` it gained "
        "nothing over means, at a higher price."
    )

    threshold: float = option(
        0.9, "Share of a row's estimated attention that the kept tiles hold", least=0, most=1
    )
    stride: Literal["1", "2", "4", "8", "16", "32"] = option(
        "8",
        "Tokens of a cell; choosing costs one part in so many of dense attention's first product",
    )
    least: float = option(
        0.0, "Share of the key tiles that each query tile keeps at the least", least=0, most=1
    )

    def choose(self, q: torch.Tensor, k: torch.Tensor, site: Site, layout: Layout) -> torch.Tensor:
        """See `TileMethod`."""
        mass = antidiagonal_mass(q, k, layout.tile, int(self.stride), layout.places)
        return heaviest(mass, self.threshold, kept_of(self.least, mass.shape[-1]), layout.always)

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        return None if self._everything(site) else super().plan(q, k, site)

    def predict(self, site: Site) -> float:
        """An estimate: what is kept depends on the numbers, see `likely_share`."""
        if self._everything(site):
            return 1.0
        at = self.at(site)
        return max(density_of(self.least, at), density_beside(likely_share(self.threshold), at))

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
    *,
    bytes_at_once: int | None = None,
) -> torch.Tensor:
    """Attention between tiles as cells of `stride` tokens show it, `[B, H, Q, K]` float32 or more.

    Rows sum to the tokens of their tile / `stride`; with stride 1 it is the attention itself.

    Args:
        q, k: `[B, H, L, D]`.
        stride: a divisor of both sizes of a tile.
        order: `[L]` int64 in which tokens are cut into cells and tiles.
        bytes_at_once: of logits; None is `LOGITS_BYTES`.
    """
    rows, columns = (tiles_of(q.shape[2], size) for size in (tile.query, tile.key))
    high, wide = tile.query // stride, tile.key // stride
    # Last to first: products of what stands at the same place are then those of an antidiagonal.
    queries, weights = _cells(q, stride, order, rows * high, backwards=True)
    keys, sizes = _cells(k, stride, order, columns * wide)
    # Minus infinity for padding; less for a short cell.
    sizes = sizes.log()
    scale = q.shape[-1] ** -0.5 / stride
    limit = LOGITS_BYTES if bytes_at_once is None else bytes_at_once
    one = q.shape[0] * q.shape[1] * high * columns * wide * sizes.element_size()
    step = max(1, limit // one)
    chunks: list[torch.Tensor] = []
    for row in range(0, rows, step):
        part = slice(row * high, (row + step) * high)
        logits = products(queries[:, :, part], keys).mul_(scale).add_(sizes)
        tiles = logits.softmax(-1).unflatten(-1, (columns, wide)).sum(-1)
        chunks.append((tiles * weights[part, None]).unflatten(-2, (-1, high)).sum(-2))
    return torch.cat(chunks, -2)


def _cells(
    x: torch.Tensor, stride: int, order: torch.Tensor, count: int, *, backwards: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, H, L, D]` to `[B, H, count, stride * D]`, and the share of its tokens that a cell has.

    A short last cell is filled with the mean of its tokens, so that a vector added to all tokens is
    added to each place; what comes behind it is padding, whose share is 0.
    """
    tokens = x.shape[2]
    x = permuted(x, order)
    start = tokens // stride * stride
    missing = -tokens % stride
    if missing:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = x[:, :, start:].to(wide).mean(2, keepdim=True).to(x.dtype)
        x = torch.cat([x, mean.expand(-1, -1, missing, -1)], 2)
    x = torch.nn.functional.pad(x, (0, 0, 0, count * stride - x.shape[2]))
    cells = x.unflatten(2, (count, stride))
    share = torch.zeros(count, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    lengths = tile_lengths(tokens, stride, x.device)
    share[: len(lengths)] = lengths.to(share.dtype) / stride
    return (cells.flip(3) if backwards else cells).flatten(3), share
