"""The kernel of `masks`. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl


@triton.jit
def of_groups(
    taken_ptr, indices_ptr, groups_ptr, bits_ptr, out_ptr,
    columns, most, total,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, PADDED: tl.constexpr,
    WORDS: tl.constexpr, PADDED_WORDS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Masks of `ENTRIES` entries of a row's list.

    taken `[rows, total, QUERIES]` bytes, indices `[rows, most]`, groups `[GROUPS, columns]` int32,
    bits `[GROUPS, columns, WORDS]`, out `[rows, most, QUERIES, WORDS]`.
    """
    row = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, PADDED)
    word = tl.arange(0, PADDED_WORDS)
    here = (line < QUERIES)[:, None] & (word < WORDS)[None]
    start = tl.program_id(1) * ENTRIES
    for entry in range(start, tl.minimum(start + ENTRIES, most)):
        column = tl.load(indices_ptr + row * most + entry)
        masks = tl.zeros([PADDED, PADDED_WORDS], tl.int32)
        for i in tl.static_range(GROUPS):
            at = i * columns + column
            group = tl.load(groups_ptr + at)
            own = tl.load(bits_ptr + at * WORDS + word, mask=word < WORDS, other=0)
            has = tl.load(
                taken_ptr + (row * total + group) * QUERIES + line, mask=line < QUERIES, other=0
            )
            masks = masks | tl.where((has != 0)[:, None], own[None], 0)
        to = out_ptr + ((row * most + entry) * QUERIES + line[:, None]) * WORDS + word[None]
        tl.store(to, masks, mask=here)
