"""Masks of tokens, as `BlockPlan.within` has them, of queries that take groups of keys.

`torch` is the definition; `triton`, for CUDA, writes the masks and reads little else.
"""

from __future__ import annotations

from typing import Any

import torch

from . import lists_launch as launch
from .lists_launch import Backend
from .plan import tiles_of
from .triton_support import on_device

BYTES = 2**24
"""Of masks made at a time by `torch`."""
_ENTRIES = 16
_TOGETHER = 6


def of_groups(
    taken: torch.Tensor,
    indices: torch.Tensor,
    groups: torch.Tensor,
    bits: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Which keys of the tiles on a row's list each of its queries attends to.

    Args:
        taken: `[B, H, Q, C, tile.query]` bool, whether a query takes a group of keys.
        indices: `[B, H, Q, most]` int32, tiles of keys.
        groups: `[n, K]` int64, groups that have keys in a tile; those that fill up have none.
        bits: `[n, K, words]` int32, which keys of the tile they are; no two groups share one.
        backend: None is `triton` where it can, else `torch`.

    Returns:
        `[B, H, Q, most, tile.query, words]` int32.

    Raises:
        ValueError: a backend that cannot.
    """
    *shape, total, size = taken.shape
    most, (count, columns, words) = indices.shape[3], bits.shape
    out = torch.empty(*shape, most, size, words, dtype=torch.int32, device=taken.device)
    taken, indices = taken.contiguous().view(torch.uint8), indices.contiguous()
    if not launch.takes(backend, integers=indices):
        _looked_up(taken, indices, groups, bits, out)
        return out
    from . import masks_kernels

    kernel: Any = masks_kernels.of_groups
    rows = indices[..., 0].numel()
    with on_device(taken):
        kernel[(rows, tiles_of(most, _ENTRIES))](
            taken, indices, groups.int().contiguous(), bits.contiguous(), out,
            columns, most, total,
            GROUPS=count, QUERIES=size, PADDED=1 << (size - 1).bit_length(), WORDS=words,
            PADDED_WORDS=1 << (words - 1).bit_length(), ENTRIES=_ENTRIES, num_warps=4,
        )  # fmt: skip
    return out


def _looked_up(
    taken: torch.Tensor,
    indices: torch.Tensor,
    groups: torch.Tensor,
    bits: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """By a table of the masks of all subsets of a tile's groups, of a few groups at a time."""
    *_, most, size, words = out.shape
    # Words in pairs where they are: fewer are looked up.
    kind = torch.int64 if words % 2 == 0 else torch.int32
    own, rows = taken.flatten(0, 2), indices.flatten(0, 2)
    to = out.flatten(0, 2).view(kind)
    total = own.shape[1]
    many = max(1, BYTES // (4 * most * size))
    parts = [slice(start, start + many) for start in range(0, len(rows), many)]
    for number, (some, own_bits) in enumerate(
        zip(groups.split(_TOGETHER), bits.split(_TOGETHER), strict=True)
    ):
        table = subsets(own_bits).flatten(0, 1).view(kind)
        for part in parts:
            places, choices = rows[part].long(), own[part].flatten(0, 1)
            starts = torch.arange(0, len(choices), total, device=own.device)[:, None]
            at = (places * 2 ** len(some)).to(torch.int32)[..., None].repeat(1, 1, size)
            for bit, group in enumerate(some):
                at += choices[starts + group[places]] << bit
            for column, entries in enumerate(table.unbind(-1)):
                found = entries.contiguous().index_select(0, at.flatten()).view_as(at)
                if number:
                    to[part, ..., column] |= found
                else:
                    to[part, ..., column] = found


def subsets(words: torch.Tensor) -> torch.Tensor:
    """Sums of all subsets of `[b, K, words]`, `[K, 2**b, words]`; bit i: the i-th is in it."""
    sums = torch.zeros_like(words[0])[:, None]
    for one in words:
        # No two have a bit in common, so that adding is joining.
        sums = torch.cat([sums, sums + one[:, None]], dim=1)
    return sums
