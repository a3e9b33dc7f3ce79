"""Which tokens a pruned step keeps: the unstable ones, and one anchor of each cell."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .errors import AccelerationError
from .grid import TokenGrid
from .steps import Prune

_PART = 0.25
"""Of a coarser token's finer ones, so many must be unstable: the paper's."""


def kept_tokens(
    prune: Prune, grid: TokenGrid, *, seed: int, halvings: int = 0, channels: int = 1
) -> torch.Tensor:
    """Numbers `[K]` int64 of the tokens that a pruned step keeps, ascending, on the scores' device.

    Of several videos in a batch a token is kept for all that one of them keeps.

    Args:
        grid: of the tokens that the sample is cut into; behind convolutions that have halved it
            `halvings` times a token stands for several of these.
        seed: of the anchors.
        channels: axis of the sample's channels, if it is not packed into tokens.

    Raises:
        AccelerationError: the sample cannot be cut so.
    """
    unstable = _unstable(prune, grid, channels)
    if halvings:
        grid = grid.halved(halvings)
        pooled = F.adaptive_avg_pool3d(unstable[None].float(), _sides(grid))
        unstable = pooled[0] >= _PART
    anchors = _anchors(grid, prune.cell, seed).to(unstable.device)
    return (unstable | anchors).flatten().nonzero()[:, 0]


def _unstable(prune: Prune, grid: TokenGrid, channels: int) -> torch.Tensor:
    """`grid` of bool: whether the mean of a token's scores is the threshold or more."""
    scores, sides = prune.scores.float(), _sides(grid)
    if scores.ndim == 3:
        packed = scores.mean(dim=-1)
        cut = packed.shape[1] == grid.tokens
        scores = packed.unflatten(1, sides) if cut else packed
    else:
        scores = scores.mean(dim=channels)
        scores = scores[:, None] if scores.ndim == 3 else scores
        given = scores.shape[1:]
        cut = len(given) == 3 and not any(a % b for a, b in zip(given, sides, strict=True))
    if not cut:
        raise AccelerationError(
            f"a sample of {list(prune.scores.shape)} cannot be cut into a grid of {grid} tokens, "
            f"of which some could be pruned: leave steps.prune out"
        )
    tokens = F.adaptive_avg_pool3d(scores, sides)
    least = prune.threshold * tokens.abs().mean()
    return (tokens >= least).any(dim=0)


def _anchors(grid: TokenGrid, cell: int, seed: int) -> torch.Tensor:
    """`grid` of bool: one token of each cell of `cell` x `cell`, smaller ones at the far edges."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(0, grid.height, cell)[:, None]
    columns = torch.arange(0, grid.width, cell)
    drawn = torch.rand(2, grid.frames, len(rows), len(columns), generator=generator)
    down = (drawn[0] * (grid.height - rows).clamp(max=cell)).long() + rows
    right = (drawn[1] * (grid.width - columns).clamp(max=cell)).long() + columns
    found = torch.zeros(_sides(grid), dtype=torch.bool)
    found[torch.arange(grid.frames)[:, None, None], down, right] = True
    return found


def _sides(grid: TokenGrid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width
