"""Pieces of the Gluon kernels of the `hopper` backend: layouts, and the steps of a softmax.

Importing this needs triton with Gluon for Hopper.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@gluon.constexpr_function
def swizzle(channels: int, itemsize: int) -> int:
    """Bytes of a row that the copy engine swizzles together."""
    return min(128, channels * itemsize)


@gluon.constexpr_function
def flat(channels: int, itemsize: int) -> gl.NVMMASharedLayout:
    """Layout of a matrix of rows of `channels` in shared memory, as the copy engine swizzles it."""
    return gl.NVMMASharedLayout(swizzle(channels, itemsize), 8 * itemsize, rank=2)


@gluon.constexpr_function
def itemsize(narrow: bool) -> int:
    """Bytes of a number, of 8 or 16 bits."""
    return 1 if narrow else 2


@gluon.constexpr_function
def product(columns: int, itemsize: int) -> gl.NVMMADistributedLayout:
    """Layout of a product `[64, columns]` of matrices of such numbers, over four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32 // itemsize])


@gluon.constexpr_function
def left(product: gl.NVMMADistributedLayout, itemsize: int) -> gl.DotOperandLayout:
    """Layout of the left operand of `product` in registers."""
    return gl.DotOperandLayout(0, product, 4 // itemsize)


def descriptor(x: torch.Tensor, tokens: int, last: int | None = None) -> TensorDescriptor:
    """What the copy engine knows of `x [B, H, M, N]`: it loads blocks of `tokens` x 128 bytes.

    Args:
        last: block size in the last dimension; None: 128 bytes, or the whole where it is less.
    """
    bytes_ = swizzle(last or x.shape[-1], x.element_size())
    layout = gl.NVMMASharedLayout(bytes_, 8 * x.element_size(), rank=4)
    block = [1, 1, tokens, bytes_ // x.element_size()]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def four(ptr, first, mask0, mask1, mask2, mask3, other, NUMBER: gl.constexpr):
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
def spread(a, b, c, d, along, PART: gl.constexpr, NUMBER: gl.constexpr):
    """A number for each of `NUMBER` parts as a vector over the parts' elements."""
    x = (along * 0).to(a.dtype) + a
    if NUMBER >= 2:
        x = gl.where(along // PART == 1, b, x)
    if NUMBER >= 4:
        x = gl.where(along // PART == 2, c, x)
        x = gl.where(along // PART == 3, d, x)
    return x


@gluon.jit
def known(
    i, lists, count, columns, in_plan, in_head, width, words, unit,
    indices_ptr, bias_ptr, left_out_ptr, k_scale_ptr, tail_scale_ptr,
    TILE_K: gl.constexpr, STEP: gl.constexpr,
    TAIL: gl.constexpr, BIASED: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """What is known of step `i` of a list before its keys are there."""
    PER: gl.constexpr = STEP // TILE_K
    place = i * PER
    t0, t1, t2, t3 = four(
        indices_ptr, in_plan * width + place,
        place < count, place + 1 < count, place + 2 < count, place + 3 < count, columns, PER,
    )  # fmt: skip
    w0, w1, w2, w3 = 0, 0, 0, 0
    b0, b1, b2, b3 = 0.0, 0.0, 0.0, 0.0
    f0, f1, f2, f3 = unit, unit, unit, unit
    if TAIL:
        pooled = i >= lists
        w0, w1, w2, w3 = four(
            left_out_ptr, in_plan * words + (i - lists) * (STEP // 32),
            pooled, pooled, pooled, pooled, 0, STEP // 32,
        )  # fmt: skip
    if BIASED:
        b0, b1, b2, b3 = four(
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
def prepared(
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
        word = spread(w0, w1, w2, w3, along, 32, STEP // 32)
        at = (i - lists) * STEP + along
        more = gl.where(at == columns - 1, last / f0, one / f0)
        stands = ((word >> (along % 32)) & 1) != 0
        s = gl.where(stands[None, :], s + more[None, :], -float("inf"))
    else:
        if BIASED:
            bias = spread(b0 / f0, b1 / f1, b2 / f2, b3 / f3, along, TILE_K, PER)
            s = s + (bias * 1.4426950408889634)[None, :]
        furthest = gl.maximum(gl.maximum(t0, t1), gl.maximum(t2, t3))
        if (furthest + 1) * TILE_K > keys:
            at = spread(t0, t1, t2, t3, along, TILE_K, PER) * TILE_K + along % TILE_K
            s = gl.where((at < keys)[None, :], s, -float("inf"))
    return s


@gluon.constexpr_function
def words_of(keys: int) -> int:
    """Words of a query's mask of a tile."""
    return (keys + 31) // 32


@gluon.jit
def mask(
    ptr, i, count, most, LOGITS: gl.constexpr,
    TILE_Q: gl.constexpr, TILE_K: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Masks of step `i`, a word `[64]` for 32 keys; all are set where a tile has none.

    ptr: to the masks of these queries in the first tile of the row, `[tiles, TILE_Q, words]`.
    """
    WORDS: gl.constexpr = words_of(TILE_K)
    place = i * (STEP // TILE_K)
    most = gl.minimum(most, count)
    ptr += place.to(gl.int64) * (TILE_Q * WORDS)
    lines = ptr + gl.arange(0, 64, gl.SliceLayout(1, LOGITS)) * WORDS
    a = gl.load(lines, mask=place < most, other=-1)
    second: gl.constexpr = 1 // WORDS
    b = gl.load(lines + second * TILE_Q * WORDS + 1 % WORDS, mask=place + second < most, other=-1)
    c = a
    d = b
    if STEP == 128:
        third: gl.constexpr = 2 // WORDS
        fourth: gl.constexpr = 3 // WORDS
        c = gl.load(lines + third * TILE_Q * WORDS + 2 % WORDS, mask=place + third < most, other=-1)
        d = gl.load(
            lines + fourth * TILE_Q * WORDS + 3 % WORDS, mask=place + fourth < most, other=-1
        )
    return a, b, c, d


@gluon.jit
def masked(
    s, i, most, mask, TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr
):  # fmt: skip
    """Logits of step `i`, minus infinity where `mask` has no bit."""
    if i * (STEP // TILE_K) < most:
        a, b, c, d = mask
        along = gl.arange(0, STEP, gl.SliceLayout(0, LOGITS))[None, :]
        # A word is moved by what differs between threads once, and a bit of it is a constant.
        near = along % 8
        word = gl.where(along // 32 == 0, a[:, None] >> near, b[:, None] >> near)
        if STEP == 128:
            word = gl.where(along // 32 == 2, c[:, None] >> near, word)
            word = gl.where(along // 32 == 3, d[:, None] >> near, word)
        s = gl.where((word & (1 << (along & 24))) != 0, s, -float("inf"))
    return s


@gluon.jit
def weights_of(
    s, best, facts,
    TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr,
    INT8: gl.constexpr, UP: gl.constexpr,
):  # fmt: skip
    """2 ** (logit - `best` + `UP`), `[64, STEP]`."""
    PER: gl.constexpr = STEP // TILE_K
    f0, f1, f2, f3 = facts[12], facts[13], facts[14], facts[15]
    if INT8:
        along = gl.arange(0, STEP, gl.SliceLayout(0, LOGITS))
        f = spread(f0, f1, f2, f3, along, TILE_K, PER)
        # Rounding 1.5 x 2^23 units errs by less than a unit, which is what 8 bits tell apart.
        return gl.exp2(s * f[None, :] - ((f * 12582912.0)[None, :] + (best - UP)[:, None]))
    else:
        return gl.exp2(s * f0 - (best - UP)[:, None])


@gluon.jit
def sums_in_threads(weights, STEP: gl.constexpr):
    """Of each row four sums, each of what one thread holds: they are added up at the end."""
    return gl.sum(gl.sum(weights.reshape([64, STEP // 8, 4, 2]), 3), 1)


@gluon.jit
def highest(
    s, best, facts,
    TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """The largest logit of each row so far, `best` before this step."""
    PER: gl.constexpr = STEP // TILE_K
    f0, f1, f2, f3 = facts[12], facts[13], facts[14], facts[15]
    if INT8:
        # The largest of each tile before its unit: one product a tile, not one a logit.
        parts = s.reshape([64, PER, TILE_K])
        largest = gl.max(parts, 2)
        PARTS: gl.constexpr = largest.type.layout
        number = gl.arange(0, PER, gl.SliceLayout(0, PARTS))
        unit = spread(f0, f1, f2, f3, number, 1, PER)
        largest = gl.max((largest - 12582912.0) * unit[None, :], 1)
        return gl.maximum(best, gl.convert_layout(largest, gl.SliceLayout(1, LOGITS)))
    else:
        return gl.maximum(best, gl.max(s, 1) * f0)


@gluon.jit
def softmax(
    s, best, facts,
    TILE_K: gl.constexpr, STEP: gl.constexpr, LOGITS: gl.constexpr,
    INT8: gl.constexpr, UP: gl.constexpr,
):  # fmt: skip
    """One step of the softmax over the keys as they come, in powers of two, times 2 ** `UP`."""
    higher = highest(s, best, facts, TILE_K, STEP, LOGITS, INT8)
    weights = weights_of(s, higher, facts, TILE_K, STEP, LOGITS, INT8, UP)
    shrink = gl.exp2(best - higher)
    return higher, weights, shrink


@gluon.jit
def times_rows(x, factors):
    """Each row of `x` times its factor."""
    LAYOUT: gl.constexpr = x.type.layout
    return x * gl.convert_layout(factors, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def operand(
    weights, dtype: gl.constexpr, STEP: gl.constexpr, WEIGHTS: gl.constexpr, FP8: gl.constexpr
):  # fmt: skip
    """Weights as the matrix units read them from registers.

    In 8 bits a thread holds other columns than it computed: instead of moving them, columns are
    renamed, within 32, as the values were put in order by `quantise_kernels`.
    """
    if FP8:
        x = weights.reshape([64, STEP // 32, 2, 2, 4, 2]).permute((0, 1, 2, 4, 3, 5))
        # Four at a time: Triton's own conversion takes bytes apart and together again, 200
        # instructions a step.
        return gl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
            "=r,r,r,r,r", [gl.convert_layout(x.reshape([64, STEP]), WEIGHTS)],
            gl.float8e4nv,
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return gl.convert_layout(weights.to(dtype), WEIGHTS)
