"""The backward pass of block attention in Triton: exact, deterministic, without atomics.

Gradients of queries come from a program a piece of a query tile, over the plan's list; those of
keys and values from a program a piece of a key tile, over the transposed list; so logits are
computed twice, 7 matrix products where 5 would do, and nothing is added up between programs. Those
of the tail's pooled tokens come from programs over all queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .lists import left_out, pair_means
from .plan import BlockPlan, Tile, tiles_of
from .problem import Problem
from .triton_support import interpreted, on_device, padded


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is run: on pieces of so many queries and keys, with so many warps and stages.

    Args:
        more_stages: instead, where a program has `ROOMY` of shared memory.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    more_stages: int | None = None

    def stages_on(self, device: torch.device) -> int:
        """Those for a device."""
        if self.more_stages is None or device.type != "cuda":
            return self.stages
        most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        return self.more_stages if most >= ROOMY else self.stages


ROOMY = 160 * 1024
"""Bytes of shared memory: server GPUs have them from sm_80 on, sm_86 and sm_89 have 99 KiB."""


_FLOAT32 = {128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 8, 1)}
LAUNCHES: dict[tuple[str, int], dict[int, Launch]] = {
    ("queries", 2): {
        64: Launch(128, 64, 8, 3),
        128: Launch(128, 64, 8, 2, more_stages=3),
        256: Launch(64, 32, 4, 2),
    },
    ("keys_values", 2): {
        64: Launch(64, 64, 4, 3),
        128: Launch(64, 64, 4, 2),
        256: Launch(32, 64, 8, 2),
    },
    ("pooled", 2): {
        64: Launch(64, 64, 4, 2),
        128: Launch(64, 64, 8, 2),
        256: Launch(32, 64, 8, 2),
    },
    ("queries", 4): _FLOAT32,
    ("keys_values", 4): _FLOAT32,
    ("pooled", 4): _FLOAT32,
}
"""By kernel and bytes of a number, then by the head dimension up to which an entry holds.

Chosen so that registers suffice on sm_90 (what ptxas says); those for 16 bits and dimensions of 64
and 128 also by time on an H100.
"""

POOLED_PROGRAMS = 1024
"""Programs of the pooled tokens, at the least: the queries are split until there are so many."""


Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan, float], tuple[torch.Tensor, torch.Tensor]
]


def with_gradients(
    forward: Forward,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `forward` computes, with this backward pass where gradients are wanted."""
    if not Problem.of(q, k, v, plan).requires_grad:
        return forward(q, k, v, plan, scale)
    out, lse = _Attention.apply(q, k, v, plan.bias, plan, scale, forward)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse


class _Attention(torch.autograd.Function):
    """With gradients of q, k, v and the bias, through output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        plan: BlockPlan,
        scale: float,
        forward: Forward,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse, plan.indices, plan.counts, bias)
        ctx.plan = plan.tile, plan.queries, plan.keys, plan.tail
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        *saved, indices, counts, bias = ctx.saved_tensors
        plan = BlockPlan(indices, counts, *ctx.plan, bias=bias)
        wanted = ctx.needs_input_grad[:4]
        return *gradients(dout, dlse, tuple(saved), plan, ctx.scale, wanted), None, None, None


class Gradients(NamedTuple):
    """Of queries, keys, values and the plan's bias; None where nobody asked."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Transposed:
    """Which query tiles keep each key tile, one list after the other.

    Args:
        rows: `[entries]` int32; first the query tiles of key tile 0 of the plan's first head, in
            rising order, then those of key tile 1; what follows the last start is ignored.
        starts: `[heads of the plan * K + 1]`, where each list starts in `rows`.
        bias: float32, beside `rows`.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    bias: torch.Tensor | None


def transpose(plan: BlockPlan) -> Transposed:
    """The lists of `plan` by key tile, by one sort; nothing waits for the device."""
    batch, heads = plan.indices.shape[:2]
    rows, columns, device = plan.rows, plan.columns, plan.indices.device
    end = batch * heads * columns * rows
    dtype = torch.int32 if end < 2**31 else torch.int64
    head = torch.arange(batch * heads, dtype=dtype, device=device).view(batch, heads, 1, 1)
    row = torch.arange(rows, dtype=dtype, device=device)[:, None]
    places = (head * columns + plan.indices) * rows + row
    places = torch.where(plan.kept, places, end).to(dtype).flatten()
    places, source = places.sort()
    bounds = torch.arange(0, end + 1, rows, dtype=dtype, device=device)
    return Transposed(
        rows=(places % rows).to(torch.int32),
        starts=torch.searchsorted(places, bounds, out_int32=len(places) < 2**31),
        bias=None if plan.bias is None else plan.bias.detach().float().flatten()[source],
    )


def summarize(
    k: torch.Tensor, v: torch.Tensor, plan: BlockPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the tail needs: pooled keys and values, and bits of the tiles that are left out."""
    keys, values = pair_means(k, v, Tile(plan.tile.key, plan.tile.key))
    return keys.to(k.dtype), values.to(v.dtype), left_out(plan.indices, plan.counts, plan.columns)


def gradients(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    plan: BlockPlan,
    scale: float,
    wanted: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Gradients of block attention.

    Args:
        dout, dlse: of output and log-sum-exp, any strides; None is 0.
        saved: q, k, v, output and log-sum-exp; the last two contiguous.
        wanted: whether those of q, k, v and the bias are.
    """
    with on_device(saved[0]):
        return _gradients(dout, dlse, saved, plan, scale, wanted)


def _gradients(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    plan: BlockPlan,
    scale: float,
    wanted: tuple[bool, bool, bool, bool],
) -> Gradients:
    from . import backward_kernels

    kernels: Any = backward_kernels
    q, k, v, out, lse = saved
    batch, heads, queries, dim = q.shape
    dout = out.new_zeros(()).expand_as(out) if dout is None else dout
    dlse = lse.new_zeros(()).expand_as(lse) if dlse is None else dlse
    if dout.dtype != q.dtype or dout.stride(-1) != 1:
        # Read many times over: worth a copy in which rows lie side by side.
        dout = dout.to(q.dtype).contiguous()

    pairs, rows, columns, tile = batch * heads, plan.rows, plan.columns, plan.tile
    slots = rows * tile.query
    lse2 = torch.empty(batch, heads, slots, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse2)
    tail, biased = plan.tail == "complement", plan.bias is not None
    dims = {"DIM": dim, "PADDED_DIM": padded(dim)}
    block = min(64, tile.query)
    kernels.prepare[(slots // block, pairs)](
        out, dout, lse, dlse, lse2, delta,
        *out.stride(), *dout.stride(), *dlse.stride(),
        heads, queries, slots,
        **dims, BLOCK=block, num_warps=4,
    )  # fmt: skip
    plan_b = plan.indices.shape[1] if plan.indices.shape[0] > 1 else 0
    plan_h = 1 if plan.indices.shape[1] > 1 else 0

    def launch(kernel: str) -> tuple[Launch, dict[str, Any]]:
        """Sizes of its pieces, and what it is given by keyword."""
        it = _pieces(kernel, dim, q.element_size(), tile)
        return it, {
            **dims,
            "TILE_Q": tile.query,
            "TILE_K": tile.key,
            "SUB_Q": it.queries,
            "SUB_K": it.keys,
            "WIDE": interpreted(),
            "num_warps": it.warps,
            "num_stages": it.stages_on(q.device),
        }

    # What a variant of a kernel does not read is given any tensor.
    pooled_k, pooled_v, pooled_dk, pooled_dv, left_out = k, v, k, v, plan.counts
    if tail:
        pooled_k, pooled_v, left_out = summarize(k, v, plan)

    dq, dbias = None, None
    if wanted[0] or wanted[3]:
        sizes, options = launch("queries")
        dq = torch.empty_like(q)
        parts = delta
        if wanted[3]:
            parts_q, parts_k = tile.query // sizes.queries, tile.key // sizes.keys
            shape = (batch, heads, rows, parts_q, plan.indices.shape[-1], parts_k)
            parts = delta.new_zeros(shape)
        kernels.queries[(tiles_of(queries, sizes.queries), pairs)](
            q, k, v, dout, lse2, delta, plan.indices.contiguous(), plan.counts.contiguous(),
            delta if plan.bias is None else plan.bias.contiguous(),
            pooled_k, pooled_v, left_out, dq, parts,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dq.stride(),
            plan_b, plan_h,
            heads, queries, slots, plan.keys, rows, columns, plan.indices.shape[-1],
            scale,
            **options, BIASED=biased, BIAS_GRAD=wanted[3], RAGGED=plan.keys % tile.key != 0,
            TAIL=tail,
        )  # fmt: skip
        if wanted[3] and plan.bias is not None:
            dbias = parts.sum((3, 5)).sum_to_size(plan.bias.shape).to(plan.bias.dtype)

    dk, dv = None, None
    if wanted[1] or wanted[2]:
        if tail:
            sizes, options = launch("pooled")
            chunks, steps = tiles_of(columns, sizes.keys), slots // sizes.queries
            splits = min(steps, tiles_of(POOLED_PROGRAMS, chunks * pairs))
            steps = tiles_of(steps, splits)
            shape = (splits, batch, heads, columns, dim)
            pooled_dk, pooled_dv = delta.new_empty(shape), delta.new_empty(shape)
            kernels.pooled[(chunks, splits, pairs)](
                q, dout, lse2, delta, pooled_k, pooled_v, left_out, pooled_dk, pooled_dv,
                *q.stride(), *dout.stride(),
                plan_b, plan_h,
                heads, queries, slots, plan.keys, rows, columns, steps,
                scale,
                **options,
            )  # fmt: skip
            pooled_dk, pooled_dv = pooled_dk.sum(0), pooled_dv.sum(0)
        sizes, options = launch("keys_values")
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        lists = transpose(plan)
        kernels.keys_values[(tiles_of(plan.keys, sizes.keys), pairs)](
            q, k, v, dout, lse2, delta, lists.rows, lists.starts,
            delta if lists.bias is None else lists.bias,
            pooled_dk, pooled_dv, dk, dv,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dk.stride(), *dv.stride(),
            plan_b, plan_h,
            heads, queries, slots, plan.keys, columns,
            scale,
            **options, BIASED=biased, TAIL=tail,
        )  # fmt: skip
    return Gradients(
        *(it if want else None for it, want in zip((dq, dk, dv, dbias), wanted, strict=True))
    )


def _pieces(kernel: str, dim: int, item_bytes: int, tile: Tile) -> Launch:
    """How `kernel` is run on tiles of this size."""
    table = LAUNCHES[kernel, item_bytes]
    it = table[min(size for size in table if size >= dim)]
    # A chunk of pooled tokens is no piece of a tile.
    keys = it.keys if kernel == "pooled" else min(it.keys, tile.key)
    return replace(it, queries=min(it.queries, tile.query), keys=keys)


def workspace(problem: Problem) -> int:
    """Bytes of the gradients and of what is held beside them, at the most."""
    pairs, tile = problem.batch * problem.heads, problem.tile
    rows, columns = tiles_of(problem.queries, tile.query), tiles_of(problem.keys, tile.key)
    # The gradients, and that of the output where it has to be copied; two numbers a query.
    size = problem.tensor_bytes(2 * problem.queries + 2 * problem.keys)
    size += 8 * pairs * rows * tile.query
    # Sorting the entries, at the most all tiles: numbers, sorted numbers and where they are from.
    size += 28 * pairs * rows * columns
    given = problem.head_dim, problem.dtype.itemsize, tile
    if problem.biased:
        it = _pieces("queries", *given)
        parts = tiles_of(tile.query, it.queries) * tiles_of(tile.key, it.keys)
        size += 4 * (parts + 2) * pairs * rows * columns
    if problem.tail == "complement":
        chunks = pairs * tiles_of(columns, _pieces("pooled", *given).keys)
        splits = tiles_of(POOLED_PROGRAMS, chunks)
        size += 8 * (splits + 1) * pairs * columns * problem.head_dim
    return size
