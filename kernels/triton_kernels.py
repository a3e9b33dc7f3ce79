"""The kernels of the `triton` backend. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """Matrix product, summed in float32; `WIDE`: of float32, as the interpreter has no bfloat16."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _join(logits, values, best, total, out, WIDE: tl.constexpr):
    """One step of the softmax over the keys as they come: `logits` in powers of two."""
    highest = tl.maximum(best, tl.max(logits, 1))
    # A row that has no key yet: no infinity minus infinity.
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.math.exp2(logits - safe[:, None])
    shrink = tl.math.exp2(best - safe)
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None] + _dot(weights.to(values.dtype), values, WIDE)
    return highest, total, out


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
    pooled_k_ptr,
    pooled_v_ptr,
    left_out_ptr,
    q_b, q_h, q_l, q_d,
    k_b, k_h, k_l, k_d,
    v_b, v_h, v_l, v_d,
    out_b, out_h, out_l,
    plan_b, plan_h,
    heads, queries, keys, rows, columns, width,
    scale,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_POOLED: tl.constexpr,
    BIASED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head.

    q, k, v `[B, H, L, DIM]` by their strides; out contiguous in its last dimension; lse
    `[B, H, queries]`, indices, counts, bias and left_out contiguous with strides `plan_b` and
    `plan_h` in rows; pooled keys and values `[B, H, columns, DIM]` contiguous.
    """
    row = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    in_plan = batch * plan_b + head * plan_h + row

    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < DIM
    tokens = row * TILE_Q + tl.arange(0, TILE_Q)
    is_query = tokens < queries
    # Folded, so that the softmax works with powers of two.
    factor = scale * LOG2_E
    q = tl.load(
        q_ptr + batch * q_b + head * q_h + tokens[:, None].to(tl.int64) * q_l + dims[None] * q_d,
        mask=is_query[:, None] & in_dim[None],
        other=0.0,
    )
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h
    best = tl.full([TILE_Q], -float("inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    out = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)

    count = tl.load(counts_ptr + in_plan)
    for place in range(count):
        tile = tl.load(indices_ptr + in_plan * width + place)
        at = tile * TILE_K + tl.arange(0, TILE_K)
        is_key = at < keys
        at = at.to(tl.int64)
        here = is_key[:, None] & in_dim[None]
        k = tl.load(k_ptr + at[:, None] * k_l + dims[None] * k_d, mask=here, other=0.0)
        logits = _dot(q, tl.trans(k), WIDE) * factor
        if BIASED:
            logits += tl.load(bias_ptr + in_plan * width + place) * LOG2_E
        logits = tl.where(is_key[None], logits, -float("inf"))
        v = tl.load(v_ptr + at[:, None] * v_l + dims[None] * v_d, mask=here, other=0.0)
        best, total, out = _join(logits, v, best, total, out, WIDE)

    if TAIL:
        pooled = (batch * heads + head) * columns
        for start in range(0, columns, TILE_POOLED):
            at = start + tl.arange(0, TILE_POOLED)
            is_tile = at < columns
            here = is_tile[:, None] & in_dim[None]
            to_pooled = (pooled + at[:, None]) * DIM + dims[None]
            k = tl.load(pooled_k_ptr + to_pooled, mask=here, other=0.0)
            logits = _dot(q, tl.trans(k), WIDE) * factor
            stands = tl.load(left_out_ptr + in_plan * columns + at, mask=is_tile, other=0) != 0
            length = tl.minimum(keys - at * TILE_K, TILE_K)
            weight = tl.math.log2(tl.maximum(length, 1).to(tl.float32))
            logits = tl.where(stands[None], logits + weight[None], -float("inf"))
            v = tl.load(pooled_v_ptr + to_pooled, mask=here, other=0.0)
            best, total, out = _join(logits, v, best, total, out, WIDE)

    # A query without any key: output 0, log-sum-exp minus infinity.
    some = tl.where(total == 0, 1.0, total)
    out = out / some[:, None]
    lse = tl.where(total == 0, -float("inf"), (best + tl.math.log2(some)) / LOG2_E)
    to = out_ptr + batch * out_b + head * out_h + tokens[:, None].to(tl.int64) * out_l + dims[None]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & in_dim[None])
    tl.store(lse_ptr + (batch * heads + head) * queries + tokens, lse, mask=is_query)
