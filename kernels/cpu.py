"""Block attention on a CPU: kept tiles are gathered, then torch's flash attention runs over them.

Each query tile becomes an entry of a batch, with its kept key tiles side by side as its keys. Rows
with about as many tiles share a call, so that little is padded; a call's gathered keys stay small
enough for the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import bits
from .plan import BlockPlan, Tail, tile_lengths
from .precision import INPUT, Precision
from .problem import Problem
from .reference import pool, rounded

GATHERED_BYTES = 2**25
"""Keys and values gathered for one call; less is all calls, more falls out of the caches."""

_EFFICIENCIES: dict[tuple[int, Tail], tuple[tuple[int, float], ...]] = {
    (256, "none"): ((8192, 0.75), (2048, 0.6), (512, 0.2), (0, 0.1)),
    (256, "complement"): ((8192, 0.6), (2048, 0.5), (512, 0.18), (0, 0.1)),
    (128, "none"): ((8192, 0.6), (2048, 0.55), (512, 0.2), (0, 0.1)),
    (128, "complement"): ((8192, 0.42), (2048, 0.28), (512, 0.17), (0, 0.1)),
    (0, "none"): ((8192, 0.42), (2048, 0.26), (512, 0.13), (0, 0.1)),
    (0, "complement"): ((8192, 0.2), (2048, 0.17), (512, 0.11), (0, 0.05)),
}
"""Density x dense time / own time from so many tokens on; by how many queries share a tile at
least, and by tail.

The lower ones of those measured beside torch's dense attention on two cores with AVX-512: 4 heads
of 64, density 1/4, planning included, 576, 2304 and 9216 tokens. Few queries a tile mean that tiles
are gathered more often; the tail needs masks and copies.
"""

_MASK_BYTES = 9
"""Of a pair of tokens in a plan that masks them: bits spread out in int32, a bool and a float32."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def refuses(problem: Problem) -> str | None:
    """Why it cannot take `problem`, or None."""
    if problem.device != "cpu":
        return f"it is for the CPU, the tensors are on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.requires_grad:
        return "it has no backward pass; the reference has"
    if problem.precision.pv != "input":
        return f"it rounds no weights, as {problem.precision} does"
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; q, k, v are already in the order of the plan."""
    if precision == INPUT:
        return _attend(q, k, v, plan, scale)
    # Whole numbers times their steps: products of so few bits are exact in float32.
    given = rounded(q, k, v, plan, scale, precision)
    assert given.shift is not None
    out, lse = _attend(given.queries, given.keys, given.values, plan, scale, given.pooled)
    return out.to(q.dtype), lse + given.shift


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooled`: the means of the tail, `[B, H, K, D]`, if not those of k and v."""
    batch, heads, _, dim = q.shape
    if plan.bias is None and plan.within is None and bool((plan.counts == plan.columns).all()):
        # torch's kernel reads rows of D numbers side by side, whatever the last stride says.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return _flash(q, k, v, 0.0, False, scale=scale)
    rows, columns, size = plan.rows, plan.columns, plan.tile.key
    tiles_q = _tiles(q, plan.tile.query)
    tiles_k, tiles_v = _tiles(k, size).flatten(-2), _tiles(v, size).flatten(-2)
    # Row r of the batch is query tile r % rows of head r // rows.
    total = batch * heads * rows
    indices = plan.indices.expand(batch, heads, -1, -1).reshape(total, -1).long()
    counts = plan.counts.expand(batch, heads, -1).reshape(-1)
    head = torch.arange(batch * heads).repeat_interleave(rows)
    extras = _Extras.of(k, v, plan, pooled)
    out = torch.zeros(total, plan.tile.query, dim, dtype=q.dtype)
    lse = torch.full((total, plan.tile.query), -torch.inf, dtype=torch.float32)
    bytes_per_tile = 2 * size * dim * q.element_size()
    if plan.within is not None:
        bytes_per_tile += _MASK_BYTES * size * plan.tile.query
    order = counts.argsort(stable=True, descending=True)
    if plan.tail == "none":
        order = order[counts[order] > 0]
    while len(order):
        # Counts fall along the order: the first row of a chunk is its widest.
        width = int(counts[order[0]])
        chosen = order[: max(1, GATHERED_BYTES // (bytes_per_tile * max(1, width)))]
        order = order[len(chosen) :]
        kept = torch.arange(width) < counts[chosen, None]
        # What fills up a row is masked, which NaN would survive: so it is a tile that it keeps.
        filler = torch.where(counts[chosen, None] > 0, indices[chosen, :1], 0)
        places = torch.where(kept, indices[chosen, :width], filler)
        flat = (places + head[chosen, None] * columns).flatten()
        keys = tiles_k.index_select(0, flat).view(len(chosen), width * size, dim)
        values = tiles_v.index_select(0, flat).view(len(chosen), width * size, dim)
        mask = extras.mask(chosen, places, kept)
        if extras.pooled is not None:
            keys = torch.cat([keys, extras.pooled[0][head[chosen]]], dim=1)
            values = torch.cat([values, extras.pooled[1][head[chosen]]], dim=1)
        part, part_lse = _flash(
            *(x[:, None] for x in (tiles_q[chosen], keys, values)),
            0.0,
            False,
            attn_mask=None if mask is None else mask[:, None],
            scale=scale,
        )
        if mask is not None and (plan.bias is not None or plan.within is not None):
            # torch says 0 where biases of minus infinity, or a mask, have left no key.
            empty = (mask == -torch.inf).all(-1)[:, None]
            part_lse = part_lse.masked_fill(empty, -torch.inf)
        out[chosen], lse[chosen] = part[:, 0], part_lse[:, 0]
        del keys, values, mask  # before the next chunk gathers as much
    return (
        out.view(batch, heads, -1, dim)[:, :, : plan.queries],
        lse.view(batch, heads, -1)[:, :, : plan.queries],
    )


def _tiles(x: torch.Tensor, size: int) -> torch.Tensor:
    """`[B, H, L, D]` to `[B * H * tiles, size, D]`, zeros after the last token."""
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.contiguous().view(-1, size, x.shape[-1])


@dataclass(frozen=True, slots=True)
class _Extras:
    """What a chunk adds to its gathered keys: masks of padding, biases, the tail."""

    lengths: torch.Tensor
    """Valid tokens of each key tile, `[K]`."""
    size: int
    bias: torch.Tensor | None
    """`[B * H * Q, width]`."""
    pooled: tuple[torch.Tensor, torch.Tensor] | None
    """Mean key and value of each tile, `[B * H, K, D]`, where the plan has a tail."""
    within: tuple[torch.Tensor, torch.Tensor] | None
    """The plan's, `[rows of the plan, most, tile.query, words]`, and where in it a row is."""

    @classmethod
    def of(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan,
        pooled: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> _Extras:
        size, bias = plan.tile.key, plan.bias
        if bias is not None:
            bias = bias.expand(*k.shape[:2], -1, -1).reshape(-1, bias.shape[-1])
        if plan.tail == "complement":
            means = pooled or (pool(k, size), pool(v, size))
            pooled = means[0].flatten(0, 1), means[1].flatten(0, 1)
        within = None
        if plan.within is not None:
            source = torch.arange(plan.counts.numel()).view(plan.counts.shape)
            source = source.expand(*k.shape[:2], -1).flatten()
            within = plan.within.flatten(0, 2), source
        return cls(tile_lengths(plan.keys, size), size, bias, pooled, within)

    def mask(
        self, chosen: torch.Tensor, places: torch.Tensor, kept: torch.Tensor
    ) -> torch.Tensor | None:
        """What is added to the logits of a chunk, float32; None where it is 0.

        `[rows, 1 or tile.query, keys]`: where tokens are masked, queries of a tile differ.
        """
        ragged = bool((self.lengths[places] < self.size).any())
        plain = self.bias is None and self.pooled is None and self.within is None
        if kept.all() and not ragged and plain:
            return None
        tokens = torch.arange(self.size) < self.lengths[places][..., None]
        mask = torch.zeros(*places.shape, self.size, dtype=torch.float32)
        if self.bias is not None:
            mask += self.bias[chosen, : places.shape[1], None]
        mask = mask.masked_fill(~(tokens & kept[..., None]), -torch.inf).flatten(1)
        if self.pooled is not None:
            tail = self.lengths.to(torch.float32).log().expand(len(chosen), -1).clone()
            # A place that does not count points behind the last tile.
            beyond = F.pad(tail, (0, 1))
            beyond.scatter_(1, torch.where(kept, places, tail.shape[1]), -torch.inf)
            mask = torch.cat([mask, beyond[:, :-1]], dim=1)
        if self.within is None:
            return mask[:, None]
        words, source = self.within
        words = words[:, : places.shape[1]][source[chosen]]
        whole = places.shape[1] - words.shape[1]
        attended = F.pad(bits.unpack(words, self.size), (0, 0, 0, 0, 0, whole), value=True)
        return mask[:, None].where(attended.transpose(1, 2).flatten(2), -torch.inf)


def efficiency(problem: Problem) -> float:
    """As measured, see `_EFFICIENCIES`."""
    queries = next(it for it in (256, 128, 0) if problem.tile.query >= it)
    table = _EFFICIENCIES[queries, problem.tail]
    return next(value for tokens, value in table if problem.keys >= tokens)


def workspace(problem: Problem) -> int:
    """Whole tiles of queries, keys and values, and what one chunk gathers.

    A tail is put behind the gathered keys and values in a copy of them, and masks them. In bfloat16
    torch packs what is gathered into a second copy on processors with AMX: it is counted on all, so
    that what is predicted is not of one machine.
    """
    tiles = problem.tensor_bytes(problem.queries + 2 * problem.keys)
    if problem.precision != INPUT:  # rounded ones in float32, twice while they are made
        tiles += 2 * tiles * (4 // problem.dtype.itemsize)
    one_row = 2 * problem.keys * problem.head_dim * problem.dtype.itemsize
    if problem.masked:
        one_row += _MASK_BYTES * problem.keys * problem.tile.query
    gathered = max(GATHERED_BYTES, one_row)
    packed = problem.dtype == torch.bfloat16 and problem.precision == INPUT
    return tiles + gathered * (2 if problem.tail == "complement" or packed else 1)
