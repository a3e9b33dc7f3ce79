"""The kernels of `lists`. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""Rank of a column that is not there."""
NAN: tl.constexpr = tl.constexpr(2**31 - 2)
FORCED: tl.constexpr = tl.constexpr(2**31 - 1)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _mean(
    x_ptr, order_ptr, out_ptr, tile, tiles, batch, head, heads,
    x_b, x_h, x_l, x_d, tokens,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """The mean of one tile of one head of x `[B, H, L, DIM]`, to out `[B, H, tiles, DIM]`."""
    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < DIM
    x_ptr += batch * x_b + head * x_h
    total = tl.zeros([CHUNK, PADDED_DIM], tl.float32)
    for start in tl.static_range(0, SIZE, CHUNK):
        place = start + tl.arange(0, CHUNK)
        at = tile * SIZE + place
        here = (at < tokens) & (place < SIZE)
        if ORDERED:
            at = tl.load(order_ptr + at, mask=here, other=0)
        part = tl.load(
            x_ptr + at[:, None].to(tl.int64) * x_l + dims[None] * x_d,
            mask=here[:, None] & in_dim[None],
            other=0.0,
        )
        total += part.to(tl.float32)
    length = tl.minimum(tokens - tile * SIZE, SIZE).to(tl.float32)
    to = out_ptr + ((batch * heads + head) * tiles + tile) * DIM + dims
    tl.store(to, tl.sum(total, 0) / length, mask=in_dim)


@triton.jit
def means(
    q_ptr, k_ptr, order_ptr, means_q_ptr, means_k_ptr,
    q_b, q_h, q_l, q_d,
    k_b, k_h, k_l, k_d, order_b, order_h,
    batches, heads, queries, keys, rows, columns,
    SIZE_Q: tl.constexpr, SIZE_K: tl.constexpr,
    CHUNK_Q: tl.constexpr, CHUNK_K: tl.constexpr,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """One tile of one head: of queries, then of keys; heads run fastest.

    In models' own memory, `[B, L, H, D]`, neighbouring programs then read neighbouring bytes.
    Orders of batch items and heads are `order_b` and `order_h` apart.
    """
    pairs = batches * heads
    tile = tl.program_id(0) // pairs
    batch = ((tl.program_id(0) % pairs) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    order_ptr += batch * order_b + head * order_h
    if tile < rows:
        _mean(
            q_ptr, order_ptr, means_q_ptr, tile, rows, batch, head, heads,
            q_b, q_h, q_l, q_d, queries,
            SIZE_Q, CHUNK_Q, DIM, PADDED_DIM, ORDERED,
        )  # fmt: skip
    else:
        _mean(
            k_ptr, order_ptr, means_k_ptr, tile - rows, columns, batch, head, heads,
            k_b, k_h, k_l, k_d, keys,
            SIZE_K, CHUNK_K, DIM, PADDED_DIM, ORDERED,
        )  # fmt: skip


@triton.jit
def permute(
    x_ptr, order_ptr, out_ptr,
    x_b, x_h, x_l, x_d, order_b, order_h,
    batches, heads, tokens,
    TOKENS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """`TOKENS` tokens of one head to their places in out `[B, H, L, DIM]`; heads run fastest.

    Orders of batch items and heads are `order_b` and `order_h` apart.
    """
    pairs = batches * heads
    batch = ((tl.program_id(0) % pairs) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    at = (tl.program_id(0) // pairs) * TOKENS + tl.arange(0, TOKENS)
    here = at < tokens
    order_ptr += batch * order_b + head * order_h
    other = tl.load(order_ptr + at, mask=here, other=0)
    source = at.to(tl.int64)
    to = other
    if not INVERSE:
        source = other
        to = at.to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    mask = here[:, None] & (dims < DIM)[None]
    x = tl.load(
        x_ptr + batch * x_b + head * x_h + source[:, None] * x_l + dims[None] * x_d, mask=mask
    )
    tl.store(
        out_ptr + ((batch * heads + head) * tokens + to[:, None]) * DIM + dims[None], x, mask=mask
    )


@triton.jit
def _scores(
    q_ptr, k_ptr, scores_ptr, head, row, column, rows, columns,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of some rows of one head with all columns `[ROWS, COLUMNS]`, read or made; see `choose`."""
    is_row = row < rows
    if SCORED:
        place = (head * rows + row[:, None]) * columns + column[None]
        here = is_row[:, None] & (column < columns)[None]
        return tl.load(scores_ptr + place, mask=here, other=0.0)
    else:
        q_ptr += (head * rows + row[:, None]) * DIM
        k_ptr += (head * columns + column[:, None]) * DIM
        scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, DIM, STEP):
            dims = (start + tl.arange(0, STEP))[None]
            q = tl.load(q_ptr + dims, mask=is_row[:, None] & (dims < DIM), other=0.0)
            k = tl.load(k_ptr + dims, mask=(column < columns)[:, None] & (dims < DIM), other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        return scores


@triton.jit
def _write(
    indices_ptr, counts_ptr, head, row, column, chosen, before, kept, rows, columns, width
):  # fmt: skip
    """Lists of what is `chosen`, `before` up to and with a column, `kept` of a row."""
    here = (row < rows)[:, None] & (column < columns)[None]
    # What is not kept fills the list with zeros.
    place = tl.where(chosen, before - 1, kept[:, None] + column[None] - before)
    to = (head * rows + row[:, None]) * width + place
    value = tl.where(chosen, column[None], 0)
    tl.store(indices_ptr + to, value, mask=here & (place < width))
    tl.store(counts_ptr + head * rows + row, tl.minimum(kept, width), mask=row < rows)


@triton.jit
def choose(
    q_ptr, k_ptr, scores_ptr, forced_ptr, indices_ptr, counts_ptr,
    rows, columns, width, most, fewest, mass, scale, last,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCORED: tl.constexpr, IS_FORCED: tl.constexpr, BY_MASS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The lists of `ROWS` tiles of queries of one head, from their scores with all tiles of keys.

    q `[B * H, rows, DIM]` and k `[B * H, columns, DIM]` or, `SCORED`, scores `[B * H, rows,
    columns]`; forced `[rows, columns]` int8. The score of the last kept is found bit by bit, as the
    largest that enough others reach: no sort. `BY_MASS`: enough is a mass of `mass`, at least
    `fewest` and at most `most` tiles; scores are multiplied with `scale`, `last` is added to those
    of the last tile, both in powers of two.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < rows
    is_column = (column < columns)[None]
    here = is_row[:, None] & is_column
    scores = _scores(
        q_ptr, k_ptr, scores_ptr, head, row, column, rows, columns,
        DIM, STEP, ROWS, COLUMNS, SCORED, PRECISION,
    )  # fmt: skip
    if BY_MASS:
        scores = scores * scale + tl.where(column == columns - 1, last, 0.0)[None]

    # Whole numbers in the order of the scores; 0 and -0 are one score.
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = tl.where(scores != scores, NAN, rank)
    least = tl.zeros([ROWS], tl.int32)
    if IS_FORCED:
        forced = tl.load(forced_ptr + row[:, None] * columns + column[None], mask=here, other=0)
        rank = tl.where(forced != 0, FORCED, rank)
        least = tl.sum((forced != 0).to(tl.int32), 1)
    rank = tl.where(is_column, rank, LOWEST)
    enough = tl.maximum(least, most)

    if BY_MASS:
        # Infinite scores weigh like the largest finite ones, what is not a number nothing.
        logits = tl.minimum(tl.maximum(scores, -LARGEST), LARGEST)
        logits = tl.where(is_column & (scores == scores), logits, -LARGEST)
        weights = tl.math.exp2(logits - tl.max(logits, 1)[:, None])
        weights = tl.where(is_column & (scores == scores), weights, 0.0)
        total = tl.sum(weights, 1)
        # All of it is all tiles, also those whose weight is lost in rounding; no number: all.
        goal = tl.where((total == 0) | (mass >= 1), float("inf"), total * mass)

    # The sign first.
    reaches = rank >= 0
    found = tl.sum(reaches.to(tl.int32), 1) >= enough
    if BY_MASS:
        many = tl.sum(reaches.to(tl.int32), 1) >= fewest
        found = found | (many & (tl.sum(tl.where(reaches, weights, 0.0), 1) >= goal))
    threshold = tl.where(found, 0, LOWEST)
    for bit in range(31):
        trial = threshold | (1 << (30 - bit))
        reaches = rank >= trial[:, None]
        found = tl.sum(reaches.to(tl.int32), 1) >= enough
        if BY_MASS:
            many = tl.sum(reaches.to(tl.int32), 1) >= fewest
            found = found | (many & (tl.sum(tl.where(reaches, weights, 0.0), 1) >= goal))
        threshold = tl.where(found, trial, threshold)

    above = rank > threshold[:, None]
    equal = (rank == threshold[:, None]) & is_column
    sure = tl.sum(above.to(tl.int32), 1)
    needed = enough - sure
    if BY_MASS:
        equals = tl.sum(equal.to(tl.int32), 1)
        missing = goal - tl.sum(tl.where(above, weights, 0.0), 1)
        each = tl.max(tl.where(equal, weights, 0.0), 1)
        # Division by 0 and too large quotients: all of them.
        by_mass = tl.where(each > 0, tl.math.ceil(missing / tl.where(each > 0, each, 1.0)), LARGEST)
        by_mass = tl.minimum(tl.maximum(by_mass, 1.0), COLUMNS * 1.0).to(tl.int32)
        by_mass = tl.maximum(by_mass, fewest - sure)
        needed = tl.minimum(tl.minimum(needed, by_mass), equals)
        needed = tl.where(threshold == FORCED, equals, needed)
    kept = sure + needed

    # Both groups are counted at once, in the halves of a number.
    ranks = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 1).to(tl.int32)
    equal_in = ranks & 0xFFFF
    chosen = above | (equal & (equal_in <= needed[:, None]))
    before = (ranks >> 16) + tl.minimum(equal_in, needed[:, None])
    _write(indices_ptr, counts_ptr, head, row, column, chosen, before, kept, rows, columns, width)


@triton.jit
def choose_above(
    q_ptr, k_ptr, scores_ptr, forced_ptr, indices_ptr, counts_ptr,
    rows, columns, width, beta,
    DIM: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SCORED: tl.constexpr, IS_FORCED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `choose`, what scores more than `beta` deviations above the mean of its row."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < rows
    is_column = (column < columns)[None]
    scores = _scores(
        q_ptr, k_ptr, scores_ptr, head, row, column, rows, columns,
        DIM, STEP, ROWS, COLUMNS, SCORED, PRECISION,
    )  # fmt: skip
    above = tl.where(is_column, scores, 0.0)
    above = tl.where(is_column, above - (tl.sum(above, 1) / columns)[:, None], 0.0)
    limit = beta * tl.sqrt_rn(tl.sum(above * above, 1) / columns)
    # Not `>`: what is no number is kept, as all comparisons with it are false.
    chosen = tl.where(above <= limit[:, None], 0, 1)
    if IS_FORCED:
        here = is_row[:, None] & is_column
        forced = tl.load(forced_ptr + row[:, None] * columns + column[None], mask=here, other=0)
        chosen = tl.where(forced != 0, 1, chosen)
    chosen = tl.where(is_column, chosen, 0)
    before = tl.cumsum(chosen, 1).to(tl.int32)
    kept = tl.sum(chosen, 1).to(tl.int32)
    _write(
        indices_ptr, counts_ptr, head, row, column, chosen != 0, before, kept, rows, columns, width
    )


@triton.jit
def mark(
    indices_ptr, counts_ptr, bits_ptr, rows, columns, width, words,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """A bit for each entry of one list: bits `[B * H, columns, words]`, 32 rows in a word."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + head * rows + row)
    bits_ptr += head * columns * words + row // 32
    for start in range(0, count, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        here = place < count
        column = tl.load(indices_ptr + (head * rows + row) * width + place, mask=here, other=0)
        here = here & (column >= 0) & (column < columns)
        bit = tl.full([ENTRIES], 1, tl.int32) << (row % 32)
        tl.atomic_or(bits_ptr + column * words, bit, mask=here, sem="relaxed")


@triton.jit
def left_out(
    indices_ptr, counts_ptr, bits_ptr, rows, columns, width, words,
    ENTRIES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A bit for each tile of keys that is not on one list: bits `[B * H, rows, words]`."""
    at = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    count = tl.load(counts_ptr + at)
    word = tl.arange(0, WORDS)
    kept = tl.zeros([WORDS], tl.int32)
    for start in range(0, count, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        here = place < count
        column = tl.load(indices_ptr + at * width + place, mask=here, other=0)
        bit = tl.where(here, tl.full([ENTRIES], 1, tl.int32) << (column % 32), 0)
        # Each bit comes once, so that their sum is their union.
        own = (column // 32)[None, :] == word[:, None]
        kept = kept | tl.sum(tl.where(own, bit[None, :], 0), 1)
    missing = tl.minimum(tl.maximum(columns - word * 32, 0), 32)
    there = tl.where(missing == 32, -1, (tl.full([WORDS], 1, tl.int32) << missing) - 1)
    tl.store(bits_ptr + at * words + word, (~kept) & there, mask=word < words)


@triton.jit
def gather(
    bits_ptr, rows_of_ptr, counts_ptr, rows, columns, width, words,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The lists of `COLUMNS` tiles of keys of one head, from the bits of `mark`."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    is_column = column < columns
    here = is_column[:, None] & (row < rows)[None]
    at = head * columns + column
    word = tl.load(bits_ptr + at[:, None] * words + (row // 32)[None], mask=here, other=0)
    chosen = (word >> (row % 32)[None]) & 1
    before = tl.cumsum(chosen, 1).to(tl.int32)
    kept = tl.sum(chosen, 1).to(tl.int32)
    place = tl.where(chosen != 0, before - 1, kept[:, None] + row[None] - before)
    value = tl.where(chosen != 0, row[None], 0)
    tl.store(rows_of_ptr + at[:, None] * width + place, value, mask=here & (place < width))
    tl.store(counts_ptr + at, tl.minimum(kept, width), mask=is_column)
