"""Booleans 32 to a word: bit `c % 32` of word `c // 32` is number `c`."""

from __future__ import annotations

import torch

WORD = 32


def words_of(bits: int) -> int:
    """Words that hold so many bits."""
    return -(-bits // WORD)


def pack(bits: torch.Tensor) -> torch.Tensor:
    """`[..., N]` bool to `[..., N / 32 rounded up]` int32; bits behind the last are 0."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % WORD))
    places = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    # No two have a bit in common, so that adding them is joining them.
    return (padded.unflatten(-1, (-1, WORD)).to(torch.int32) << places).sum(-1, dtype=torch.int32)


def unpack(words: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` bits of `words`: `[..., words]` int32 to `[..., count]` bool."""
    places = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> places) & 1).bool().flatten(-2)[..., :count]


def ones(words: torch.Tensor) -> torch.Tensor:
    """Bits that are set in each word, int32 of the same shape."""
    # Sums of neighbours: of 2 bits, of 4, of 8, of all. A shift of int32 brings its sign along,
    # which the masks cut off.
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words + (words >> 8) + (words >> 16) + (words >> 24)) & 0x3F


def first(counts: torch.Tensor, words: int) -> torch.Tensor:
    """Words whose first `counts` bits are set: `[...]` of whole numbers to `[..., words]` int32."""
    starts = torch.arange(words, device=counts.device) * WORD
    held = (counts[..., None] - starts).clamp(0, WORD)
    return pack(torch.arange(WORD, device=counts.device) < held[..., None])[..., 0]
