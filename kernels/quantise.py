"""Queries, keys and values in 8 and 4 bits, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .plan import tiles_of
from .triton_support import on_device, padded

Shared = Literal["tile", "token", "channel"]
QUERIES = 64
"""Queries that share a scale."""
LARGEST = {8: 127.0, 4: 7.0}
"""Whole number of so many bits; as many are below 0."""
LARGEST_FP8 = 448.0
POOLED = 128
"""Pooled tokens that share a scale."""
BLOCK = 64
BLOCKS = 8
"""Blocks of 64 values that one program looks at."""
PARTS = 8
"""Programs that add up a head's keys, and parts in which its mean stays."""
EVERY = 8
"""Of so many blocks of keys, one counts for their mean."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Of each head, float32: a mean of keys, in `[B, H, PARTS, D]` that add up to it, which spares
    a launch, and the step of values, `[B, H, D]`."""

    mean: torch.Tensor
    scale: torch.Tensor


def ranges(k: torch.Tensor, v: torch.Tensor, *, values: bool = True) -> Ranges:
    """The mean of a sample of the keys, and of each channel of values the largest over 448.

    Args:
        values: False: the second is not wanted, and not found.
    """
    batch, heads, keys, dim = k.shape
    blocks = tiles_of(tiles_of(keys, BLOCK), EVERY)
    last = (blocks - 1) * EVERY * BLOCK
    counted = (blocks - 1) * BLOCK + min(BLOCK, keys - last)
    mean = torch.empty(batch, heads, PARTS, dim, dtype=torch.float32, device=k.device)
    most = mean.new_zeros(batch, heads, dim) if values else mean
    looks = tiles_of(keys, BLOCK * BLOCKS) if values else 0
    with on_device(k):
        _kernels().ranges[(PARTS + looks, batch * heads)](
            k, v, mean, most, *k.stride(), *v.stride(),
            heads, keys, blocks, EVERY, 1 / counted, 1 / LARGEST_FP8,
            BLOCK=BLOCK, BLOCKS=BLOCKS, PARTS=PARTS, DIM=dim, num_warps=4,
        )  # fmt: skip
    return Ranges(mean, most)


def whole_numbers(
    x: torch.Tensor,
    tile: int,
    *,
    bits: Literal[8, 4] = 8,
    shared: Shared = "tile",
    mean: torch.Tensor | None = None,
    shift: tuple[torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`x` as whole numbers times a scale.

    Args:
        x: `[B, H, L, D]`, any strides and floating dtype.
        tile: tokens that are taken together, a power of two.
        bits: 8: int8 `[B, H, L, D]`. 4: two to a byte, `[B, H, L, D / 2 rounded up]` int8, the
            even channel in the low half.
        shared: who shares a scale. `tile`: `[B, H, tiles]`; `token`: `[B, H, L]`; `channel` of a
            tile: `[B, H, tiles, D]`.
        mean: taken from x first: the sum of `[B, H, parts, D]`, a power of two of them.
        shift: such a mean and a factor; the third result is factor x mean times each row.
    """
    batch, heads, tokens, dim = x.shape
    tiles = tiles_of(tokens, tile)
    width = dim if bits == 8 else tiles_of(dim, 2)
    shapes: dict[Shared, tuple[int, ...]] = {
        "tile": (tiles,), "token": (tokens,), "channel": (tiles, dim)
    }  # fmt: skip
    out = torch.empty(batch, heads, tokens, width, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, *shapes[shared], dtype=torch.float32, device=x.device)
    shifts = scale.new_empty(batch, heads, tokens) if shift else None
    vector = mean if mean is not None else shift[0] if shift else scale
    with on_device(x):
        _kernels().whole_numbers[(tiles, batch * heads)](
            x, vector, out, scale, scale if shifts is None else shifts, *x.stride(),
            heads, tokens, tiles, shift[1] if shift else 0.0, LARGEST[bits],
            TILE=tile, DIM=dim, PADDED_DIM=padded(dim), SHARED=shared, PACKED=bits == 4,
            CENTRED=mean is not None, SHIFTED=shift is not None,
            PARTS=vector.shape[2] if mean is not None or shift else 1, num_warps=4,
        )  # fmt: skip
    return out, scale, shifts


def eighths(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x [B, H, L, D]` over `scale [B, H, D]` as float8 `[B, H, D, L]`, L rounded up to 128.

    Tokens are in the order that `hopper_kernels` wants; zeros behind the last.
    """
    batch, heads, tokens, dim = x.shape
    places = 128 * tiles_of(tokens, 128)
    out = torch.empty(batch, heads, dim, places, dtype=torch.float8_e4m3fn, device=x.device)
    with on_device(x):
        _kernels().eighths[(places // 128, batch * heads)](
            x, scale, out, *x.stride(), heads, tokens, places, TILE=128, DIM=dim, num_warps=8
        )
    return out


def _kernels() -> Any:
    from . import quantise_kernels

    return quantise_kernels
