"""The kernels of the backward pass. Importing this needs triton.

With P = e^(s q_i k_t + b - lse_i) and Δ_i = dO_i · O_i - dlse_i: dS = P (dO_i · v_t - Δ_i), and
dV = Pᵀ dO, dQ = s dS K, dK = s dSᵀ Q, db = the sum of dS over its tile. Powers are of two, so what
stands in an exponent has been multiplied by log2 e.

Tokens behind the last are never read: their place is taken by the last token, and their weight is
0 because `prepare` gives such queries a log-sum-exp of infinity, as it does for a query without a
key. Every program writes its own numbers, so that two runs are bit for bit the same.
"""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

from .triton_kernels import LOG2_E, _dot


@triton.jit
def _rows(start, at, stride, across, in_dim, WHOLE: tl.constexpr):
    """Rows `at` of a matrix; `across`: offsets in a row. `WHOLE`: no padding of the row."""
    where = start + at[:, None].to(tl.int64) * stride + across[None]
    if WHOLE:
        return tl.load(where)
    return tl.load(where, mask=in_dim[None], other=0.0)


@triton.jit
def prepare(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    out_b, out_h, out_l, out_d,
    dout_b, dout_h, dout_l, dout_d,
    dlse_b, dlse_h, dlse_l,
    heads, queries, padded,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps in powers of two and Δ, `[B, H, padded]`, of BLOCK queries of one head."""
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_query = tokens < queries
    dims = tl.arange(0, PADDED_DIM).to(tl.int64)
    here = is_query[:, None] & (dims < DIM)[None]
    at = tokens.to(tl.int64)
    out_ptr += batch * out_b + head * out_h
    dout_ptr += batch * dout_b + head * dout_h
    out = tl.load(out_ptr + at[:, None] * out_l + dims[None] * out_d, mask=here, other=0.0)
    dout = tl.load(dout_ptr + at[:, None] * dout_l + dims[None] * dout_d, mask=here, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    dlse_ptr += batch * dlse_b + head * dlse_h
    delta -= tl.load(dlse_ptr + at * dlse_l, mask=is_query, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + pair * queries + at, mask=is_query, other=-float("inf"))
    empty = lse == -float("inf")
    tl.store(lse2_ptr + pair * padded + at, tl.where(empty, float("inf"), lse * LOG2_E))
    tl.store(delta_ptr + pair * padded + at, tl.where(empty, 0.0, delta))


@triton.jit
def queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    indices_ptr,
    counts_ptr,
    bias_ptr,
    pooled_k_ptr,
    pooled_v_ptr,
    left_out_ptr,
    dq_ptr,
    dbias_ptr,
    q_b, q_h, q_l, q_d,
    k_b, k_h, k_l, k_d,
    v_b, v_h, v_l, v_d,
    dout_b, dout_h, dout_l, dout_d,
    dq_b, dq_h, dq_l, dq_d,
    plan_b, plan_h,
    heads, queries, padded, keys, rows, columns, width,
    scale,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SUB_Q: tl.constexpr,
    SUB_K: tl.constexpr,
    BIASED: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    RAGGED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of SUB_Q queries of one head, and their part in those of the bias.

    plan_b, plan_h: strides of the plan in heads of the plan. RAGGED: the last key tile is. dbias
    `[B, H, padded / SUB_Q, width * TILE_K / SUB_K]`, full of 0.
    """
    PARTS_K: tl.constexpr = TILE_K // SUB_K
    WHOLE: tl.constexpr = DIM == PADDED_DIM
    part = tl.program_id(0)
    row = part // (TILE_Q // SUB_Q)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads
    in_plan = (batch * plan_b + head * plan_h) * rows + row

    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < DIM
    dims = dims.to(tl.int64)
    k_ptr += batch * k_b + head * k_h
    v_ptr += batch * v_b + head * v_h
    across_k = dims * k_d
    across_v = dims * v_d
    tokens = part * SUB_Q + tl.arange(0, SUB_Q)
    at = tl.minimum(tokens, queries - 1)
    q = _rows(q_ptr + batch * q_b + head * q_h, at, q_l, dims * q_d, in_dim, WHOLE)
    dout = _rows(
        dout_ptr + batch * dout_b + head * dout_h, at, dout_l, dims * dout_d, in_dim, WHOLE
    )
    lse2 = tl.load(lse2_ptr + pair * padded + tokens)
    delta = tl.load(delta_ptr + pair * padded + tokens)
    factor = scale * LOG2_E
    dq = tl.zeros([SUB_Q, PADDED_DIM], tl.float32)

    count = tl.load(counts_ptr + in_plan)
    indices_ptr += in_plan * width
    bias_ptr += in_plan * width
    dbias_ptr += (pair * (padded // SUB_Q) + part) * width * PARTS_K
    inside = tl.arange(0, SUB_K)
    # Loaded a step ahead, so that nothing waits for it.
    upcoming = tl.load(indices_ptr, mask=count > 0, other=0)
    for step in range(count * PARTS_K):
        tokens_k = upcoming * TILE_K + (step % PARTS_K) * SUB_K + inside
        later = (step + 1) // PARTS_K
        upcoming = tl.load(indices_ptr + later, mask=later < count, other=0)
        at_k = tl.minimum(tokens_k, keys - 1)
        k = _rows(k_ptr, at_k, k_l, across_k, in_dim, WHOLE)
        v = _rows(v_ptr, at_k, v_l, across_v, in_dim, WHOLE)
        logits = _dot(q, tl.trans(k), WIDE)
        dweights = _dot(dout, tl.trans(v), WIDE)
        logits = logits * factor - lse2[:, None]
        if BIASED:
            logits += tl.load(bias_ptr + step // PARTS_K) * LOG2_E
        if RAGGED:
            logits = tl.where((tokens_k < keys)[None], logits, -float("inf"))
        dlogits = tl.math.exp2(logits) * (dweights - delta[:, None])
        if BIAS_GRAD:
            tl.store(dbias_ptr + step, tl.sum(tl.sum(dlogits, 1), 0))
        dq += _dot(dlogits.to(k.dtype), k, WIDE)

    if TAIL:
        pooled_k_ptr += pair * columns * DIM
        pooled_v_ptr += pair * columns * DIM
        left_out_ptr += in_plan * ((columns + 31) // 32)
        for start in range(0, columns, SUB_K):
            tile = start + inside
            at_k = tl.minimum(tile, columns - 1)
            k = _rows(pooled_k_ptr, at_k, DIM, dims, in_dim, WHOLE)
            bits = tl.load(left_out_ptr + tile // 32, mask=tile < columns, other=0)
            stands = ((bits >> (tile % 32)) & 1) != 0
            length = tl.minimum(keys - at_k * TILE_K, TILE_K)
            weight = tl.math.log2(length.to(tl.float32))
            logits = _dot(q, tl.trans(k), WIDE) * factor + (weight[None] - lse2[:, None])
            weights = tl.math.exp2(tl.where(stands[None], logits, -float("inf")))
            v = _rows(pooled_v_ptr, at_k, DIM, dims, in_dim, WHOLE)
            dlogits = weights * (_dot(dout, tl.trans(v), WIDE) - delta[:, None])
            dq += _dot(dlogits.to(k.dtype), k, WIDE)

    to = dq_ptr + batch * dq_b + head * dq_h + tokens[:, None].to(tl.int64) * dq_l
    here = (tokens < queries)[:, None] & in_dim[None]
    tl.store(to + dims[None] * dq_d, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here)


@triton.jit
def keys_values(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    rows_t_ptr,
    starts_ptr,
    bias_t_ptr,
    pooled_dk_ptr,
    pooled_dv_ptr,
    dk_ptr,
    dv_ptr,
    q_b, q_h, q_l, q_d,
    k_b, k_h, k_l, k_d,
    v_b, v_h, v_l, v_d,
    dout_b, dout_h, dout_l, dout_d,
    dk_b, dk_h, dk_l, dk_d,
    dv_b, dv_h, dv_l, dv_d,
    plan_b, plan_h,
    heads, queries, padded, keys, columns,
    scale,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SUB_Q: tl.constexpr,
    SUB_K: tl.constexpr,
    BIASED: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of SUB_K keys and values of one head.

    The query tiles that keep key tile j of head h of the plan are `rows_t[starts[h * columns + j]]`
    up to the next start; bias_t lies beside them. pooled_dk and pooled_dv `[B, H, columns, DIM]`
    are spread over the tokens that a pooled one stands for.
    """
    PARTS_Q: tl.constexpr = TILE_Q // SUB_Q
    WHOLE: tl.constexpr = DIM == PADDED_DIM
    part = tl.program_id(0)
    column = part // (TILE_K // SUB_K)
    pair = tl.program_id(1).to(tl.int64)
    batch = pair // heads
    head = pair % heads

    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < DIM
    dims = dims.to(tl.int64)
    q_ptr += batch * q_b + head * q_h
    dout_ptr += batch * dout_b + head * dout_h
    lse2_ptr += pair * padded
    delta_ptr += pair * padded
    across_q = dims * q_d
    across_dout = dims * dout_d
    tokens = part * SUB_K + tl.arange(0, SUB_K)
    at = tl.minimum(tokens, keys - 1)
    k = _rows(k_ptr + batch * k_b + head * k_h, at, k_l, dims * k_d, in_dim, WHOLE)
    v = _rows(v_ptr + batch * v_b + head * v_h, at, v_l, dims * v_d, in_dim, WHOLE)
    factor = scale * LOG2_E
    dk = tl.zeros([SUB_K, PADDED_DIM], tl.float32)
    dv = tl.zeros([SUB_K, PADDED_DIM], tl.float32)

    starts_ptr += (batch * plan_b + head * plan_h) * columns + column
    first = tl.load(starts_ptr)
    count = tl.load(starts_ptr + 1) - first
    rows_t_ptr += first
    bias_t_ptr += first
    inside = tl.arange(0, SUB_Q)
    # Loaded a step ahead, so that nothing waits for it.
    upcoming = tl.load(rows_t_ptr, mask=count > 0, other=0)
    for step in range(count * PARTS_Q):
        tokens_q = upcoming * TILE_Q + (step % PARTS_Q) * SUB_Q + inside
        later = (step + 1) // PARTS_Q
        upcoming = tl.load(rows_t_ptr + later, mask=later < count, other=0)
        at_q = tl.minimum(tokens_q, queries - 1)
        q = _rows(q_ptr, at_q, q_l, across_q, in_dim, WHOLE)
        shift = tl.load(lse2_ptr + tokens_q)
        if BIASED:
            shift -= tl.load(bias_t_ptr + step // PARTS_Q) * LOG2_E
        # Keys behind the last are not masked: nobody reads their gradients.
        weights = tl.math.exp2(_dot(k, tl.trans(q), WIDE) * factor - shift[None])
        dout = _rows(dout_ptr, at_q, dout_l, across_dout, in_dim, WHOLE)
        dv += _dot(weights.to(dout.dtype), dout, WIDE)
        delta = tl.load(delta_ptr + tokens_q)
        dlogits = weights * (_dot(v, tl.trans(dout), WIDE) - delta[None])
        dk += _dot(dlogits.to(q.dtype), q, WIDE)

    if TAIL:
        share = 1.0 / tl.minimum(keys - column * TILE_K, TILE_K).to(tl.float32)
        at_pooled = (pair * columns + column) * DIM + dims
        dk += (tl.load(pooled_dk_ptr + at_pooled, mask=in_dim, other=0.0) * share)[None]
        dv += (tl.load(pooled_dv_ptr + at_pooled, mask=in_dim, other=0.0) * share)[None]

    here = (tokens < keys)[:, None] & in_dim[None]
    to = dk_ptr + batch * dk_b + head * dk_h + tokens[:, None].to(tl.int64) * dk_l
    tl.store(to + dims[None] * dk_d, (dk * scale).to(dk_ptr.dtype.element_ty), mask=here)
    to = dv_ptr + batch * dv_b + head * dv_h + tokens[:, None].to(tl.int64) * dv_l
    tl.store(to + dims[None] * dv_d, dv.to(dv_ptr.dtype.element_ty), mask=here)


@triton.jit
def pooled(
    q_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    pooled_k_ptr,
    pooled_v_ptr,
    left_out_ptr,
    dk_ptr,
    dv_ptr,
    q_b, q_h, q_l, q_d,
    dout_b, dout_h, dout_l, dout_d,
    plan_b, plan_h,
    heads, queries, padded, keys, rows, columns, steps,
    scale,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SUB_Q: tl.constexpr,
    SUB_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of SUB_K pooled keys and values of one head, from `steps` times SUB_Q queries.

    dk, dv `[splits of the queries, B, H, columns, DIM]`, in float32 and without the scale.
    """
    WHOLE: tl.constexpr = DIM == PADDED_DIM
    split = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    batch = pair // heads
    head = pair % heads

    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < DIM
    dims = dims.to(tl.int64)
    q_ptr += batch * q_b + head * q_h
    dout_ptr += batch * dout_b + head * dout_h
    lse2_ptr += pair * padded
    delta_ptr += pair * padded
    across_q = dims * q_d
    across_dout = dims * dout_d
    tiles = tl.program_id(0) * SUB_K + tl.arange(0, SUB_K)
    is_tile = tiles < columns
    at = tl.minimum(tiles, columns - 1)
    k = _rows(pooled_k_ptr + pair * columns * DIM, at, DIM, dims, in_dim, WHOLE)
    v = _rows(pooled_v_ptr + pair * columns * DIM, at, DIM, dims, in_dim, WHOLE)
    weight = tl.math.log2(tl.minimum(keys - at * TILE_K, TILE_K).to(tl.float32))
    words = (columns + 31) // 32
    left_out_ptr += (batch * plan_b + head * plan_h) * rows * words
    factor = scale * LOG2_E
    dk = tl.zeros([SUB_K, PADDED_DIM], tl.float32)
    dv = tl.zeros([SUB_K, PADDED_DIM], tl.float32)

    inside = tl.arange(0, SUB_Q)
    last = tl.minimum((split + 1) * steps, padded // SUB_Q)
    for step in range(split * steps, last):
        tokens_q = step * SUB_Q + inside
        at_q = tl.minimum(tokens_q, queries - 1)
        q = _rows(q_ptr, at_q, q_l, across_q, in_dim, WHOLE)
        row = step * SUB_Q // TILE_Q
        bits = tl.load(left_out_ptr + row * words + tiles // 32, mask=is_tile, other=0)
        stands = ((bits >> (tiles % 32)) & 1) != 0
        shift = tl.load(lse2_ptr + tokens_q)
        logits = _dot(k, tl.trans(q), WIDE) * factor + (weight[:, None] - shift[None])
        weights = tl.math.exp2(tl.where(stands[:, None], logits, -float("inf")))
        dout = _rows(dout_ptr, at_q, dout_l, across_dout, in_dim, WHOLE)
        dv += _dot(weights.to(dout.dtype), dout, WIDE)
        delta = tl.load(delta_ptr + tokens_q)
        dlogits = weights * (_dot(v, tl.trans(dout), WIDE) - delta[None])
        dk += _dot(dlogits.to(q.dtype), q, WIDE)

    to = ((split * tl.num_programs(2) + pair) * columns + tiles[:, None]) * DIM + dims[None]
    here = is_tile[:, None] & in_dim[None]
    tl.store(dk_ptr + to, dk, mask=here)
    tl.store(dv_ptr + to, dv, mask=here)
