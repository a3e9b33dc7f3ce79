"""The kernels of the `triton` backend. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

ROUND: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 x 2^23: added and taken away, it rounds what is below 2^22, halves to even numbers."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """Matrix product, summed in float32; `WIDE`: of float32, as the interpreter has no bfloat16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(ptr, at, here, step, dim_step, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
          PACKED: tl.constexpr):  # fmt: skip
    """Rows `at` that are `here`, `[tokens, PADDED_DIM]`; `PACKED`: two channels to a byte."""
    at = at.to(tl.int64)[:, None]
    if PACKED:
        half = tl.arange(0, PADDED_DIM // 2)
        mask = here[:, None] & (half < (DIM + 1) // 2)[None]
        both = tl.load(ptr + at * step + half[None] * dim_step, mask=mask, other=0).to(tl.int32)
        rows = tl.interleave((both << 28) >> 28, both >> 4).to(tl.int8)
    else:
        dims = tl.arange(0, PADDED_DIM)
        mask = here[:, None] & (dims < DIM)[None]
        rows = tl.load(ptr + at * step + dims[None] * dim_step, mask=mask, other=0)
    return rows


@triton.jit
def _logits(q, k, q_scale, k_scale_ptr, at, here, SHARE: tl.constexpr, WIDE: tl.constexpr):
    """Queries times keys; of whole numbers times both scales. `SHARE` tokens share one of keys."""
    if q.dtype == tl.int8:
        k_scale = tl.load(k_scale_ptr + at // SHARE, mask=here, other=0.0)
        logits = tl.dot(q, tl.trans(k)).to(tl.float32) * q_scale[:, None] * k_scale[None]
    else:
        logits = _dot(q, tl.trans(k), WIDE)
    return logits


@triton.jit
def _join(logits, values, v_scale_ptr, best, total, out, DIM: tl.constexpr,
          PADDED_DIM: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One step of the softmax over the keys as they come: `logits` in powers of two.

    Values in whole numbers have a scale for each channel, weights then are whole numbers to `MOST`.
    """
    highest = tl.maximum(best, tl.max(logits, 1))
    # A row that has no key yet: no infinity minus infinity.
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.math.exp2(logits - safe[:, None])
    shrink = tl.math.exp2(best - safe)
    total = total * shrink + tl.sum(weights, 1)
    if values.dtype == tl.int8:
        largest = tl.max(weights, 1)
        unit = tl.where(largest > 0, MOST / tl.where(largest > 0, largest, 1.0), 0.0)
        whole = (weights * unit[:, None] + ROUND) - ROUND
        dims = tl.arange(0, PADDED_DIM)
        v_scale = tl.load(v_scale_ptr + dims, mask=dims < DIM, other=0.0)
        part = tl.dot(whole.to(tl.int8), values).to(tl.float32)
        part = part * (largest / MOST)[:, None] * v_scale[None]
    else:
        part = _dot(weights.to(values.dtype), values, WIDE)
    return highest, total, out * shrink[:, None] + part


@triton.jit
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    within_ptr,
    pooled_k_ptr,
    pooled_v_ptr,
    left_out_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr, pooled_k_scale_ptr, pooled_v_scale_ptr, shift_ptr,
    q_b, q_h, q_l, q_d,
    k_b, k_h, k_l, k_d,
    v_b, v_h, v_l, v_d,
    out_b, out_h, out_l,
    plan_b, plan_h,
    heads, queries, keys, rows, columns, width, most,
    scale,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_POOLED: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
    SHARE_Q: tl.constexpr,
    SHARE_K: tl.constexpr,
    SHARE_POOLED: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head.

    q, k, v `[B, H, L, DIM]` by their strides; out contiguous in its last dimension; lse
    `[B, H, queries]`, indices, counts, bias and left_out contiguous with strides `plan_b` and
    `plan_h` in rows, left_out with a bit a tile; so is within, `TILE_Q` times `TILE_K / 32` words
    of each of the first `most` entries of a row; pooled keys and values `[B, H, columns, DIM]`
    contiguous.

    `QK`, `PV`: 8 or 4 where q and k, or v, are whole numbers of so many bits, else 0; those of 4
    bits are packed, all as `quantise.whole_numbers` makes them, pooled ones too. Scales of q, k and
    pooled keys `[B, H, tokens / SHARE rounded up]`; of values `[B, H, tiles, DIM]`, pooled ones
    `[B, H, columns / TILE_POOLED rounded up, DIM]`; shift `[B, H, queries]` goes to lse.
    """
    row = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    in_plan = batch * plan_b + head * plan_h + row

    in_head = batch * heads + head
    line = tl.arange(0, TILE_Q)
    inside = tl.arange(0, TILE_K)
    WORDS: tl.constexpr = (TILE_K + 31) // 32
    tokens = row * TILE_Q + line
    is_query = tokens < queries
    # Folded, so that the softmax works with powers of two.
    factor = scale * LOG2_E
    q_ptr += batch * q_b + head * q_h
    q = _load(q_ptr, tokens, is_query, q_l, q_d, DIM, PADDED_DIM, QK == 4)
    q_scale = 1.0
    if QK:
        to_scale = in_head * ((queries + SHARE_Q - 1) // SHARE_Q) + tokens // SHARE_Q
        q_scale = tl.load(q_scale_ptr + to_scale, mask=is_query, other=0.0)
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h
    k_scale_ptr += in_head * ((keys + SHARE_K - 1) // SHARE_K)
    v_scale_ptr += in_head * columns * DIM
    MOST: tl.constexpr = 15 if PV == 4 else 127
    best = tl.full([TILE_Q], -float("inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    out = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)

    count = tl.load(counts_ptr + in_plan)
    for place in range(count):
        tile = tl.load(indices_ptr + in_plan * width + place)
        at = tile * TILE_K + inside
        is_key = at < keys
        k = _load(k_ptr, at, is_key, k_l, k_d, DIM, PADDED_DIM, QK == 4)
        logits = _logits(q, k, q_scale, k_scale_ptr, at, is_key, SHARE_K, WIDE) * factor
        if BIASED:
            logits += tl.load(bias_ptr + in_plan * width + place) * LOG2_E
        logits = tl.where(is_key[None], logits, -float("inf"))
        if MASKED and place < most:
            # A word for 32 keys at a time: a thread that has several of a query's loads it once.
            entry = within_ptr + (in_plan * most + place) * (TILE_Q * WORDS) + line * WORDS
            words = tl.load(entry)[:, None] + inside[None] * 0
            for i in tl.static_range(1, WORDS):
                words = tl.where((inside // 32 == i)[None], tl.load(entry + i)[:, None], words)
            attended = ((words >> (inside % 32)[None]) & 1) != 0
            logits = tl.where(attended, logits, -float("inf"))
        v = _load(v_ptr, at, is_key, v_l, v_d, DIM, PADDED_DIM, PV == 4)
        best, total, out = _join(
            logits, v, v_scale_ptr + tile * DIM, best, total, out, DIM, PADDED_DIM, MOST, WIDE
        )

    if TAIL:
        K_WIDTH: tl.constexpr = (DIM + 1) // 2 if QK == 4 else DIM
        V_WIDTH: tl.constexpr = (DIM + 1) // 2 if PV == 4 else DIM
        pooled_k_ptr += in_head * columns * K_WIDTH
        pooled_v_ptr += in_head * columns * V_WIDTH
        pooled_k_scale_ptr += in_head * ((columns + SHARE_POOLED - 1) // SHARE_POOLED)
        pooled_v_scale_ptr += in_head * ((columns + TILE_POOLED - 1) // TILE_POOLED) * DIM
        for start in range(0, columns, TILE_POOLED):
            at = start + tl.arange(0, TILE_POOLED)
            is_tile = at < columns
            k = _load(pooled_k_ptr, at, is_tile, K_WIDTH, 1, DIM, PADDED_DIM, QK == 4)
            logits = _logits(
                q, k, q_scale, pooled_k_scale_ptr, at, is_tile, SHARE_POOLED, WIDE
            ) * factor  # fmt: skip
            words = left_out_ptr + in_plan * ((columns + 31) // 32)
            stands = ((tl.load(words + at // 32, mask=is_tile, other=0) >> (at % 32)) & 1) != 0
            length = tl.minimum(keys - at * TILE_K, TILE_K)
            weight = tl.math.log2(tl.maximum(length, 1).to(tl.float32))
            logits = tl.where(stands[None], logits + weight[None], -float("inf"))
            v = _load(pooled_v_ptr, at, is_tile, V_WIDTH, 1, DIM, PADDED_DIM, PV == 4)
            v_scales = pooled_v_scale_ptr + start // TILE_POOLED * DIM
            best, total, out = _join(
                logits, v, v_scales, best, total, out, DIM, PADDED_DIM, MOST, WIDE
            )

    # A query without any key: output 0, log-sum-exp minus infinity.
    some = tl.where(total == 0, 1.0, total)
    out = out / some[:, None]
    lse = (best + tl.math.log2(some)) / LOG2_E
    if QK:
        lse += tl.load(shift_ptr + in_head * queries + tokens, mask=is_query, other=0.0)
    lse = tl.where(total == 0, -float("inf"), lse)
    dims = tl.arange(0, PADDED_DIM)
    to = out_ptr + batch * out_b + head * out_h + tokens[:, None].to(tl.int64) * out_l + dims[None]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & (dims < DIM)[None])
    tl.store(lse_ptr + in_head * queries + tokens, lse, mask=is_query)
