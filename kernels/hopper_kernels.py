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

The softmax needs a reference to take from logits, which need not be their largest: bfloat16 and
float32 have exponents enough for weights far above 1. So a first pass keeps the largest logit of
the first step, and neither looks for a larger one nor rescales what it has. Query tiles for which
that was too low (sums above 2^100, or products that overflow; none in practice) or, where masks
leave keys out that it counts, too high are put on a list, and a second pass does these as others do
all: with the largest so far.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import hopper_load_kernels as loading
from . import hopper_pieces_kernels as pieces


@gluon.jit
def _compute(
    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, within_ptr, left_out_ptr,
    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr, again_ptr,
    out_b, out_h, out_l, plan_b, plan_h,
    heads, queries, keys, rows, columns, width, most, words, total, factor, one, last,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, SPLIT: gl.constexpr, TAIL: gl.constexpr, BIASED: gl.constexpr,
    MASKED: gl.constexpr, INT8: gl.constexpr, FP8: gl.constexpr, PASS: gl.constexpr,
    PART: gl.constexpr,
):  # fmt: skip
    """A group that computes: queries `(row * GROUPS + PART) * 64` and on."""
    q_type: gl.constexpr = k_smem.dtype
    v_type: gl.constexpr = v_smem.dtype
    Q_BYTES: gl.constexpr = pieces.itemsize(INT8)
    V_BYTES: gl.constexpr = pieces.itemsize(FP8)
    LOGITS: gl.constexpr = pieces.product(STEP, Q_BYTES)
    OUT: gl.constexpr = pieces.product(DIM, V_BYTES)
    WEIGHTS: gl.constexpr = pieces.left(OUT, V_BYTES)
    # In 8 bits weights are at most 2^8, so that small ones are not lost.
    UP: gl.constexpr = 8 if FP8 else 0
    K_FLAT: gl.constexpr = pieces.flat(DIM, Q_BYTES)
    q = q_smem._reinterpret(q_type, [GROUPS, 64, DIM], K_FLAT).index(PART)
    k_all = k_smem._reinterpret(q_type, [STAGES, STEP, DIM], K_FLAT)
    if FP8:
        v_all = v_smem._reinterpret(v_type, [STAGES, DIM, STEP], pieces.flat(TILE_K, 1))
    else:
        v_all = v_smem._reinterpret(v_type, [STAGES, STEP, DIM], pieces.flat(DIM, 2))
    PER: gl.constexpr = STEP // TILE_K
    TILE_Q: gl.constexpr = 64 * GROUPS * SPLIT
    step = 0
    turn = 0
    if PASS == 2:
        total = gl.load(again_ptr)
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        at = number
        if PASS == 2:
            at = gl.load(again_ptr + 1 + number)
        row = at % rows
        in_head = at // rows
        head = in_head % heads
        batch = in_head // heads
        in_plan = batch * plan_b + head * plan_h + row // SPLIT
        first = (row * GROUPS + PART) * 64
        count = gl.load(counts_ptr + in_plan)
        lists = (count + PER - 1) // PER
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
        # Of these queries in the first of the row's tiles that have masks.
        masks = within_ptr
        if MASKED:
            masks += in_plan.to(gl.int64) * most * (TILE_Q * pieces.words_of(TILE_K))
            masks += (row % SPLIT * GROUPS + PART) * 64 * pieces.words_of(TILE_K)
        mbarrier.wait(ready_q, turn & 1)
        if steps > 0:
            facts = pieces.known(
                0, lists, count, columns, in_plan, in_head, width, words, unit,
                indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
                TILE_K, STEP, TAIL, BIASED, INT8,
            )  # fmt: skip
            if MASKED:
                mask = pieces.mask(masks, 0, count, most, LOGITS, TILE_Q, TILE_K, STEP)
            stage = step % STAGES
            mbarrier.wait(ready_k.index(stage), (step // STAGES) & 1)
            s = warpgroup_mma(q, k_all.index(stage).permute((1, 0)), zero, use_acc=False)
            mbarrier.arrive(free_k.index(stage), count=1)
            s = pieces.prepared(
                s, 0, lists, facts, keys, columns, one, last,
                TILE_K, STEP, LOGITS, TAIL, BIASED, INT8,
            )  # fmt: skip
            if PASS == 1:
                # Of all keys of the tiles, so that a mask that has none of them has one too.
                best = pieces.highest(s, best, facts, TILE_K, STEP, LOGITS, INT8)
            if MASKED:
                s = pieces.masked(s, 0, most, mask, TILE_K, STEP, LOGITS)
            if PASS == 1:
                weights = pieces.weights_of(s, best, facts, TILE_K, STEP, LOGITS, INT8, UP)
            else:
                best, weights, shrink = pieces.softmax(
                    s, best, facts, TILE_K, STEP, LOGITS, INT8, UP
                )
            parts = pieces.sums_in_threads(weights, STEP)
            if not FP8:
                weights = pieces.operand(weights, v_type, STEP, WEIGHTS, FP8)
            facts = pieces.known(
                gl.minimum(1, steps - 1), lists, count, columns, in_plan, in_head, width, words,
                unit, indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
                TILE_K, STEP, TAIL, BIASED, INT8,
            )  # fmt: skip
            for i in range(1, steps):
                before = step % STAGES
                before_phase = (step // STAGES) & 1
                step += 1
                stage = step % STAGES
                mbarrier.wait(ready_k.index(stage), (step // STAGES) & 1)
                mbarrier.wait(ready_v.index(before), before_phase)
                s_next = warpgroup_mma(
                    q, k_all.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
                )
                if FP8:
                    v = v_all.index(before).permute((1, 0))
                else:
                    v = v_all.index(before)
                if FP8:
                    # Only now: from step to step a register would carry one byte.
                    weights = pieces.operand(weights, v_type, STEP, WEIGHTS, FP8)
                out_next = warpgroup_mma(weights, v, out, is_async=True)
                # A step ahead: a scale is found through the number of its tile.
                coming = pieces.known(
                    gl.minimum(i + 1, steps - 1), lists, count, columns, in_plan, in_head, width,
                    words, unit, indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
                    TILE_K, STEP, TAIL, BIASED, INT8,
                )  # fmt: skip
                if MASKED:
                    mask = pieces.mask(masks, i, count, most, LOGITS, TILE_Q, TILE_K, STEP)
                s = warpgroup_mma_wait(1, deps=[s_next])
                mbarrier.arrive(free_k.index(stage), count=1)
                s = pieces.prepared(
                    s, i, lists, facts, keys, columns, one, last,
                    TILE_K, STEP, LOGITS, TAIL, BIASED, INT8,
                )  # fmt: skip
                if MASKED:
                    s = pieces.masked(s, i, most, mask, TILE_K, STEP, LOGITS)
                if PASS == 1:
                    weights = pieces.weights_of(s, best, facts, TILE_K, STEP, LOGITS, INT8, UP)
                    parts += pieces.sums_in_threads(weights, STEP)
                else:
                    best, weights, shrink = pieces.softmax(
                        s, best, facts, TILE_K, STEP, LOGITS, INT8, UP
                    )
                    parts = pieces.times_rows(parts, shrink)
                    parts += pieces.sums_in_threads(weights, STEP)
                out = warpgroup_mma_wait(0, deps=[out_next])
                mbarrier.arrive(free_v.index(before), count=1)
                if PASS != 1:
                    out = pieces.times_rows(out, shrink)
                if not FP8:
                    weights = pieces.operand(weights, v_type, STEP, WEIGHTS, FP8)
                facts = coming
            stage = step % STAGES
            mbarrier.wait(ready_v.index(stage), (step // STAGES) & 1)
            if FP8:
                v = v_all.index(stage).permute((1, 0))
            else:
                v = v_all.index(stage)
            if FP8:
                weights = pieces.operand(weights, v_type, STEP, WEIGHTS, FP8)
            out = warpgroup_mma(weights, v, out)
            mbarrier.arrive(free_v.index(stage), count=1)
            step += 1
            weight = gl.convert_layout(gl.sum(parts, 1), gl.SliceLayout(1, LOGITS))
            if PASS == 1:
                # Above 2^100. What is no number is neither; a maximum would pass over it.
                beyond = gl.max(gl.where(gl.abs(out) < float("inf"), 0, 1), 1)
                beyond = gl.convert_layout(beyond, gl.SliceLayout(1, LOGITS))
                beyond = gl.where(weight <= 1.2676506e30, beyond, 1)
                if MASKED:
                    # Below 2^-100: the reference was of keys that this query does not attend to.
                    here = first + gl.arange(0, 64, gl.SliceLayout(1, LOGITS)) < queries
                    beyond = gl.where(here & (weight < 7.8886e-31), 1, beyond)
                if gl.max(beyond, 0) != 0:
                    place = gl.atomic_add(again_ptr, 1)
                    gl.store(again_ptr + 1 + place, at)
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
        out = pieces.times_rows(out, 1.0 / some)
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
    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, within_ptr, left_out_ptr,
    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr, again_ptr,
    out_b, out_h, out_l, plan_b, plan_h,
    heads, queries, keys, rows, columns, width, most, words, total, factor, one, last,
    DIM: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr, SPLIT: gl.constexpr, TAIL: gl.constexpr, BIASED: gl.constexpr,
    MASKED: gl.constexpr, INT8: gl.constexpr, FP8: gl.constexpr, PASS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Block attention; as many programs as run at once, each takes every so many-th query tile.

    q, k and, 16-bit, v through descriptors of `[B, H, L, DIM]`, with `FP8` v of `[B, H, DIM, L]` as
    `quantise_kernels` makes it; pooled keys and values likewise. out by its strides, contiguous in
    its last dimension; lse `[B, H, queries]`. indices, counts, bias and left_out (`words` of 32
    tiles) contiguous, with strides `plan_b` and `plan_h` in rows of the plan; a row of the plan is
    `SPLIT` of the kernel's, which have `GROUPS` x 64 queries. within likewise, masks of the first
    `most` entries of each row. `total` is B x H x rows. `factor`: the scale times log2(e), above 0;
    `one` and `last`: what a pooled token of a whole and of the last tile weighs, as a logit.
    `q_scale [B, H, queries / 64]`, `k_scale [B, H, columns]`,
    `tail_scale [B, H, columns / STEP]`, `v_scale [B, H, DIM]`, `shift [B, H, queries]` (added to
    the log-sum-exp) are of 8-bit operands.

    `PASS`: 0, everything with the largest logit so far; 1, with that of the first step, and those
    that need it to again (their number, then they); 2, these, as 0 does.
    """
    q_type: gl.constexpr = q_desc.dtype
    v_type: gl.constexpr = v_desc.dtype
    Q_BYTES: gl.constexpr = pieces.itemsize(INT8)
    K_FLAT: gl.constexpr = pieces.flat(DIM, Q_BYTES)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q_type, [GROUPS, 64, DIM], K_FLAT)
    k_smem = gl.allocate_shared_memory(q_type, [STAGES, STEP, DIM], K_FLAT)
    if FP8:
        v_smem = gl.allocate_shared_memory(v_type, [STAGES, DIM, STEP], pieces.flat(TILE_K, 1))
    else:
        v_smem = gl.allocate_shared_memory(v_type, [STAGES, STEP, DIM], pieces.flat(DIM, 2))
    ready_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    free_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(ready_q, count=1)
    mbarrier.init(free_q, count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(free_k.index(i), count=GROUPS)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(free_v.index(i), count=GROUPS)
    fence_async_shared()
    # Arguments are written out each time: a constexpr in a tuple in a tuple is none to Triton.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, within_ptr, left_out_ptr,
                    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr, again_ptr,
                    out_b, out_h, out_l, plan_b, plan_h,
                    heads, queries, keys, rows, columns, width, most, words, total,
                    factor, one, last,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, BIASED, MASKED, INT8, FP8,
                    PASS, 0,
                )),
                (_compute, (
                    q_smem, k_smem, v_smem, ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, within_ptr, left_out_ptr,
                    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr, again_ptr,
                    out_b, out_h, out_l, plan_b, plan_h,
                    heads, queries, keys, rows, columns, width, most, words, total,
                    factor, one, last,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, BIASED, MASKED, INT8, FP8,
                    PASS, 1,
                )),
                (loading.load, (
                    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc,
                    indices_ptr, counts_ptr, again_ptr, q_smem, k_smem, v_smem,
                    ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    plan_b, plan_h, heads, rows, columns, width, total,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, INT8, FP8, PASS,
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
                    out_ptr, lse_ptr, indices_ptr, counts_ptr, bias_ptr, within_ptr, left_out_ptr,
                    q_scale_ptr, k_scale_ptr, tail_scale_ptr, v_scale_ptr, shift_ptr, again_ptr,
                    out_b, out_h, out_l, plan_b, plan_h,
                    heads, queries, keys, rows, columns, width, most, words, total,
                    factor, one, last,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, BIASED, MASKED, INT8, FP8,
                    PASS, 0,
                )),
                (loading.load, (
                    q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc,
                    indices_ptr, counts_ptr, again_ptr, q_smem, k_smem, v_smem,
                    ready_q, free_q, ready_k, free_k, ready_v, free_v,
                    plan_b, plan_h, heads, rows, columns, width, total,
                    DIM, TILE_K, STEP, STAGES, GROUPS, SPLIT, TAIL, INT8, FP8, PASS,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
