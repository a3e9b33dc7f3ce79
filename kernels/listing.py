"""Lists of what is true in the rows of a mask."""

from __future__ import annotations

import torch


def entries(
    mask: torch.Tensor, width: int | None = None, first: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns that are true in each row, and how many; without a sort.

    Args:
        mask: `[..., Q, K]` bool.
        width: of the lists; None is what the longest needs, at least 1, which waits for the device.
        first: of the same shape, columns that stand first in the list of their row, as those with a
            mask of tokens must. None: in rising order all.

    Returns:
        `[..., Q, width]` int32, 0 behind what counts, and `[..., Q]` int32.
    """
    # How many are true up to a column is its place on the list.
    places = mask.cumsum(-1)
    counts = places[..., -1].to(torch.int32)
    width = max(1, int(counts.max())) if width is None else width
    if first is not None:
        ahead = mask & first
        before = ahead.cumsum(-1)
        places = torch.where(ahead, before, places - before + before[..., -1:])
    # What is false goes into one entry too many.
    places = (places - 1).masked_fill_(~mask, width)
    columns = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    lists = counts.new_zeros(*counts.shape, width + 1)
    lists.scatter_(-1, places, columns.expand_as(places))
    return lists[..., :width].contiguous(), counts
