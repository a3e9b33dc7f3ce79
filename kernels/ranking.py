"""Which scores of a row are chosen, in torch: what the lists of `lists` are defined by."""

from __future__ import annotations

import torch


def ranks_of(scores: torch.Tensor, forced: torch.Tensor | None) -> torch.Tensor:
    """Whole numbers in the order of the scores: no number above infinity, forced above all."""
    bits = scores.masked_fill(scores == 0, 0).view(torch.int32)
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill(scores.isnan(), 2**31 - 2)
    return ranks if forced is None else ranks.masked_fill(forced, 2**31 - 1)


def above(scores: torch.Tensor, beta: float) -> torch.Tensor:
    """What `above_tiles` keeps, as a mask, of scores `[B, H, Q, K]`."""
    more = scores - scores.mean(-1, keepdim=True)
    deviation = more.square().mean(-1, keepdim=True).sqrt()
    # Not `>`: what is no number is kept, as all comparisons with it are false.
    return ~(more <= beta * deviation)


def by_mass(
    logits: torch.Tensor, mass: float, forced: torch.Tensor | None, least: int, most: int
) -> torch.Tensor:
    """Of each row the fewest best that hold `mass` of its weight, but `least` to `most`, as a mask.

    Args:
        logits: `[B, H, Q, K]` float32, in powers of two.
    """
    best = ranks_of(logits, forced).argsort(dim=-1, descending=True, stable=True)
    largest = torch.finfo(logits.dtype).max
    finite = logits.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
    weights = (finite - finite.amax(-1, keepdim=True)).exp2().masked_fill(logits.isnan(), 0)
    before = weights.gather(-1, best).cumsum(-1)
    total = before[..., -1:]
    goal = total * mass if mass < 1 else torch.full_like(total, torch.inf)
    before = torch.nn.functional.pad(before[..., :-1], (1, 0))
    taken = (before < goal) | (total == 0)
    taken[..., :least] = True
    taken[..., most:] = False
    return torch.zeros_like(taken).scatter_(-1, best, taken)
