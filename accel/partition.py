"""Clips cut into blocks of frames, height and width, and which of them each query takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from .grid import TokenGrid
from .order import gilbert
from .tiles import kept_of

Rule = Literal["top", "similarity", "softmax"]
Scope = Literal["query", "head", "global"]

CHUNK = 2**24
"""Pairs of a query and a block that are chosen among at a time, where heads choose apart."""
DIGIT = 62
"""Blocks whose choice is one whole number."""


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """A grid's tokens in blocks, C of them; text beside the picture is of none.

    Attributes:
        blocks: along frames, height and width.
        owner: `[N]` int64, the block of each token of the picture in raster order.
        places: `[N]` int64, the token at each place: block by block, in each along a Hilbert curve.
        sizes: `[C]` int64, tokens of each block; none is empty.
    """

    blocks: TokenGrid
    owner: torch.Tensor
    places: torch.Tensor
    sizes: torch.Tensor


def blocks_of(grid: TokenGrid, parts: TokenGrid) -> TokenGrid:
    """How many blocks `parts` makes of a grid: no more along an axis than it has tokens."""
    return TokenGrid(
        min(grid.frames, parts.frames),
        min(grid.height, parts.height),
        min(grid.width, parts.width),
    )


@lru_cache(maxsize=32)
def partition(grid: TokenGrid, parts: TokenGrid) -> Partition:
    """The grid in `parts`, on the CPU. Sides that a number of parts does not divide differ by 1."""
    # Kept for later runs, which may not be in inference mode.
    with torch.inference_mode(False):
        blocks = blocks_of(grid, parts)
        frame, row, column = (
            torch.arange(size) * count // size
            for size, count in (
                (grid.frames, blocks.frames),
                (grid.height, blocks.height),
                (grid.width, blocks.width),
            )
        )
        owner = (frame[:, None, None] * blocks.height + row[:, None]) * blocks.width + column
        owner = owner.flatten()
        curve = gilbert(grid).places
        places = curve[owner[curve].argsort(stable=True)]
        return Partition(blocks, owner, places, owner.bincount(minlength=blocks.tokens))


@lru_cache(maxsize=64)
def own_share(grid: TokenGrid, parts: TokenGrid) -> float:
    """Share of the pairs of tokens that are in one block; asked often."""
    sizes = partition(grid, parts).sizes
    return int(sizes.square().sum()) / grid.tokens**2


def block_scores(
    q: torch.Tensor, k: torch.Tensor, owner: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Product of each query with the mean of each block's keys, `[B, H, N, C]` float32.

    Keys are taken less the mean of all: that adds the same to all scores of a query, so it changes
    nothing within one, and what it adds would only say which queries point along the mean.

    Args:
        q, k: `[B, H, N, D]`, of the picture alone.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    blocks = torch.arange(len(sizes), device=q.device)[:, None] == owner
    # A product, since adding by index comes out differently from run to run on a GPU.
    sums = blocks.to(dtype) @ k.to(dtype)
    means = sums / sizes[:, None].to(dtype) - sums.sum(-2, keepdim=True) / len(owner)
    return (q.to(dtype) @ means.mT).float()


def chosen_blocks(
    scores: torch.Tensor,
    owner: torch.Tensor,
    sizes: torch.Tensor,
    *,
    rule: Rule,
    scope: Scope,
    share: float,
    scale: float,
) -> torch.Tensor:
    """The blocks that each query takes, `[B, H, N, C]` bool; its own is always one.

    Pairs of a query and a block are taken from a pool: of one query, of all queries of a head, or
    of all heads. Pairs of queries with their own blocks come first and count; then the heaviest, of
    equal ones the first, until there are enough. By `top` every pair counts 1 and the pool takes
    `share` of the blocks for each of its queries, rounded up to whole blocks. By `similarity` a
    pair weighs its score, moved and scaled so that those of the pool go from 0 to 1, by `softmax`
    its part of the softmax of its query, a block of n keys counting as n of its mean; the pool
    takes the fewest pairs that hold `share` of all its weight. A share of 1 is everything, by every
    rule.

    Args:
        scores: `[B, H, N, C]` float32; what is no number counts as the largest.
        scale: of logits, for `softmax`.
    """
    if share == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    queries, count = scores.shape[2:]
    largest = torch.finfo(torch.float32).max
    scores = scores.nan_to_num(largest, largest, -largest)
    if rule == "softmax":
        scores = (scores * scale + sizes.to(scores.dtype).log()).softmax(-1)
    pools = {"query": (-1, count), "head": (-1, queries * count), "global": (len(scores), -1)}
    weights = scores.reshape(pools[scope])
    own = torch.arange(count, device=scores.device) == owner[:, None]
    own = own.expand_as(scores).reshape(weights.shape)
    if rule == "similarity":
        low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
        # Halved, so that the largest numbers have a difference.
        span = high / 2 - low / 2
        weights = ((weights / 2 - low / 2) / span).masked_fill(span == 0, 1)
    if rule == "top":
        others = kept_of(share, count) - 1
        if scope == "query":
            return (own | _most(weights, own, others)).view(scores.shape)
        target = others * own.sum(-1, keepdim=True)
    else:
        held = torch.where(own, weights, 0).sum(-1, keepdim=True)
        target = share * weights.sum(-1, keepdim=True) - held
    return (own | _heaviest(weights, own, target, counts=rule == "top")).view(scores.shape)


def _most(weights: torch.Tensor, own: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` heaviest of each pool, of equal ones the first; see `_heaviest`.

    For many small pools, which need not be read 32 times.
    """
    if count == 0:
        return torch.zeros_like(own)
    ranks = _ranks(weights, own)
    lightest = ranks.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, tied = ranks > lightest, ranks == lightest
    missing = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= missing))


def _heaviest(
    weights: torch.Tensor, own: torch.Tensor, target: torch.Tensor, *, counts: bool
) -> torch.Tensor:
    """The fewest of each pool that reach its target, the heaviest first, `[pools, M]` bool.

    No sort: 32 readings find the bits of the lightest that is taken, for one pool or for many.

    Args:
        weights: `[pools, M]` float32.
        own: `[pools, M]` bool, which are not taken.
        target: `[pools, 1]`, of how many or, without `counts`, of their weights together.
    """

    def together(mask: torch.Tensor) -> torch.Tensor:
        return (mask if counts else torch.where(mask, weights, 0)).sum(-1, keepdim=True)

    ranks = _ranks(weights, own)
    lightest = torch.full_like(target, -(2**31), dtype=torch.int64)
    for bit in range(31, -1, -1):
        higher = lightest + 2**bit
        reached = together(ranks >= higher.to(torch.int32)) >= target
        lightest = torch.where(reached, higher, lightest)
    lightest = lightest.to(torch.int32)
    above, tied = ranks > lightest, ranks == lightest
    before = tied.cumsum(-1, dtype=torch.int32) - 1
    missing = target - together(above)
    taken = above | (tied & ((before if counts else before * weights) < missing))
    return taken & ~own & (target > 0)


def _ranks(weights: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of the weights, int32; the least where a query's own block is."""
    # Bits of floats are in the floats' order, but for the sign; -0 is made 0.
    ranks = (weights + 0.0).view(torch.int32)
    ranks.bitwise_xor_((ranks >> 31).bitwise_and_(0x7FFFFFFF))
    return ranks.masked_fill_(own, -(2**31))


def by_choice(chosen: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Queries of each head side by side with those that have chosen alike, `[B, H, N]` int64.

    Sorted by whether they have chosen the first block, then the second and so on, so that a tile of
    queries has chosen little more than each of them; equal ones stay in their order.

    Args:
        chosen: `[B, H, N, C]` bool.
        places: `[N]` int64, queries in the order that equal ones keep.
    """
    ranked = chosen[:, :, places]
    order = torch.arange(len(places), device=places.device).expand(ranked.shape[:3])
    # The least of its digits first; a stable sort keeps what was sorted before.
    for digit in reversed(ranked.split(DIGIT, dim=-1)):
        value = torch.zeros_like(order)
        for bit in digit.unbind(-1):
            value = value * 2 + bit
        best = value.gather(2, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(2, best)
    return places[order]
