"""The Gluon kernels of the `hopper` backend. Importing this needs triton with Gluon for Hopper.

Groups of warps share a processor. One loads tiles of keys and values, with the copy engine (TMA),
into a ring in shared memory; one or two compute, each for 64 queries, and tell it when a place of
the ring is free. A computing group multiplies queries with the next keys while the product of the
last weights with their values is under way, so that exponentials and matrix products overlap, as in
FlashAttention-3 (arXiv 2407.08608, section 3.2); written anew for lists of key tiles. Programs stay
and take one tile of queries after the other.

Keys come in steps of `STEP`: as many tiles of the list as make one, side by side; then, for the
tail, `STEP` pooled tokens at a time. What is known of a step before its keys are there (numbers of
its tiles, scales, which tiles are left out) is loaded before the wait for them.
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

QUERIES: gl.constexpr = gl.constexpr(64)
"""Of one computing group."""


@gluon.constexpr_function
def _swizzle(channels: int, itemsize: int) -> int:
    """Bytes of a row that the copy engine swizzles together."""
    return min(128, channels * itemsize)


@gluon.constexpr_function
def _flat(channels: int, itemsize: int) -> gl.NVMMASharedLayout:
    """Layout of a matrix of rows of `channels` in shared memory, as the copy engine swizzles it."""
    return gl.NVMMASharedLayout(_swizzle(channels, itemsize), 8 * itemsize, rank=2)


@gluon.constexpr_function
def _itemsize(narrow: bool) -> int:
    """Bytes of a number, of 8 or 16 bits."""
    return 1 if narrow else 2


@gluon.constexpr_function
def _product(columns: int, itemsize: int) -> gl.NVMMADistributedLayout:
    """Layout of a product `[64, columns]` of matrices of such numbers, over four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32 // itemsize])


@gluon.constexpr_function
def _left(product: gl.NVMMADistributedLayout, itemsize: int) -> gl.DotOperandLayout:
    """Layout of the left operand of `product` in registers."""
    return gl.DotOperandLayout(0, product, 4 // itemsize)


def descriptor(x: torch.Tensor, tokens: int, last: int | None = None) -> TensorDescriptor:
    """What the copy engine knows of `x [B, H, M, N]`: it loads blocks of `tokens` x 128 bytes.

    Args:
        last: block size in the last dimension; None: 128 bytes, or the whole where it is less.
    """
    bytes_ = _swizzle(last or x.shape[-1], x.element_size())
    layout = gl.NVMMASharedLayout(bytes_, 8 * x.element_size(), rank=4)
    block = [1, 1, tokens, bytes_ // x.element_size()]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc, indices_ptr, counts_ptr,
    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
    plan_b, plan_h, heads, rows, columns, width, total,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, SPLIT: gl.constexpr, TAIL: gl.constexpr, INT8: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    """The group that loads."""
    PER: gl.constexpr = STEP // TILE_K
    q_type: gl.constexpr = q_desc.dtype
    v_type: gl.constexpr = v_desc.dtype
    Q_BYTES: gl.constexpr = _itemsize(INT8)
    V_BYTES: gl.constexpr = _itemsize(FP8)
    WIDE: gl.constexpr = q_desc.block_type.shape[3]
    CHUNKS: gl.constexpr = DIM // WIDE
    # Chunk by chunk of channels, and in each tile by tile: what `_compute` reads as one matrix.
    q_parts = q_smem._reinterpret(q_type, [GROUPS * CHUNKS, 1, 1, 64, WIDE], q_desc.layout)
    k_parts = k_smem._reinterpret(
        q_type, [STAGES * CHUNKS * PER, 1, 1, TILE_K, WIDE], k_desc.layout
    )
    if FP8:
        v_parts = v_smem._reinterpret(v_type, [STAGES * PER, 1, 1, DIM, TILE_K], v_desc.layout)
    else:
        v_parts = v_smem._reinterpret(
            v_type, [STAGES * (DIM // 64) * PER, 1, 1, TILE_K, 64], v_desc.layout
        )
    if TAIL:
        tail_k_parts = k_smem._reinterpret(
            q_type, [STAGES * CHUNKS, 1, 1, STEP, WIDE], tail_k_desc.layout
        )
        if FP8:
            tail_v_parts = v_smem._reinterpret(
                v_type, [STAGES * PER, 1, 1, DIM, TILE_K], tail_v_desc.layout
            )
        else:
            tail_v_parts = v_smem._reinterpret(
                v_type, [STAGES * (DIM // 64), 1, 1, STEP, 64], tail_v_desc.layout
            )
    step = 0
    turn = 0
    for at in range(gl.program_id(0), total, gl.num_programs(0)):
        row = at % rows
        head = (at // rows) % heads
        batch = at // (rows * heads)
        in_plan = batch * plan_b + head * plan_h + row // SPLIT
        count = gl.load(counts_ptr + in_plan)
        mbarrier.wait(free_q, (turn & 1) ^ 1)
        mbarrier.expect(ready_q, GROUPS * 64 * DIM * Q_BYTES)
        for part in gl.static_range(GROUPS):
            for c in gl.static_range(CHUNKS):
                tma.async_copy_global_to_shared(
                    q_desc, [batch, head, (row * GROUPS + part) * 64, c * WIDE], ready_q,
                    q_parts.index(part * CHUNKS + c),
                )  # fmt: skip
        turn += 1
        for place in range(0, count, PER):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(free_k.index(stage), phase ^ 1)
            mbarrier.expect(ready_k.index(stage), STEP * DIM * Q_BYTES)
            for i in gl.static_range(PER):
                # Behind the last tile of the list: a tile behind the last key, loaded as zeros.
                tile = gl.load(
                    indices_ptr + in_plan * width + place + i, mask=place + i < count, other=columns
                )
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        k_desc, [batch, head, tile * TILE_K, c * WIDE], ready_k.index(stage),
                        k_parts.index((stage * CHUNKS + c) * PER + i),
                    )  # fmt: skip
            mbarrier.wait(free_v.index(stage), phase ^ 1)
            mbarrier.expect(ready_v.index(stage), STEP * DIM * V_BYTES)
            for i in gl.static_range(PER):
                tile = gl.load(
                    indices_ptr + in_plan * width + place + i, mask=place + i < count, other=columns
                )
                if FP8:
                    tma.async_copy_global_to_shared(
                        v_desc, [batch, head, 0, tile * TILE_K], ready_v.index(stage),
                        v_parts.index(stage * PER + i),
                    )  # fmt: skip
                else:
                    for c in gl.static_range(DIM // 64):
                        tma.async_copy_global_to_shared(
                            v_desc, [batch, head, tile * TILE_K, c * 64], ready_v.index(stage),
                            v_parts.index((stage * (DIM // 64) + c) * PER + i),
                        )  # fmt: skip
            step += 1
        if TAIL:
            for start in range(0, columns, STEP):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(free_k.index(stage), phase ^ 1)
                mbarrier.expect(ready_k.index(stage), STEP * DIM * Q_BYTES)
                for c in gl.static_range(CHUNKS):
                    tma.async_copy_global_to_shared(
                        tail_k_desc, [batch, head, start, c * WIDE], ready_k.index(stage),
                        tail_k_parts.index(stage * CHUNKS + c),
                    )  # fmt: skip
                mbarrier.wait(free_v.index(stage), phase ^ 1)
                mbarrier.expect(ready_v.index(stage), STEP * DIM * V_BYTES)
                if FP8:
                    for i in gl.static_range(PER):
                        tma.async_copy_global_to_shared(
                            tail_v_desc, [batch, head, 0, start + i * TILE_K],
                            ready_v.index(stage), tail_v_parts.index(stage * PER + i),
                        )  # fmt: skip
                else:
                    for c in gl.static_range(DIM // 64):
                        tma.async_copy_global_to_shared(
                            tail_v_desc, [batch, head, start, c * 64], ready_v.index(stage),
                            tail_v_parts.index(stage * (DIM // 64) + c),
                        )  # fmt: skip
                step += 1


@gluon.jit
def _four(ptr, first, mask0, mask1, mask2, mask3, other, NUMBER: gl.constexpr):
    """Up to four numbers side by side; those that `NUMBER` does not count are the first again."""
    a = gl.load(ptr + first, mask=mask0, other=other)
    b = a
    c = a
    d = a
    if NUMBER >= 2:
        b = gl.load(ptr + first + 1, mask=mask1, other=other)
    if NUMBER >= 4:
        c = gl.load(ptr + first + 2, mask=mask2, other=other)
        d = gl.load(ptr + first + 3, mask=mask3, other=other)
    return a, b, c, d


@gluon.jit
def _spread(a, b, c, d, along, PART: gl.constexpr, NUMBER: gl.constexpr):
    """A number for each of `NUMBER` parts as a vector over the parts' elements."""
    x = (along * 0).to(a.dtype) + a
    if NUMBER >= 2:
        x = gl.where(along // PART == 1, b, x)
    if NUMBER >= 4:
        x = gl.where(along // PART == 2, c, x)
        x = gl.where(along // PART == 3, d, x)
    return x


@gluon.jit
def _facts(
    i, lists, count, columns, in_plan, in_head, width, words, unit,
    indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
    TILE_K: gl.constexpr, STEP: gl.constexpr,
    TAIL: gl.constexpr, BIASED: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """What is known of step `i` of a list before its keys are there."""
    PER: gl.constexpr = STEP // TILE_K
    place = i * PER
    t0, t1, t2, t3 = _four(
        indices_ptr, in_plan * width + place,
        place < count, place + 1 < count, place + 2 < count, place + 3 < count, columns, PER,
    )  # fmt: skip
    w0, w1, w2, w3 = 0, 0, 0, 0
    b0, b1, b2, b3 = 0.0, 0.0, 0.0, 0.0
    f0, f1, f2, f3 = unit, unit, unit, unit
    if TAIL:
        pooled = i >= lists
        w0, w1, w2, w3 = _four(
            left_out_ptr, in_plan * words + (i - lists) * (STEP // 32),
            pooled, pooled, pooled, pooled, 0, STEP // 32,
        )  # fmt: skip
    if BIASED:
        b0, b1, b2, b3 = _four(
            bias_ptr, in_plan * width + place,
            place < count, place + 1 < count, place + 2 < count, place + 3 < count, 0.0, PER,
        )  # fmt: skip
    if INT8:
        scales = k_scale_ptr + in_head * columns
        f0 = gl.load(scales + t0, mask=t0 < columns, other=0.0)
        f1, f2, f3 = f0, f0, f0
        if PER >= 2:
            f1 = gl.load(scales + t1, mask=t1 < columns, other=0.0)
        if PER >= 4:
            f2 = gl.load(scales + t2, mask=t2 < columns, other=0.0)
            f3 = gl.load(scales + t3, mask=t3 < columns, other=0.0)
        if TAIL:
            steps = (columns + STEP - 1) // STEP
            of_tail = gl.load(
                tail_scale_ptr + in_head * steps + i - lists, mask=i >= lists, other=0.0
            )
            f0 = gl.where(i >= lists, of_tail, f0)
            f1 = gl.where(i >= lists, of_tail, f1)
            f2 = gl.where(i >= lists, of_tail, f2)
            f3 = gl.where(i >= lists, of_tail, f3)
        # Not 0: what is divided by it is multiplied with it later.
        f0 = gl.maximum(f0 * unit, 1e-30)
        f1 = gl.maximum(f1 * unit, 1e-30)
        f2 = gl.maximum(f2 * unit, 1e-30)
        f3 = gl.maximum(f3 * unit, 1e-30)
    return t0, t1, t2, t3, w0, w1, w2, w3, b0, b1, b2, b3, f0, f1, f2, f3


@gluon.jit
def _prepared(
    s, i, lists, facts, keys, columns, one, last,
    TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr,
    TAIL: gl.constexpr, BIASED: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """Logits `[queries, STEP]` of a step, in units of its tiles, minus infinity where no key is.

    `one` and `last` are in powers of two.
    """
    PER: gl.constexpr = STEP // TILE_K
    t0, t1, t2, t3, w0, w1, w2, w3, b0, b1, b2, b3, f0, f1, f2, f3 = facts
    along = gl.arange(0, STEP, gl.SliceLayout(0, LOGITS))
    if INT8:
        # An integer below 2^22 added to the bits of 1.5 x 2^23 is that float plus the integer: an
        # addition, where a conversion takes four times as long. `_softmax` takes it away again.
        s = (s + 0x4B400000).to(gl.float32, bitcast=True)
    pooled = i >= lists
    if TAIL and pooled:
        word = _spread(w0, w1, w2, w3, along, 32, STEP // 32)
        at = (i - lists) * STEP + along
        more = gl.where(at == columns - 1, last / f0, one / f0)
        stands = ((word >> (along % 32)) & 1) != 0
        s = gl.where(stands[None, :], s + more[None, :], -float("inf"))
    else:
        if BIASED:
            bias = _spread(b0 / f0, b1 / f1, b2 / f2, b3 / f3, along, TILE_K, PER)
            s = s + (bias * 1.4426950408889634)[None, :]
        furthest = gl.maximum(gl.maximum(t0, t1), gl.maximum(t2, t3))
        if (furthest + 1) * TILE_K > keys:
            at = _spread(t0, t1, t2, t3, along, TILE_K, PER) * TILE_K + along % TILE_K
            s = gl.where((at < keys)[None, :], s, -float("inf"))
    return s


@gluon.jit
def _softmax(
    s, best, total, facts,
    TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr,
    INT8: gl.constexpr, UP: gl.constexpr,
):  # fmt: skip
    """One step of the softmax over the keys as they come, in powers of two, times 2 ** `UP`."""
    PER: gl.constexpr = STEP // TILE_K
    f0, f1, f2, f3 = facts[12], facts[13], facts[14], facts[15]
    if INT8:
        along = gl.arange(0, STEP, gl.SliceLayout(0, LOGITS))
        f = _spread(f0, f1, f2, f3, along, TILE_K, PER)
        # The largest of each tile before its unit: one product a tile, not one a logit.
        parts = s.reshape([64, PER, TILE_K])
        highest = gl.max(parts, 2)
        PARTS: gl.constexpr = highest.type.layout
        number = gl.arange(0, PER, gl.SliceLayout(0, PARTS))
        unit = _spread(f0, f1, f2, f3, number, 1, PER)
        highest = gl.max((highest - 12582912.0) * unit[None, :], 1)
        higher = gl.maximum(best, gl.convert_layout(highest, gl.SliceLayout(1, LOGITS)))
        # Rounding 1.5 x 2^23 units errs by less than a unit, which is what 8 bits tell apart.
        weights = gl.exp2(s * f[None, :] - ((f * 12582912.0)[None, :] + (higher - UP)[:, None]))
    else:
        higher = gl.maximum(best, gl.max(s, 1) * f0)
        weights = gl.exp2(s * f0 - (higher - UP)[:, None])
    shrink = gl.exp2(best - higher)
    return higher, total * shrink + gl.sum(weights, 1), weights, shrink


@gluon.jit
def _operand(
    weights, dtype: gl.constexpr, STEP: gl.constexpr, WEIGHTS: gl.constexpr, FP8: gl.constexpr
):  # fmt: skip
    """Weights as the matrix units read them from registers.

    In 8 bits a thread holds other columns than it computed: instead of moving them, columns are
    renamed, within 32, as the values were put in order by `quantise_kernels`.
    """
    if FP8:
        x = weights.reshape([64, STEP // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5))
        return gl.convert_layout(x.reshape([64, STEP]).to(dtype), WEIGHTS)
    else:
        return gl.convert_layout(weights.to(dtype), WEIGHTS)


@gluon.jit
def _compute(
    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v, turns,
    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, left_out_ptr,
    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr,
    out_b, out_h, out_l, plan_b, plan_h,
    heads, queries, keys, rows, columns, width, words, total, factor, one, last,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, SPLIT: gl.constexpr, TAIL: gl.constexpr, BIASED: gl.constexpr,
    INT8: gl.constexpr, FP8: gl.constexpr, ORDERED: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """A group that computes: queries `(row * GROUPS + PART) * 64` and on."""
    q_type: gl.constexpr = k_smem.dtype
    v_type: gl.constexpr = v_smem.dtype
    Q_BYTES: gl.constexpr = _itemsize(INT8)
    V_BYTES: gl.constexpr = _itemsize(FP8)
    LOGITS: gl.constexpr = _product(STEP, Q_BYTES)
    OUT: gl.constexpr = _product(DIM, V_BYTES)
    WEIGHTS: gl.constexpr = _left(OUT, V_BYTES)
    # In 8 bits weights are at most 2^8, so that small ones are not lost.
    UP: gl.constexpr = 8 if FP8 else 0
    K_FLAT: gl.constexpr = _flat(DIM, Q_BYTES)
    q = q_smem._reinterpret(q_type, [GROUPS, 64, DIM], K_FLAT).index(PART)
    k_all = k_smem._reinterpret(q_type, [STAGES, STEP, DIM], K_FLAT)
    if FP8:
        v_all = v_smem._reinterpret(v_type, [STAGES, DIM, STEP], _flat(TILE_K, 1))
    else:
        v_all = v_smem._reinterpret(v_type, [STAGES, STEP, DIM], _flat(DIM, 2))
    PER: gl.constexpr = STEP // TILE_K
    step = 0
    turn = 0
    order = 0
    for at in range(gl.program_id(0), total, gl.num_programs(0)):
        row = at % rows
        in_head = at // rows
        head = in_head % heads
        batch = in_head // heads
        in_plan = batch * plan_b + head * plan_h + row // SPLIT
        first = (row * GROUPS + PART) * 64
        lists = (gl.load(counts_ptr + in_plan) + PER - 1) // PER
        count = gl.load(counts_ptr + in_plan)
        steps = lists
        if TAIL:
            steps = lists + (columns + STEP - 1) // STEP
        unit = factor
        if INT8:
            unit = gl.load(
                q_scale_ptr + in_head * ((queries + 63) // 64) + first // 64,
                mask=first < queries, other=0.0,
            ) * factor  # fmt: skip
        # Finite, so that the first step takes no infinity from infinity.
        best = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
        weight = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, LOGITS))
        out = gl.zeros([64, DIM], gl.float32, OUT)
        if INT8:
            zero = gl.zeros([64, STEP], gl.int32, LOGITS)
        else:
            zero = gl.zeros([64, STEP], gl.float32, LOGITS)
        mbarrier.wait(ready_q, turn & 1)
        if steps > 0:
            facts = _facts(
                0, lists, count, columns, in_plan, in_head, width, words, unit,
                indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
                TILE_K, STEP, TAIL, BIASED, INT8,
            )  # fmt: skip
            stage = step % STAGES
            mbarrier.wait(ready_k.index(stage), (step // STAGES) & 1)
            s = warpgroup_mma(q, k_all.index(stage).permute((1, 0)), zero, use_acc=False)
            mbarrier.arrive(free_k.index(stage), count=1)
            s = _prepared(
                s, 0, lists, facts, keys, columns, one, last,
                TILE_K, STEP, LOGITS, TAIL, BIASED, INT8,
            )  # fmt: skip
            best, weight, weights, shrink = _softmax(
                s, best, weight, facts, TILE_K, STEP, LOGITS, INT8, UP
            )
            p = _operand(weights, v_type, STEP, WEIGHTS, FP8)
            for i in range(1, steps):
                facts = _facts(
                    i, lists, count, columns, in_plan, in_head, width, words, unit,
                    indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
                    TILE_K, STEP, TAIL, BIASED, INT8,
                )  # fmt: skip
                before = step % STAGES
                before_phase = (step // STAGES) & 1
                step += 1
                stage = step % STAGES
                mbarrier.wait(ready_k.index(stage), (step // STAGES) & 1)
                mbarrier.wait(ready_v.index(before), before_phase)
                if ORDERED:
                    # One group's products before the other's: while they run, that one has logits
                    # to work on.
                    mbarrier.wait(turns.index(PART), (order & 1) ^ (1 - PART))
                s_next = warpgroup_mma(
                    q, k_all.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                if FP8:
                    v = v_all.index(before).permute((1, 0))
                else:
                    v = v_all.index(before)
                out_next = warpgroup_mma(p, v, out, is_async=True)
                if ORDERED:
                    mbarrier.arrive(turns.index(1 - PART), count=1)
                    order += 1
                s = warpgroup_mma_wait(1, deps=[s_next])
                mbarrier.arrive(free_k.index(stage), count=1)
                s = _prepared(
                    s, i, lists, facts, keys, columns, one, last,
                    TILE_K, STEP, LOGITS, TAIL, BIASED, INT8,
                )  # fmt: skip
                best, weight, weights, shrink = _softmax(
                    s, best, weight, facts, TILE_K, STEP, LOGITS, INT8, UP
                )
                out = warpgroup_mma_wait(0, deps=[out_next])
                mbarrier.arrive(free_v.index(before), count=1)
                out = out * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
                p = _operand(weights, v_type, STEP, WEIGHTS, FP8)
            stage = step % STAGES
            mbarrier.wait(ready_v.index(stage), (step // STAGES) & 1)
            if FP8:
                v = v_all.index(stage).permute((1, 0))
            else:
                v = v_all.index(stage)
            out = warpgroup_mma(p, v, out)
            mbarrier.arrive(free_v.index(stage), count=1)
            step += 1
        mbarrier.arrive(free_q, count=1)
        turn += 1
        # A query without any key: output 0, log-sum-exp minus infinity.
        some = gl.where(weight == 0, 1.0, weight)
        lse = (best - UP + gl.log2(some)) * 0.6931471805599453
        tokens = first + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
        if INT8:
            # What the mean that was taken from all keys would have added to each logit.
            lse += gl.load(shift_ptr + in_head * queries + tokens, mask=tokens < queries, other=0.0)
        lse = gl.where(weight == 0, -float("inf"), lse)
        gl.store(lse_ptr + in_head * queries + tokens, lse, mask=tokens < queries)
        out = out * gl.convert_layout(1.0 / some, gl.SliceLayout(1, OUT))[:, None]
        tokens = first + gl.arange(0, 64, gl.SliceLayout(1, OUT))
        dims = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
        if FP8:
            out = out * gl.load(v_scale_ptr + in_head * DIM + dims)[None, :]
        to = out_ptr + batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h
        to = to + tokens[:, None].to(gl.int64) * out_l + dims[None, :]
        gl.store(to, out.to(out_ptr.dtype.element_ty), mask=(tokens < queries)[:, None])


@gluon.jit
def forward(
    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc,
    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, left_out_ptr,
    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr,
    out_b, out_h, out_l, plan_b, plan_h,
    heads, queries, keys, rows, columns, width, words, total, factor, one, last,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, SPLIT: gl.constexpr, TAIL: gl.constexpr, BIASED: gl.constexpr,
    INT8: gl.constexpr, FP8: gl.constexpr, ORDERED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Block attention; as many programs as run at once, each takes every so many-th query tile.

    q, k and, 16-bit, v through descriptors of `[B, H, L, DIM]`, with `FP8` v of `[B, H, DIM, L]` as
    `quantise_kernels` makes it; pooled keys and values likewise. out by its strides, contiguous in
    its last dimension; lse `[B, H, queries]`. indices, counts, bias and left_out (`words` of 32
    tiles) contiguous, with strides `plan_b` and `plan_h` in rows of the plan; a row of the plan is
    `SPLIT` of the kernel's, which have `GROUPS` x 64 queries. `total` is B x H x rows. `factor`:
    the scale times log2(e), above 0; `one` and `last`: what a pooled token of a whole and of the
    last tile weighs, as a logit. `q_scale [B, H, queries / 64]`, `k_scale [B, H, columns]`,
    `tail_scale [B, H, columns / STEP]`, `v_scale [B, H, DIM]`, `shift [B, H, queries]` (added to
    the log-sum-exp) are of 8-bit operands.
    """
    q_type: gl.constexpr = q_desc.dtype
    v_type: gl.constexpr = v_desc.dtype
    Q_BYTES: gl.constexpr = _itemsize(INT8)
    K_FLAT: gl.constexpr = _flat(DIM, Q_BYTES)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q_type, [GROUPS, 64, DIM], K_FLAT)
    k_smem = gl.allocate_shared_memory(q_type, [STAGES, STEP, DIM], K_FLAT)
    if FP8:
        v_smem = gl.allocate_shared_memory(v_type, [STAGES, DIM, STEP], _flat(TILE_K, 1))
    else:
        v_smem = gl.allocate_shared_memory(v_type, [STAGES, STEP, DIM], _flat(DIM, 2))
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    free_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    mbarrier.init(ready_q, count=1)
    mbarrier.init(free_q, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(free_k.index(i), count=GROUPS)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(free_v.index(i), count=GROUPS)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    turns, out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, left_out_ptr,
                    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr,
                    out_b, out_h, out_l, plan_b, plan_h,
                    heads, queries, keys, rows, columns, width, words, total, factor, one, last,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, BIASED, INT8, FP8,
                    ORDERED, 0,
                )),
                (_compute, (
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    turns, out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, left_out_ptr,
                    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr,
                    out_b, out_h, out_l, plan_b, plan_h,
                    heads, queries, keys, rows, columns, width, words, total, factor, one, last,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, BIASED, INT8, FP8,
                    ORDERED, 1,
                )),
                (_load, (
                    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc, indices_ptr, counts_ptr,
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    plan_b, plan_h, heads, rows, columns, width, total,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, INT8, FP8,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    turns, out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, left_out_ptr,
                    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr,
                    out_b, out_h, out_l, plan_b, plan_h,
                    heads, queries, keys, rows, columns, width, words, total, factor, one, last,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, BIASED, INT8, FP8,
                    ORDERED, 0,
                )),
                (_load, (
                    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc, indices_ptr, counts_ptr,
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    plan_b, plan_h, heads, rows, columns, width, total,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, INT8, FP8,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip


def compiled(
    dim: int, tile_k: int, *, capability: int = 90, step: int = 128, stages: int = 3,
    groups: int = 2, tail: bool = False, biased: bool = False, int8: bool = False,
    fp8: bool = False, ordered: bool = True, registers: int = 240, **options: int,
) -> Any:  # fmt: skip
    """`forward` compiled for a device that need not be there; what Triton returns."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = {
        "DIM": dim, "TILE_K": tile_k, "STEP": step, "STAGES": stages, "GROUPS": groups,
        "SPLIT": 1, "TAIL": tail, "BIASED": biased, "INT8": int8, "FP8": fp8,
        "ORDERED": ordered and groups == 2, "REGISTERS": registers,
    }  # fmt: skip

    def block(tokens: int, last: int, itemsize: int, kind: str) -> str:
        bytes_ = _swizzle(last, itemsize)
        layout = gl.NVMMASharedLayout(bytes_, 8 * itemsize, rank=4)
        return f"tensordesc<{kind}[1, 1, {tokens}, {bytes_ // itemsize}],{layout!r}>"

    qk, size = ("i8", 1) if int8 else ("bf16", 2)
    types = {
        "q_desc": block(64, dim, size, qk),
        "k_desc": block(tile_k, dim, size, qk),
        "tail_k_desc": block(step, dim, size, qk),
        "v_desc": block(dim, tile_k, 1, "fp8e4nv") if fp8 else block(tile_k, dim, 2, "bf16"),
        "tail_v_desc": block(dim, tile_k, 1, "fp8e4nv") if fp8 else block(step, dim, 2, "bf16"),
        "out_ptr": "*bf16", "indices_ptr": "*i32", "counts_ptr": "*i32", "left_out_ptr": "*i32",
        "factor": "fp32", "one": "fp32", "last": "fp32",
    }  # fmt: skip
    names: list[str] = forward.arg_names

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return types.get(name, "*fp32" if name.endswith("_ptr") else "i32")

    source = GluonASTSource(
        forward,
        {it: kind(it) for it in names},
        {(names.index(it),): value for it, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, it in enumerate(names) if it.endswith("_ptr")},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, **options}
    )
