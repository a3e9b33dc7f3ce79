"""`hierarchical`: tiles of keys found from the top of a pyramid of blocks down."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from ...kernels.lists import pair_means
from ...kernels.plan import BlockPlan, tile_lengths, tiles_of
from ..options import option
from ..site import Site
from ..spans import At, Spans
from ..tiles import TileMethod, tile_of, token_order

GATHERED_BYTES = 2**26
"""Means of keys that are gathered at a time to be scored, if more than those of one block."""


class Hierarchical(TileMethod):
    """Each tile of queries keeps the best of the tiles below the best blocks of a level up.

    Tiles are the first level of a pyramid: `branch` blocks that follow each other in the order of
    the tokens are one of the next level, and stand for the mean of their queries and of their keys.
    At the top each block of queries scores all blocks of keys, by the product of means, and keeps
    the best `blocks`; at each level below it scores only the children of what its parent kept. So
    choosing takes a time that grows as the number of tokens does. A block with the row's own tokens
    or with text is always among those kept, and queries of text attend to everything.

    With `tail = "complement"` each tile left out is one more key and value, its mean, in the same
    softmax: together with the tokens of the tiles kept a partition of all keys.

    Source: LLSA, log-linear sparse attention (arXiv 2512.16615), without its training.
    Differs from the paper: the first level is tiles of 64 or 128 keys, not blocks of 16, which
    would leave the units of a GPU half empty, and `blocks` and `branch` are 72 and 8, not 8 and 16;
    there are as many levels as leave something to choose, not two; clips and text beside images.
    The paper enriches the keys with the candidates of all levels, those it keeps included, so that
    a token is counted once a level or more; here each is counted once. What is left out stands
    there as tiles whatever its level: nearer to dense attention than means of larger blocks, but
    for each query one key a tile, whose number grows with the tokens.
    Differs from the authors' code: it takes powers of two only, and where the top level has fewer
    blocks than it reads at a time forgets them in the forward pass, not in the backward pass.
    """

    name: ClassVar[str] = "hierarchical"
    paper: ClassVar[str] = "arXiv 2512.16615"
    licence: ClassVar[str] = "the repository's is S-Lab License 1.0, which is non-commercial"
    use_when: ClassVar[str] = (
        "there are so many tokens, from about 100,000 on, that scoring all pairs of tiles takes a "
        "share of the time; below that `top-blocks` chooses at least as well."
    )

    blocks: int = option(
        72,
        "Blocks that are kept of each row at every level, at the last one tiles of keys",
        least=1,
        most=4096,
        unit="blocks",
    )
    branch: int = option(
        8, "Blocks of a level that make one of the level above", least=2, most=64, unit="blocks"
    )
    levels: int = option(
        16,
        "Levels at the most; fewer where no more than blocks × branch are left, 1 scores all tiles",
        least=1,
        most=16,
        unit="levels",
    )
    tail: Literal["none", "complement"] = option(
        "complement", "What stands for the tiles that are left out: nothing, or their means"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        spans = Spans.of(self.at(site))
        if self._keeps_all(spans):
            return None
        tile, tail = self.tiling()
        places = places_on(q.device, self.at(site))
        # Float32: in half precision ties would favour the first blocks.
        means = pair_means(q.detach(), k.detach(), tile, places)
        found = descend(*means, spans, self.blocks, self.branch, self.depth(site))
        indices, counts = found[0]
        rows, columns = spans.whole_rows(), means[1].shape[2]
        if rows:
            # Lists are all as wide as the widest.
            indices = torch.nn.functional.pad(indices, (0, columns - indices.shape[3]))
            everything = torch.arange(columns, dtype=torch.int32, device=q.device)
            indices[:, :, rows.start : rows.stop] = everything
            counts[:, :, rows.start : rows.stop] = columns
        return BlockPlan(
            indices=indices,
            counts=counts,
            tile=tile,
            queries=site.tokens,
            keys=site.tokens,
            tail=tail,
            order=places,
        )

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        spans = Spans.of(self.at(site))
        return 1.0 if self._keeps_all(spans) else spans.density(self.blocks)

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        columns = tiles_of(site.tokens, tile_of(self.tile).key)
        if self.forces_all(site):
            return self.why_forced(site)
        return f"because blocks {self.blocks} is all of {columns} tiles"

    def depth(self, site: Site) -> int:
        """Levels of the pyramid there."""
        columns, levels = tiles_of(site.tokens, tile_of(self.tile).key), 1
        while columns > self.blocks * self.branch and levels < self.levels:
            columns, levels = tiles_of(columns, self.branch), levels + 1
        return levels

    def _keeps_all(self, spans: Spans) -> bool:
        """Whether everything is kept, whatever the numbers."""
        return self.blocks >= tiles_of(spans.tokens, spans.tile.key) or spans.forces_all()


@lru_cache(maxsize=64)
def places_on(device: torch.device, at: At) -> torch.Tensor:
    """Of an order on a device, copied there once; a layout would bring a mask of all tiles."""
    with torch.inference_mode(False):
        return token_order(*at[1:]).on(device)


def descend(
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    spans: Spans,
    blocks: int,
    branch: int,
    levels: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The blocks that each row keeps at each level, found from the top of the pyramid down.

    No tensor has an entry for each pair of tiles, unless there is but one level. Of equal scores
    the first blocks are kept; a score that is not a number counts as the largest.

    Args:
        means_q, means_k: `[B, H, Q, D]` and `[B, H, K, D]` float32, of the tiles of `spans`.
        blocks: how many are kept of each row at each level, if no more are forced.

    Returns:
        Of each level, tiles first: indices `[B, H, Q, width]` int32, ascending, zeros behind what
        counts, and counts `[B, H, Q]` int32, as a `BlockPlan` takes them. Q are the rows of that
        level.
    """
    pyramid = [(means_q, means_k, spans)]
    for _ in range(levels - 1):
        pyramid.append(_above(*pyramid[-1], branch))
    # Above the top there is one block, whose children all blocks of the top are.
    indices = torch.zeros(*means_q.shape[:2], 1, 1, dtype=torch.int64, device=means_q.device)
    counts = torch.ones_like(indices[..., 0])
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for queries, keys, level in reversed(pyramid):
        sizes = (branch, branch) if found else (queries.shape[2], keys.shape[2])
        indices, counts = _best_children(queries, keys, level, indices, counts, sizes, blocks)
        found.append((indices.to(torch.int32), counts.to(torch.int32)))
    return found[::-1]


def _above(
    means_q: torch.Tensor, means_k: torch.Tensor, spans: Spans, branch: int
) -> tuple[torch.Tensor, torch.Tensor, Spans]:
    """The next level: means over the tokens of `branch` blocks."""
    sizes = (spans.tile.query, spans.tile.key)
    q, k = (
        _pooled(x, spans.tokens, size, branch)
        for x, size in zip((means_q, means_k), sizes, strict=True)
    )
    return q, k, spans.above(branch)


def _pooled(means: torch.Tensor, tokens: int, size: int, branch: int) -> torch.Tensor:
    """Means of blocks of `size` tokens to those of `branch` such blocks."""
    # The last block, where it is short, weighs the tokens that it has.
    lengths = tile_lengths(tokens, size, means.device)[:, None].to(means.dtype)
    sums = _families(means * lengths, branch).sum(-2)
    return sums / tile_lengths(tokens, size * branch, means.device)[:, None].to(means.dtype)


def _families(x: torch.Tensor, size: int) -> torch.Tensor:
    """`[B, H, blocks, D]` to `[B, H, parents, size, D]`; zeros where the last has fewer."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _best_children(
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    spans: Spans,
    parents: torch.Tensor,
    counts: torch.Tensor,
    sizes: tuple[int, int],
    blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the best blocks among the children of those that its parent keeps.

    Args:
        means_q, means_k: of the blocks of this level.
        parents, counts: what the parents of the rows keep, `[B, H, P, width]`, `[B, H, P]` int64.
        sizes: children of a parent, queries and keys.
    """
    (batch, heads, rows, dim), columns = means_q.shape, means_k.shape[2]
    queries = _families(means_q, sizes[0]).flatten(0, 2)
    keys = _families(means_k, sizes[1])
    # Row of a family of keys among those of all heads.
    head = torch.arange(batch * heads, device=parents.device).view(batch, heads, 1, 1)
    families = (parents + head * keys.shape[2]).flatten(0, 2)
    keys = keys.flatten(0, 2).flatten(1)
    child = torch.arange(sizes[1], device=parents.device)
    candidates = parents[..., None] * sizes[1] + child
    slot = torch.arange(parents.shape[3], device=parents.device)
    valid = (slot < counts[..., None])[..., None] & (candidates < columns)
    candidates = candidates.masked_fill(~valid, columns).flatten(3).flatten(0, 2)
    row = torch.arange(queries.shape[0], device=parents.device) % parents.shape[2]
    row = row[:, None] * sizes[0] + torch.arange(sizes[0], device=parents.device)
    width = min(max(blocks, spans.longest()), columns)
    one = families.shape[1] * keys.shape[1] * keys.element_size()
    found = [
        _best(
            q @ keys.index_select(0, family.flatten()).view(len(q), -1, dim).mT,
            ids[:, None],
            spans.holds(some[..., None], ids[:, None]),
            columns,
            blocks,
            width,
        )
        for q, family, ids, some in _chunks(
            max(1, GATHERED_BYTES // one), queries, families, candidates, row
        )
    ]
    indices, kept = (torch.cat(it) for it in zip(*found, strict=True))
    # The last parent may have fewer rows than the others.
    return (
        indices.view(batch, heads, -1, width)[:, :, :rows].contiguous(),
        kept.view(batch, heads, -1)[:, :, :rows].contiguous(),
    )


def _best(
    logits: torch.Tensor,
    candidates: torch.Tensor,
    forced: torch.Tensor,
    columns: int,
    blocks: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best candidates of each row, ascending, and how many.

    Args:
        logits: `[N, rows, candidates]`.
        candidates: `[N, 1, candidates]` ascending; `columns` where there is none.
        forced: like logits; these are kept, and more than `blocks` only of them.
    """
    largest = torch.finfo(logits.dtype).max
    none = candidates == columns
    ranks = logits.nan_to_num(nan=largest, posinf=largest, neginf=-largest)
    ranks = ranks.masked_fill(forced, torch.inf).masked_fill(none, -torch.inf)
    best = ranks.argsort(dim=-1, descending=True, stable=True)[..., :width]
    slot = torch.arange(best.shape[-1], device=best.device)
    ids = candidates.expand_as(ranks).gather(-1, best)
    kept = ((slot < blocks) | forced.gather(-1, best)) & (ids < columns)
    counts = kept.sum(-1)
    ids = ids.masked_fill(~kept, columns).sort(dim=-1).values
    return ids.masked_fill(slot >= counts[..., None], 0), counts


def _chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """`size` of the first dimension of each at a time."""
    return zip(*(x.split(size) for x in tensors), strict=True)
