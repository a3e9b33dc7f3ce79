"""The kernels of `scores`. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _log2(x):
    """The logarithm of numbers of which some are 0."""
    return tl.where(x == 0, -float("inf"), tl.math.log2(tl.where(x == 0, 1.0, x)))


@triton.jit
def _finite(x):
    """What is taken from logits before exponentials: 0 for infinities, which would be no number."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def group_logits(
    a_ptr, b_ptr, added_ptr, out_ptr,
    a_batch, a_head, a_row, b_batch, b_head, b_row, heads, rows, columns, groups, scale,
    DIM: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    SUMS: tl.constexpr, ADDED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of products, of which each `GROUP` columns leave one number.

    a `[B, heads, rows, DIM]` and b `[B, heads, columns, DIM]` of any strides but 1 of DIM, added
    `[columns]` float32, out `[B * heads, rows, groups]`; programs that follow each other share
    columns. `WIDE`: Triton's interpreter multiplies 16 bits wrongly.
    """
    head = tl.program_id(1).to(tl.int64)
    blocks = (rows + ROWS - 1) // ROWS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) // blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    a_ptr += head // heads * a_batch + head % heads * a_head + row[:, None].to(tl.int64) * a_row
    b_ptr += head // heads * b_batch + head % heads * b_head + column[None].to(tl.int64) * b_row
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, DIM, STEP):
        dims = start + tl.arange(0, STEP)
        a = tl.load(a_ptr + dims[None], mask=is_row[:, None] & (dims < DIM)[None], other=0.0)
        b = tl.load(b_ptr + dims[:, None], mask=is_column[None] & (dims < DIM)[:, None], other=0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    logits = logits * (scale * LOG2_E)
    if ADDED:
        logits += tl.load(added_ptr + column, mask=is_column, other=0.0)[None] * LOG2_E
    logits = tl.where(is_column[None], logits, -float("inf"))
    parts = tl.reshape(logits, [ROWS, COLUMNS // GROUP, GROUP])
    highest = tl.max(parts, 2)
    if SUMS:
        safe = _finite(highest)
        found = safe + _log2(tl.sum(tl.math.exp2(parts - safe[:, :, None]), 2))
    else:
        # A maximum passes over what is no number.
        wrong = tl.max((parts != parts).to(tl.int32), 2)
        found = tl.where(wrong != 0, float("nan"), highest)
    group = block * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    to = out_ptr + head * rows * groups + row[:, None].to(tl.int64) * groups + group[None]
    tl.store(to, found / LOG2_E, mask=is_row[:, None] & (group < groups)[None])


@triton.jit
def join_rows(
    logits_ptr, added_ptr, out_ptr, rows, columns, tiles,
    HIGH: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, SUMS: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """`HIGH` rows of one head become one.

    logits `[N, rows, columns]`, added `[rows]` float32, out `[N, tiles, columns]`.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    line = tl.arange(0, PADDED)
    row = tile * HIGH + line
    is_row = (line < HIGH) & (row < rows)
    logits_ptr += (head * rows + row[:, None].to(tl.int64)) * columns
    best = tl.full([PADDED], -float("inf"), tl.float32)
    wrong = tl.zeros([PADDED], tl.int32)
    total = tl.zeros([PADDED], tl.float32)
    for start in range(0, columns, STEP):
        at = start + tl.arange(0, STEP)
        here = is_row[:, None] & (at < columns)[None]
        x = tl.load(logits_ptr + at[None], mask=here, other=-float("inf")) * LOG2_E
        highest = tl.maximum(best, tl.max(x, 1))
        if SUMS:
            safe = _finite(highest)
            total = total * tl.math.exp2(best - safe)
            total += tl.sum(tl.math.exp2(x - safe[:, None]), 1)
        else:
            wrong = tl.maximum(wrong, tl.max((x != x).to(tl.int32), 1))
        best = highest
    if SUMS:
        whole = _finite(best) + _log2(total)
    else:
        whole = tl.where(wrong != 0, float("nan"), best)
    whole = tl.where(is_row, whole, 0.0)
    if ADDED:
        whole -= tl.load(added_ptr + row, mask=is_row, other=0.0) * LOG2_E
    for start in range(0, columns, STEP):
        at = start + tl.arange(0, STEP)
        here = is_row[:, None] & (at < columns)[None]
        x = tl.load(logits_ptr + at[None], mask=here, other=-float("inf")) * LOG2_E
        # Rows that are not there are left out, also where the others are no numbers.
        x = tl.where(is_row[:, None], x - whole[:, None], -float("inf"))
        highest = tl.max(x, 0)
        if SUMS:
            safe = _finite(highest)
            found = safe + _log2(tl.sum(tl.math.exp2(x - safe[None]), 0))
        else:
            lost = tl.max((x != x).to(tl.int32), 0)
            found = tl.where(lost != 0, float("nan"), highest)
        to = out_ptr + (head * tiles + tile) * columns + at
        tl.store(to, found / LOG2_E, mask=at < columns)


@triton.jit
def mean_attention(
    q_ptr, k_ptr, whole_ptr, out_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, heads, queries, keys, scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of keys the mean over all queries of `exp(scale * q @ k.mT - whole)`.

    q `[B, heads, queries, DIM]` and k `[B, heads, keys, DIM]` of any strides but 1 of DIM, whole
    `[B * heads, queries]` and out `[B * heads, keys]` float32.
    """
    head = tl.program_id(1).to(tl.int64)
    column, dims = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, PADDED_DIM)
    is_key, is_dim = column < keys, dims < DIM
    k_ptr += head // heads * k_batch + head % heads * k_head
    q_ptr += head // heads * q_batch + head % heads * q_head
    k = tl.load(
        k_ptr + column[None].to(tl.int64) * k_row + dims[:, None],
        mask=is_key[None] & is_dim[:, None],
        other=0.0,
    )
    if WIDE:
        k = k.to(tl.float32)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        is_query = row < queries
        q = tl.load(
            q_ptr + row[:, None].to(tl.int64) * q_row + dims[None],
            mask=is_query[:, None] & is_dim[None],
            other=0.0,
        )
        if WIDE:
            q = q.to(tl.float32)
        whole = tl.load(whole_ptr + head * queries + row, mask=is_query, other=float("inf"))
        logits = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2_E)
        total += tl.sum(tl.math.exp2(logits - whole[:, None] * LOG2_E), 0)
    tl.store(out_ptr + head * keys + column, total / queries, mask=is_key)
