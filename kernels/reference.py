"""Block attention as its definition reads: every logit is written down. For tests and small inputs.

Any device and floating dtype; gradients by autograd, through output and log-sum-exp alike. Queries
are taken in chunks that share nothing, so that memory is bounded and results stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import BlockPlan, tile_lengths, tiles_of
from .precision import Precision
from .problem import Problem

POOLED = 64
"""Pooled tokens whose values, and whose weights in a row, share a scale."""
_MOST = {8: 127, 4: 7}
"""Steps from 0 to the largest number of so many bits."""
LOGITS_BYTES = 2**26
"""Logits of one chunk; with masks and weights about four times as much is alive at a time."""


def refuses(problem: Problem) -> str | None:
    """Why it cannot take `problem`: never."""
    del problem
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; q, k, v are already in the order of the plan."""
    mask, bias = plan.mask(), plan.tile_bias()
    operands = rounded(q, k, v, plan, scale, precision)
    queries, keys, values = operands.queries, operands.keys, operands.values
    pooled, shift = operands.pooled, operands.shift
    most = _MOST.get(precision.bits("pv") or 0)

    def chunk(queries: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.arange(start, start + queries.shape[2], device=q.device) // plan.tile.query
        kept, all_values = mask[:, :, row], values
        logits = queries @ keys.mT * scale
        if bias is not None:
            logits = logits + _by_token(bias[:, :, row], plan)
        attended = _by_token(kept, plan)
        if plan.within is not None:
            attended = plan.token_mask(torch.arange(start, start + len(row), device=q.device))
        logits = logits.masked_fill(~attended, -torch.inf)
        if pooled is not None:
            weights = tile_lengths(plan.keys, plan.tile.key, q.device).to(queries.dtype).log()
            tail = queries @ pooled[0].mT * scale + weights
            logits = torch.cat([logits, tail.masked_fill(kept, -torch.inf)], dim=-1)
            all_values = torch.cat([values, pooled[1]], dim=-2)
        lse = logits.logsumexp(dim=-1)
        # A row without a key has no weights: its output is 0, its log-sum-exp minus infinity.
        empty = lse == -torch.inf
        weights = (logits - lse.masked_fill(empty, 0)[..., None]).exp()
        if most:
            # Of each query and tile; weights are never below 0, so that 4 bits reach 15.
            largest = {127: 127, 7: 15}[most]
            parts = weights.split([plan.keys, weights.shape[-1] - plan.keys], -1)
            sizes = plan.tile.key, POOLED
            weights = torch.cat(
                [
                    as_whole(part.mT, largest, size, by_channel=True).mT
                    for part, size in zip(parts, sizes, strict=True)
                ],
                dim=-1,
            )
        elif precision.pv == "fp8":
            # The largest weight of a row is 2^8.
            weights = as_fp8(weights, weights.amax(-1, keepdim=True) / 256)
        return _weighted(weights, all_values, logits != -torch.inf).to(q.dtype), lse

    problem = Problem.of(q, k, v, plan, precision)
    size = max(1, LOGITS_BYTES // _logits_bytes(problem))
    if size >= plan.queries:
        out, lse = chunk(queries, 0)
        return out, lse if shift is None else lse + shift
    from torch.utils.checkpoint import checkpoint

    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, plan.queries, size):
        given = queries[:, :, start : start + size], start
        # A backward pass would keep the logits of all chunks: they are made again instead.
        parts.append(
            checkpoint(chunk, *given, use_reentrant=False, preserve_rng_state=False)
            if problem.requires_grad
            else chunk(*given)
        )
    out, lse = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    return out, lse if shift is None else lse + shift


@dataclass(frozen=True, slots=True)
class Operands:
    """What is multiplied, in float32 or more.

    Attributes:
        queries, keys, values: as given, but rounded.
        pooled: mean key and value of each tile, rounded, where the plan has a tail.
        shift: what the log-sum-exp of each query lacks, since keys are less their mean; or None.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pooled: tuple[torch.Tensor, torch.Tensor] | None
    shift: torch.Tensor | None


def rounded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> Operands:
    """Operands in the numbers that `precision` has; those of weights are rounded later."""
    dtype = _precision(q.dtype)
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    shift = None
    bits = precision.bits("qk")
    if bits:
        mean = keys.mean(-2, keepdim=True)
        keys, shift = keys - mean, (queries @ mean.mT)[..., 0] * scale
    pooled = None
    if plan.tail == "complement":
        pooled = pool(keys, plan.tile.key), pool(values, plan.tile.key)
    if bits == 8:
        queries, keys = as_whole(queries, 127, 64), as_whole(keys, 127, plan.tile.key)
        pooled = pooled and (as_whole(pooled[0], 127, 128), pooled[1])
    elif bits == 4:
        queries, keys = as_whole(queries, 7, 1), as_whole(keys, 7, 1)
        pooled = pooled and (as_whole(pooled[0], 7, 1), pooled[1])
    most = _MOST.get(precision.bits("pv") or 0)
    if most:
        values = as_whole(values, most, plan.tile.key, by_channel=True)
        pooled = pooled and (pooled[0], as_whole(pooled[1], most, POOLED, by_channel=True))
    elif precision.pv == "fp8":
        step = values.abs().amax(-2, keepdim=True) / 448
        values = as_fp8(values, step)
        pooled = pooled and (pooled[0], as_fp8(pooled[1], step))
    return Operands(queries, keys, values, pooled, shift)


def as_whole(x: torch.Tensor, most: int, size: int, *, by_channel: bool = False) -> torch.Tensor:
    """Rounded to `most` even steps up to the largest of `size` tokens, and as many below 0.

    `x [B, H, L, D]`; with `by_channel` each channel has steps of its own. Halves go to even
    numbers. Gradients pass as if nothing were rounded.
    """
    tokens = x.shape[-2]
    tiles = torch.nn.functional.pad(x, (0, 0, 0, -tokens % size)).unflatten(-2, (-1, size))
    step = tiles.abs().amax(-2 if by_channel else (-2, -1), keepdim=True) / most
    whole = (tiles / step.masked_fill(step == 0, 1)).round()
    return x + ((whole * step).flatten(-3, -2)[..., :tokens, :] - x).detach()


def as_fp8(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """`x / step` in float8 e4m3, times `step`; gradients pass as if nothing were rounded."""
    step = step.masked_fill(step == 0, 1)
    return x + ((x / step).to(torch.float8_e4m3fn).to(x.dtype) * step - x).detach()


def pool(x: torch.Tensor, size: int) -> torch.Tensor:
    """Mean over the valid tokens of each tile, `[B, H, L, D]` to `[B, H, tiles, D]`."""
    tokens = x.shape[-2]
    lengths = tile_lengths(tokens, size, x.device)
    padded = torch.nn.functional.pad(x, (0, 0, 0, len(lengths) * size - tokens))
    return padded.unflatten(-2, (-1, size)).sum(-2) / lengths[:, None].to(x.dtype)


def _weighted(weights: torch.Tensor, values: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """`weights @ values`, where NaN and infinity reach only the queries that attend to them."""
    broken = ~values.isfinite()
    if not broken.any():
        return weights @ values
    # A weight of 0 would not keep them out: 0 x NaN is NaN.
    reached = attended.to(values.dtype) @ broken.to(values.dtype) > 0
    return (weights @ values.masked_fill(broken, 0)).masked_fill(reached, torch.nan)


def _by_token(tiles: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """`[…, K]` to `[…, keys]`: what is said of a tile, of each of its tokens."""
    return tiles.repeat_interleave(plan.tile.key, dim=-1)[..., : plan.keys]


def _precision(dtype: torch.dtype) -> torch.dtype:
    """What it computes in."""
    return torch.promote_types(dtype, torch.float32)


def _logits_bytes(problem: Problem) -> int:
    """Of one query, in all heads."""
    pooled = tiles_of(problem.keys, problem.tile.key) if problem.tail == "complement" else 0
    size = _precision(problem.dtype).itemsize
    return problem.batch * problem.heads * (problem.keys + pooled) * size


def efficiency(problem: Problem) -> float:
    """It computes every logit several times over: never worth its time."""
    del problem
    return 0.05


def workspace(problem: Problem) -> int:
    """Queries, keys and values in the precision it computes in, and the logits of a chunk."""
    one = _logits_bytes(problem)
    logits = min(one * problem.queries, max(one, LOGITS_BYTES))
    precision = _precision(problem.dtype)
    copied = 0 if precision == problem.dtype else precision.itemsize // problem.dtype.itemsize
    return 4 * logits + copied * problem.tensor_bytes(problem.queries + 2 * problem.keys)
