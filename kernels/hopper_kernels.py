"""The Gluon kernels of the `hopper` backend. Importing this needs triton with Gluon for Hopper.

Three groups of warps share a processor. One loads tiles of keys and values, with the copy engine
(TMA), into a ring in shared memory; two compute, each for half of the queries of a tile, and tell
it when a place of the ring is free. A computing group multiplies queries with the next keys while
the product of the last weights with their values is under way, so that exponentials and matrix
products overlap, as in FlashAttention-3 (arXiv 2407.08608, section 3.2); written anew for lists of
key tiles. Programs stay and take one tile of queries after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = 1.4426950408889634
CHUNK = 64
"""Channels that the copy engine swizzles together: 128 bytes."""


def descriptor(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """What the copy engine knows of `x [B, H, L, D]`: it loads `tokens` x 64 channels at a time."""
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    block = [1, 1, tokens, CHUNK]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, indices_ptr, counts_ptr, q_smem, k_smem, v_smem,
    ready_q, free_q, ready_k, free_k, ready_v, free_v,
    plan_b, plan_h, heads, rows, columns, width, total,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    TILE_Q: gl.constexpr,
):  # fmt: skip
    """The group that loads. A step is as many tiles as make `STEP` keys, side by side."""
    PER: gl.constexpr = STEP // TILE_K
    CHUNKS: gl.constexpr = DIM // 64
    dtype: gl.constexpr = q_desc.dtype
    # Chunk by chunk of channels, and in each tile by tile: what `_compute` reads as one matrix.
    k_parts = k_smem._reinterpret(dtype, [STAGES * CHUNKS * PER, 1, 1, TILE_K, 64], k_desc.layout)
    v_parts = v_smem._reinterpret(dtype, [STAGES * CHUNKS * PER, 1, 1, TILE_K, 64], v_desc.layout)
    q_parts = q_smem._reinterpret(dtype, [2 * CHUNKS, 1, 1, TILE_Q // 2, 64], q_desc.layout)
    step = 0
    turn = 0
    for at in range(gl.program_id(0), total, gl.num_programs(0)):
        row = at % rows
        head = (at // rows) % heads
        batch = at // (rows * heads)
        in_plan = batch * plan_b + head * plan_h + row
        count = gl.load(counts_ptr + in_plan)
        mbarrier.wait(free_q, (turn & 1) ^ 1)
        mbarrier.expect(ready_q, TILE_Q * DIM * 2)
        for part in gl.static_range(2):
            for c in gl.static_range(CHUNKS):
                tma.async_copy_global_to_shared(
                    q_desc, [batch, head, row * TILE_Q + part * (TILE_Q // 2), c * 64], ready_q,
                    q_parts.index(part * CHUNKS + c),
                )  # fmt: skip
        turn += 1
        for place in range(0, count, PER):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(free_k.index(stage), phase ^ 1)
            mbarrier.expect(ready_k.index(stage), STEP * DIM * 2)
            for i in gl.static_range(PER):
                # Behind the last tile of the list: a tile behind the last key, loaded as zeros.
                tile = gl.load(
                    indices_ptr + in_plan * width + place + i, mask=place + i < count, other=columns
                )
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        k_desc, [batch, head, tile * TILE_K, c * 64], ready_k.index(stage),
                        k_parts.index((stage * CHUNKS + c) * PER + i),
                    )  # fmt: skip
            mbarrier.wait(free_v.index(stage), phase ^ 1)
            mbarrier.expect(ready_v.index(stage), STEP * DIM * 2)
            for i in gl.static_range(PER):
                tile = gl.load(
                    indices_ptr + in_plan * width + place + i, mask=place + i < count, other=columns
                )
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        v_desc, [batch, head, tile * TILE_K, c * 64], ready_v.index(stage),
                        v_parts.index((stage * CHUNKS + c) * PER + i),
                    )  # fmt: skip
            step += 1


@gluon.jit
def _masked(
    s, indices_ptr, base, place, count, columns, keys,
    TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """Logits `[queries, STEP]` without those behind the last key or the last tile of the list."""
    PER: gl.constexpr = STEP // TILE_K
    furthest = 0
    for i in gl.static_range(PER):
        tile = gl.load(indices_ptr + base + place + i, mask=place + i < count, other=columns)
        furthest = gl.maximum(furthest, tile)
    if (furthest + 1) * TILE_K > keys:
        along = gl.arange(0, STEP, gl.SliceLayout(0, LOGITS))
        at = along * 0 + keys
        for i in gl.static_range(PER):
            tile = gl.load(indices_ptr + base + place + i, mask=place + i < count, other=columns)
            at = gl.where(along // TILE_K == i, tile * TILE_K + along % TILE_K, at)
        s = gl.where((at < keys)[None, :], s, -float("inf"))
    return s


@gluon.jit
def _softmax(s, best, total, factor):
    """One step of the softmax over the keys as they come, in powers of two."""
    higher = gl.maximum(best, gl.max(s, 1) * factor)
    weights = gl.exp2(s * factor - higher[:, None])
    shrink = gl.exp2(best - higher)
    return higher, total * shrink + gl.sum(weights, 1), weights, shrink


@gluon.jit
def _compute(
    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
    out_ptr, lse_ptr, indices_ptr, counts_ptr, out_b, out_h, out_l,
    plan_b, plan_h, heads, queries, keys, rows, columns, width, total, factor,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    TILE_Q: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """A group that computes: queries `PART * TILE_Q / 2` and on of each tile."""
    QUERIES: gl.constexpr = TILE_Q // 2
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    dtype: gl.constexpr = k_smem.dtype
    FLAT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q = q_smem._reinterpret(dtype, [2, QUERIES, DIM], FLAT).index(PART)
    k_all = k_smem._reinterpret(dtype, [STAGES, STEP, DIM], FLAT)
    v_all = v_smem._reinterpret(dtype, [STAGES, STEP, DIM], FLAT)
    step = 0
    turn = 0
    for at in range(gl.program_id(0), total, gl.num_programs(0)):
        row = at % rows
        head = (at // rows) % heads
        batch = at // (rows * heads)
        in_plan = batch * plan_b + head * plan_h + row
        base = in_plan * width
        count = gl.load(counts_ptr + in_plan)
        # Finite, so that the first step takes no infinity from infinity.
        best = gl.full([QUERIES], -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
        weight = gl.full([QUERIES], 0.0, gl.float32, gl.SliceLayout(1, LOGITS))
        out = gl.zeros([QUERIES, DIM], gl.float32, OUT)
        zero = gl.zeros([QUERIES, STEP], gl.float32, LOGITS)
        mbarrier.wait(ready_q, turn & 1)
        if count > 0:
            stage = step % STAGES
            mbarrier.wait(ready_k.index(stage), (step // STAGES) & 1)
            s = warpgroup_mma(q, k_all.index(stage).permute((1, 0)), zero, use_acc=False)
            mbarrier.arrive(free_k.index(stage), count=1)
            s = _masked(s, indices_ptr, base, 0, count, columns, keys, TILE_K, STEP, LOGITS)
            best, weight, weights, shrink = _softmax(s, best, weight, factor)
            p = gl.convert_layout(weights.to(dtype), WEIGHTS)
            for place in range(STEP // TILE_K, count, STEP // TILE_K):
                before = step % STAGES
                before_phase = (step // STAGES) & 1
                step += 1
                stage = step % STAGES
                mbarrier.wait(ready_k.index(stage), (step // STAGES) & 1)
                s_next = warpgroup_mma(
                    q, k_all.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                mbarrier.wait(ready_v.index(before), before_phase)
                out_next = warpgroup_mma(p, v_all.index(before), out, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_next])
                mbarrier.arrive(free_k.index(stage), count=1)
                s = _masked(s, indices_ptr, base, place, count, columns, keys, TILE_K, STEP, LOGITS)
                best, weight, weights, shrink = _softmax(s, best, weight, factor)
                out = warpgroup_mma_wait(0, deps=[out_next])
                mbarrier.arrive(free_v.index(before), count=1)
                out = out * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
                p = gl.convert_layout(weights.to(dtype), WEIGHTS)
            stage = step % STAGES
            mbarrier.wait(ready_v.index(stage), (step // STAGES) & 1)
            out = warpgroup_mma(p, v_all.index(stage), out)
            mbarrier.arrive(free_v.index(stage), count=1)
            step += 1
        mbarrier.arrive(free_q, count=1)
        turn += 1
        # A query without any key: output 0, log-sum-exp minus infinity.
        some = gl.where(weight == 0, 1.0, weight)
        lse = gl.where(
            weight == 0, -float("inf"), (best + gl.log2(some)) * 0.6931471805599453
        )  # fmt: skip
        first = row * TILE_Q + PART * QUERIES
        tokens = first + gl.arange(0, QUERIES, gl.SliceLayout(1, LOGITS))
        gl.store(lse_ptr + (batch * heads + head) * queries + tokens, lse, mask=tokens < queries)
        out = out * gl.convert_layout(1.0 / some, gl.SliceLayout(1, OUT))[:, None]
        tokens = first + gl.arange(0, QUERIES, gl.SliceLayout(1, OUT))
        dims = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
        to = out_ptr + batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h
        to = to + tokens[:, None].to(gl.int64) * out_l + dims[None, :]
        gl.store(to, out.to(dtype), mask=(tokens < queries)[:, None])


@gluon.jit
def forward(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, indices_ptr, counts_ptr,
    out_b, out_h, out_l, plan_b, plan_h,
    heads, queries, keys, rows, columns, width, total, factor,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    TILE_Q: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Block attention; as many programs as processors, each takes every so many-th query tile.

    q, k, v through descriptors of `[B, H, L, DIM]`; out by its strides, contiguous in its last
    dimension; lse `[B, H, queries]`; indices and counts contiguous, with strides `plan_b` and
    `plan_h` in rows. `total` is B x H x rows; `factor` the scale times log2(e), above 0.
    """
    dtype: gl.constexpr = q_desc.dtype
    FLAT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, TILE_Q // 2, DIM], FLAT)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, STEP, DIM], FLAT)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, STEP, DIM], FLAT)
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    free_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(ready_q, count=1)
    mbarrier.init(free_q, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(free_k.index(i), count=2)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(free_v.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                        out_ptr, lse_ptr, indices_ptr, counts_ptr, out_b, out_h, out_l,
                        plan_b, plan_h, heads, queries, keys, rows, columns, width, total, factor,
                        DIM, TILE_K, STEP, STAGES, TILE_Q, 0)),
            (_compute, (q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                        out_ptr, lse_ptr, indices_ptr, counts_ptr, out_b, out_h, out_l,
                        plan_b, plan_h, heads, queries, keys, rows, columns, width, total, factor,
                        DIM, TILE_K, STEP, STAGES, TILE_Q, 1)),
            (_load, (q_desc, k_desc, v_desc, indices_ptr, counts_ptr, q_smem, k_smem, v_smem,
                     ready_q, free_q, ready_k, free_k, ready_v, free_v,
                     plan_b, plan_h, heads, rows, columns, width, total,
                     DIM, TILE_K, STEP, STAGES, TILE_Q)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def compiled(dim: int, tile_k: int, stages: int, *, capability: int = 90) -> Any:
    """`forward` compiled for a device that need not be there; what Triton returns."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    constants = {
        "DIM": dim, "TILE_K": tile_k, "STEP": 128, "STAGES": stages,
        "TILE_Q": 128, "REGISTERS": 240,
    }  # fmt: skip
    types = {"out_ptr": "*bf16", "lse_ptr": "*fp32", "indices_ptr": "*i32", "counts_ptr": "*i32"}
    types["factor"] = "fp32"
    for name, tokens in (("q_desc", 64), ("k_desc", tile_k), ("v_desc", tile_k)):
        types[name] = f"tensordesc<bf16[1, 1, {tokens}, {CHUNK}],{layout!r}>"
    names: list[str] = forward.arg_names
    signature = {it: "constexpr" if it in constants else types.get(it, "i32") for it in names}
    source = GluonASTSource(
        forward,
        signature,
        {(names.index(it),): value for it, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, it in enumerate(names) if it.endswith("_ptr")},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}
    )
