"""Log-linear enrichment as a partition of the keys: its definition, and that `descend` allows it.

A row of queries attends to the tokens of the tiles that it keeps and, at each level, to the mean of
each block that was a candidate and was not kept, which weighs its tokens. No backend does this yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods.hierarchical import Hierarchical, descend
from kinora.accel.site import Site
from kinora.accel.spans import Spans
from kinora.kernels.attention import block_attention, merge
from kinora.kernels.lists import pair_means
from kinora.kernels.plan import BlockPlan, tile_lengths, tiles_of
from kinora.kernels.reference import pool

GRIDS = (TokenGrid(5, 9, 20), TokenGrid(1, 31, 23), TokenGrid(2, 16, 24))
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Pooled:
    """Blocks whose means stand beside the kept tiles of each row.

    Args:
        sizes: tokens of a block, level by level; blocks are numbered through all levels.
        indices: `[B or 1, H or 1, Q, width]` int32; the first `counts` of a row count.
        counts: `[B or 1, H or 1, Q]` int32.
    """

    sizes: tuple[int, ...]
    indices: torch.Tensor
    counts: torch.Tensor

    @property
    def kept(self) -> torch.Tensor:
        return torch.arange(self.indices.shape[-1]) < self.counts[..., None]


@dataclass(frozen=True)
class Made:
    """A plan without a tail, what is pooled beside it, and how it came about."""

    plan: BlockPlan
    pooled: Pooled
    method: Hierarchical
    levels: int


def site(grid: TokenGrid, text: int = 0) -> Site:
    return Site(grid, layer=1, layers=4, step=2, steps=10, text=text)


def tensors(at: Site, dim: int = 8) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, at.tokens, dim, generator=generator, dtype=torch.float64)
    return q, k, v


def made(q: torch.Tensor, k: torch.Tensor, at: Site, method: Hierarchical) -> Made:
    plan = method.plan(q, k, at)
    assert plan is not None
    spans, levels = Spans.of(method.at(at)), method.depth(at)
    means = pair_means(q, k, plan.tile, plan.order)
    found = descend(*means, spans, method.blocks, method.branch, levels)
    masks: list[torch.Tensor] = []
    for level, (indices, counts) in enumerate(found):
        tile = replace(plan.tile, query=plan.tile.query * method.branch**level,
                       key=plan.tile.key * method.branch**level)  # fmt: skip
        masks.append(BlockPlan(indices, counts, tile, at.tokens, at.tokens).mask())
    left: list[torch.Tensor] = []
    for level, kept in enumerate(masks):
        candidates = torch.ones_like(kept)
        if level + 1 < levels:
            above = masks[level + 1].repeat_interleave(method.branch, 2)
            above = above.repeat_interleave(method.branch, 3)
            candidates = above[:, :, : kept.shape[2], : kept.shape[3]]
            assert (kept <= candidates).all()
        rows = (candidates & ~kept).repeat_interleave(method.branch**level, 2)
        left.append(rows[:, :, : plan.rows])
    mask = torch.cat(left, dim=3)
    mask[plan.counts == plan.columns] = False  # rows of text
    counts = mask.sum(-1, dtype=torch.int32)
    indices = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    sizes = tuple(plan.tile.key * method.branch**level for level in range(levels))
    lists = indices[..., : max(1, int(counts.max()))].to(torch.int32)
    return Made(replace(plan, tail="none"), Pooled(sizes, lists, counts), method, levels)


def means_of(x: torch.Tensor, pooled: Pooled) -> torch.Tensor:
    """Of all blocks of all levels, `[B, H, blocks, D]`."""
    return torch.cat([pool(x, size) for size in pooled.sizes], dim=2)


def lengths_of(tokens: int, pooled: Pooled) -> torch.Tensor:
    return torch.cat([tile_lengths(tokens, size) for size in pooled.sizes])


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, it: Made) -> list[torch.Tensor]:
    """Output and log-sum-exp; every logit of tokens and of blocks is written down."""
    plan, pooled = it.plan, it.pooled
    assert plan.order is not None
    q, k, v = (x[:, :, plan.order] for x in (q, k, v))
    scale, row = q.shape[-1] ** -0.5, torch.arange(plan.queries) // plan.tile.query
    kept = plan.mask().repeat_interleave(plan.tile.key, 3)[..., : plan.keys]
    lengths = lengths_of(plan.keys, pooled)
    stands = torch.zeros(*pooled.indices.shape[:3], len(lengths) + 1, dtype=torch.bool)
    places = torch.where(pooled.kept, pooled.indices, len(lengths)).long()
    stands = stands.scatter_(-1, places, True)[..., :-1]
    tokens = (q @ k.mT * scale).masked_fill(~kept[:, :, row], -torch.inf)
    blocks = q @ means_of(k, pooled).mT * scale + lengths.double().log()
    logits = torch.cat([tokens, blocks.masked_fill(~stands[:, :, row], -torch.inf)], dim=-1)
    out = logits.softmax(-1) @ torch.cat([v, means_of(v, pooled)], dim=2)
    back = plan.order.argsort()
    return [out[:, :, back], logits.logsumexp(-1)[:, :, back]]


def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, it: Made) -> list[torch.Tensor]:
    """The same without a logit for each pair: each row's blocks are its own few keys."""
    plan, pooled = it.plan, it.pooled
    assert plan.order is not None
    exact = block_attention(q, k, v, plan)
    q, k, v = (x[:, :, plan.order] for x in (q, k, v))
    missing = plan.rows * plan.tile.query - plan.queries
    rows = torch.nn.functional.pad(q, (0, 0, 0, missing)).unflatten(2, (plan.rows, -1))
    places = pooled.indices.long().flatten(2)[..., None].expand(-1, -1, -1, q.shape[-1])
    keys, values = (
        means_of(x, pooled).gather(2, places).unflatten(2, pooled.indices.shape[2:]) for x in (k, v)
    )
    weights = lengths_of(plan.keys, pooled).double().log()[pooled.indices.long()]
    weights = weights.masked_fill(~pooled.kept, -torch.inf)
    logits = rows @ keys.mT * q.shape[-1] ** -0.5 + weights[..., None, :]
    # A row without any has no log-sum-exp, whose gradient would be NaN.
    empty = (pooled.counts == 0)[..., None, None]
    logits = logits.masked_fill(empty, 0)
    out, lse = (
        logits.softmax(-1) @ values,
        logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf),
    )
    back = plan.order.argsort()
    part = out.flatten(2, 3)[:, :, back], lse.flatten(2, 3)[:, :, back]
    return [*merge(exact, part)]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [0, 70])
@pytest.mark.parametrize(("blocks", "branch"), [(2, 2), (1, 3), (3, 2)])
def test_each_key_counts_once(grid: TokenGrid, text: int, blocks: int, branch: int):
    at = site(grid, text)
    q, k, _ = (x[:1, :1] for x in tensors(at))
    it = made(q, k, at, Hierarchical(blocks=blocks, branch=branch, tile="64x64"))
    assert it.levels > 1
    weights = lengths_of(at.tokens, it.pooled)[it.pooled.indices.long()]
    exact = it.plan.mask().long() @ tile_lengths(at.tokens, 64)
    assert ((weights * it.pooled.kept).sum(-1) + exact == at.tokens).all()
    once = torch.eye(at.tokens, dtype=torch.float64).expand(1, 1, -1, -1)
    out, lse = definition(torch.zeros_like(once), once, once, it)
    torch.testing.assert_close(out * at.tokens, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(at.tokens)))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [0, 70])
def test_lists_of_blocks_are_as_good_as_all_logits(grid: TokenGrid, text: int):
    at = site(grid, text)
    it = made(*tensors(at)[:2], at, Hierarchical(blocks=2, branch=2, tile="128x64"))
    for a, b in zip(gathered(*tensors(at), it), definition(*tensors(at), it), strict=True):
        torch.testing.assert_close(a, b)


def test_on_one_level_it_is_the_tail():
    at = site(GRIDS[0], 70)
    it = made(*tensors(at)[:2], at, Hierarchical(blocks=3, levels=1, tile="64x64"))
    tail = block_attention(*tensors(at), replace(it.plan, tail="complement"))
    for a, b in zip(definition(*tensors(at), it), tail, strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_of_equal_keys_are_attended_to_exactly():
    """Where the tokens of each block of the top level are alike."""
    at = site(GRIDS[0])
    q, k, v = tensors(at)
    it = made(q, k, at, Hierarchical(blocks=2, branch=2, tile="64x64"))
    assert it.plan.order is not None and it.levels > 2
    first = torch.arange(at.tokens) // it.pooled.sizes[-1] * it.pooled.sizes[-1]
    for x in (k, v):
        x[:, :, it.plan.order] = x[:, :, it.plan.order[first]]
    torch.testing.assert_close(definition(q, k, v, it)[0], dense(q, k, v))


def test_gradients_pass_tokens_and_means():
    at = site(TokenGrid(3, 5, 23), 2)
    q, k, v = (x[:1, :1, :, :2] for x in tensors(at))
    it = made(q, k, at, Hierarchical(blocks=1, branch=2, tile="64x64"))
    assert it.levels > 1
    weights = [x.cos() for x in definition(q, k, v, it)]
    found: list[tuple[torch.Tensor, ...]] = []
    for how in (definition, gathered):
        given = tuple(x.clone().requires_grad_() for x in (q, k, v))
        total = torch.stack(
            [
                (x * w).sum()
                for x, w in zip(how(given[0], given[1], given[2], it), weights, strict=True)
            ]
        ).sum()
        found.append(torch.autograd.grad(total, given))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    # A key that no row keeps as such has a gradient through its block's mean.
    assert (found[0][1] != 0).any(-1).all()


def test_a_row_has_few_of_them_whatever_the_length():
    for frames, side in ((4, 32), (8, 48), (8, 64)):
        at = site(TokenGrid(frames, side, side))
        q, k, _ = (x[:1, :1] for x in tensors(at, dim=2))
        it = made(q, k, at, Hierarchical(blocks=2, branch=2, tile="64x64"))
        assert tiles_of(at.tokens, 64) > 2 * 2 and it.levels >= 5
        # Of 2 x 2 candidates 2 are left out, of one more forced own block a pair more.
        assert int(it.pooled.counts.max()) <= 2 * it.levels
