"""Block attention as its definition reads: every logit is written down. For tests and small inputs.

Any device and floating dtype; gradients by autograd, through output and log-sum-exp alike.
"""

from __future__ import annotations

import torch

from .plan import BlockPlan, tile_lengths
from .problem import Problem


def refuses(problem: Problem) -> str | None:
    """Why it cannot take `problem`: never, but it needs memory for all `L²` logits."""
    del problem
    return None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; q, k, v are already in the order of the plan."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    logits = _by_token(plan, queries @ keys.mT * scale)
    if plan.tail == "complement":
        pooled_keys, pooled_values = pool(keys, plan.tile.key), pool(values, plan.tile.key)
        weights = tile_lengths(plan.keys, plan.tile.key, q.device).to(dtype).log()
        kept = plan.mask().repeat_interleave(plan.tile.query, dim=2)[:, :, : plan.queries]
        pooled = queries @ pooled_keys.mT * scale + weights
        logits = torch.cat([logits, pooled.masked_fill(kept, -torch.inf)], dim=-1)
        values = torch.cat([values, pooled_values], dim=-2)
    lse = logits.logsumexp(dim=-1)
    # A row without a single key has no weights: its output is 0, its log-sum-exp minus infinity.
    empty = lse == -torch.inf
    weights = (logits - lse.masked_fill(empty, 0)[..., None]).exp()
    return (weights @ values).to(q.dtype), lse


def pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over the valid tokens of each tile, `[B, H, L, D]` to `[B, H, tiles, D]`."""
    tokens = x.shape[-2]
    lengths = tile_lengths(tokens, size, x.device)
    padded = torch.nn.functional.pad(x, (0, 0, 0, len(lengths) * size - tokens))
    return padded.unflatten(-2, (-1, size)).sum(-2) / lengths[:, None].to(x.dtype)


def _by_token(plan: BlockPlan, logits: torch.Tensor) -> torch.Tensor:
    """Logits `[B, H, queries, keys]` with the bias of kept tiles, minus infinity elsewhere."""

    def spread(tiles: torch.Tensor) -> torch.Tensor:
        rows = tiles.repeat_interleave(plan.tile.query, dim=2)[:, :, : plan.queries]
        return rows.repeat_interleave(plan.tile.key, dim=3)[..., : plan.keys]

    bias = plan.tile_bias()
    if bias is not None:
        logits = logits + spread(bias)
    return logits.masked_fill(~spread(plan.mask()), -torch.inf)


def efficiency(problem: Problem) -> float:
    """It computes every logit several times over: never worth its time."""
    del problem
    return 0.05
