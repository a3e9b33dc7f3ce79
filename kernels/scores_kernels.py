"""The kernel of `scores`. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def group_logits(
    a_ptr, b_ptr, added_ptr, out_ptr, rows, columns, groups, scale,
    DIM: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    SUMS: tl.constexpr, ADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of products, of which each `GROUP` columns leave one number.

    a `[N, rows, DIM]`, b `[N, columns, DIM]`, added `[columns]` float32, out `[N, rows, groups]`;
    programs that follow each other share columns.
    """
    head = tl.program_id(1).to(tl.int64)
    blocks = (rows + ROWS - 1) // ROWS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) // blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    a_ptr += head * rows * DIM + row[:, None].to(tl.int64) * DIM
    b_ptr += head * columns * DIM + column[None].to(tl.int64) * DIM
    logits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, DIM, STEP):
        dims = start + tl.arange(0, STEP)
        a = tl.load(a_ptr + dims[None], mask=is_row[:, None] & (dims < DIM)[None], other=0.0)
        b = tl.load(b_ptr + dims[:, None], mask=is_column[None] & (dims < DIM)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    logits = logits * (scale * LOG2_E)
    if ADDED:
        logits += tl.load(added_ptr + column, mask=is_column, other=0.0)[None] * LOG2_E
    logits = tl.where(is_column[None], logits, -float("inf"))
    parts = tl.reshape(logits, [ROWS, COLUMNS // GROUP, GROUP])
    highest = tl.max(parts, 2)
    if SUMS:
        safe = tl.where(highest == -float("inf"), 0.0, highest)
        found = safe + tl.math.log2(tl.sum(tl.math.exp2(parts - safe[:, :, None]), 2))
    else:
        # A maximum passes over what is no number.
        wrong = tl.max((parts != parts).to(tl.int32), 2)
        found = tl.where(wrong != 0, float("nan"), highest)
    group = block * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    to = out_ptr + head * rows * groups + row[:, None].to(tl.int64) * groups + group[None]
    tl.store(to, found / LOG2_E, mask=is_row[:, None] & (group < groups)[None])
