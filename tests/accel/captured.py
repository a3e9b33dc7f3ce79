"""How much of dense attention a plan's keys hold."""

from __future__ import annotations

import torch

from kinora.kernels.plan import BlockPlan


def captured(weights: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """Share of each query's attention that falls on keys it attends to, `[B, H, L]`.

    Args:
        weights: `[B, H, L, L]`, the softmax over all keys, in the order of the tokens.
    """
    shape = weights.shape[:3]
    every = torch.arange(weights.shape[2])
    queries, keys = (
        (every if order is None else order).expand(shape).argsort(-1) for order in plan.orders
    )
    mask = plan.token_mask().expand_as(weights)
    mask = mask.gather(2, queries[..., None].expand_as(mask))
    mask = mask.gather(3, keys[:, :, None].expand_as(mask))
    return (weights * mask).sum(-1)
