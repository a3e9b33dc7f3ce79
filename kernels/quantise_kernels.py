"""The kernels of `quantise`. Importing this needs triton."""

# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

ROUND: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 x 2^23: added and taken away, it rounds what is below 2^22, halves to even numbers."""


@triton.jit
def ranges(
    k_ptr, v_ptr, mean_ptr, most_ptr,
    k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d,
    heads, keys, blocks, every, one, most_one,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Sums of each `every`-th block of keys, times `one`; largest of all values, times `most_one`.

    The first `PARTS` programs of a head add up every `PARTS`-th of those `blocks`, to mean
    `[B * H, PARTS, DIM]`; each other one looks at `BLOCKS` x `BLOCK` values, for most
    `[B * H, DIM]`, which holds zeros before.
    """
    part = tl.program_id(0)
    in_head = tl.program_id(1).to(tl.int64)
    batch, head = in_head // heads, in_head % heads
    dims = tl.arange(0, DIM)
    if part < PARTS:
        total = tl.zeros([DIM], tl.float32)
        for block in range(part, blocks, PARTS):
            at = block * every * BLOCK + tl.arange(0, BLOCK)
            here = (at < keys)[:, None]
            at = at.to(tl.int64)[:, None]
            k = tl.load(k_ptr + batch * k_b + head * k_h + at * k_l + dims * k_d, here, other=0.0)
            total += tl.sum(k.to(tl.float32), 0)
        tl.store(mean_ptr + (in_head * PARTS + part) * DIM + dims, total * one)
    else:
        most = tl.zeros([DIM], tl.float32)
        for i in range(BLOCKS):
            at = ((part - PARTS) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
            here = (at < keys)[:, None]
            at = at.to(tl.int64)[:, None]
            v = tl.load(v_ptr + batch * v_b + head * v_h + at * v_l + dims * v_d, here, other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(v.to(tl.float32)), 0))
        tl.atomic_max(most_ptr + in_head * DIM + dims, most * most_one)


@triton.jit
def _mean(mean_ptr, in_head, dims, in_dim, DIM: tl.constexpr, PARTS: tl.constexpr):
    """The sum of the parts of a head's mean, `[padded DIM]`."""
    parts = in_head * PARTS + tl.arange(0, PARTS)
    return tl.sum(tl.load(mean_ptr + parts[:, None] * DIM + dims[None], in_dim[None], other=0.0), 0)


@triton.jit
def whole_numbers(
    x_ptr, mean_ptr, out_ptr, scale_ptr, shift_ptr,
    x_b, x_h, x_l, x_d, heads, tokens, tiles, factor, most,
    TILE: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, CENTRED: tl.constexpr, SHIFTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One tile: `(x - mean) / scale` to int8 out `[B, H, L, DIM]`, with scale `largest / most`.

    `SHARED`: whose largest, "tile": to scale `[B * H, tiles]`, "token": `[B * H, L]`, "channel":
    `[B * H, tiles, DIM]`. `PACKED`: out `[B, H, L, DIM / 2 rounded up]`, channels 2 i and 2 i + 1
    in the low and the high half of byte i. `CENTRED`: the mean, the sum of
    `[B * H, PARTS, DIM]`, is taken away.
    `SHIFTED`: factor x mean times each row of x goes to shift `[B * H, L]`.
    """
    tile = tl.program_id(0)
    in_head = tl.program_id(1).to(tl.int64)
    batch, head = in_head // heads, in_head % heads
    dims = tl.arange(0, PADDED_DIM)
    in_dim = dims < DIM
    at = tile * TILE + tl.arange(0, TILE)
    is_token = at < tokens
    here = is_token[:, None] & in_dim[None]
    place = at.to(tl.int64)[:, None]
    x = tl.load(x_ptr + batch * x_b + head * x_h + place * x_l + dims[None] * x_d, here, other=0.0)
    x = x.to(tl.float32)
    if SHIFTED:
        mean = _mean(mean_ptr, in_head, dims, in_dim, DIM, PARTS)
        shift = tl.sum(x * mean[None], 1) * factor
        tl.store(shift_ptr + in_head * tokens + at, shift, is_token)
    if CENTRED:
        mean = _mean(mean_ptr, in_head, dims, in_dim, DIM, PARTS)
        x = tl.where(here, x - mean[None], 0.0)
    if SHARED == "token":
        scale = tl.max(tl.abs(x), 1) / most
        tl.store(scale_ptr + in_head * tokens + at, scale, is_token)
        scale = scale[:, None]
    elif SHARED == "channel":
        scale = tl.max(tl.abs(x), 0) / most
        tl.store(scale_ptr + (in_head * tiles + tile) * DIM + dims, scale, in_dim)
        scale = scale[None]
    else:
        scale = tl.max(tl.max(tl.abs(x), 1), 0) / most
        tl.store(scale_ptr + in_head * tiles + tile, scale)
    whole = (x * tl.where(scale > 0, 1 / tl.where(scale > 0, scale, 1.0), 0.0) + ROUND) - ROUND
    if PACKED:
        low, high = tl.split(tl.reshape(whole.to(tl.int32), [TILE, PADDED_DIM // 2, 2]))
        half = tl.arange(0, PADDED_DIM // 2)
        width = (DIM + 1) // 2
        to = out_ptr + (in_head * tokens + place) * width + half[None]
        here = is_token[:, None] & (half < width)[None]
        tl.store(to, ((low & 15) | (high << 4)).to(tl.int8), here)
    else:
        to = out_ptr + (in_head * tokens + place) * DIM + dims[None]
        tl.store(to, whole.to(tl.int8), here)


@triton.jit
def eighths(
    x_ptr, scale_ptr, out_ptr,
    x_b, x_h, x_l, x_d, heads, tokens, padded,
    TILE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One tile of values, divided by their channel's scale, to float8 out `[B, H, DIM, padded]`.

    Of 32 tokens each, place 16 h + 4 l + 2 g + e gets token 16 h + 8 g + 2 l + e (e, g, h < 2,
    l < 4): the order in which a thread of a product of 16-bit numbers holds its columns.
    """
    in_head = tl.program_id(1).to(tl.int64)
    batch, head = in_head // heads, in_head % heads
    dims = tl.arange(0, DIM)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = (place // 16) * 16 + ((place // 2) % 2) * 8 + ((place // 4) % 4) * 2 + place % 2
    here = (at < tokens)[:, None]
    x = tl.load(
        x_ptr + batch * x_b + head * x_h + at.to(tl.int64)[:, None] * x_l + dims * x_d,
        here, other=0.0,
    ).to(tl.float32)  # fmt: skip
    scale = tl.load(scale_ptr + in_head * DIM + dims)
    x = x * tl.where(scale > 0, 1 / tl.where(scale > 0, scale, 1.0), 0.0)[None]
    to = out_ptr + (in_head * DIM + dims.to(tl.int64)[:, None]) * padded + place[None]
    tl.store(to, tl.trans(x.to(tl.float8e4nv)), (place < padded)[None])
