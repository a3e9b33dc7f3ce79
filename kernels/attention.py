"""The one operator under every sparse method: attention over the tiles that a plan keeps."""

from __future__ import annotations

import math

import torch

from . import compiled
from .backends import attend, checked
from .lists import permuted, tile_means
from .plan import BlockPlan
from .precision import INPUT, Precision
from .reference import pool


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    precision: Precision = INPUT,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the kept tiles of `plan` and, with a tail, one token a tile left out.

    One softmax joins both: for query i in tile I, with the kept tiles S and the others U,
    out_i = (sum over t in S of e^{s q_i k_t + b} v_t + sum over j in U of n_j e^{s q_i k_j} v_j)
    over the same with v = 1; k_j and v_j are means over the n_j tokens of tile j. So a plan that
    keeps everything is dense attention, and nothing is counted twice. A plan with `means` adds the
    terms of its means, all of them: what is kept is then counted twice, and dense attention is not
    among its results.

    Args:
        q, k, v: `[B, H, L, D]` of one floating dtype and device, any strides: a transposed
            `[B, L, H, D]` is as good. q has `plan.queries` tokens, k and v have `plan.keys`.
        scale: s above; None is `D ** -0.5`.
        precision: of the operands of both products; see `Precision`.
        backend: one of `backends.BACKENDS`, or None for the fastest that can.

    Returns:
        Output like q, and the log-sum-exp of its logits `[B, H, L]`, float32 or, for float64,
        float64. A query without any key, or with biases of minus infinity alone, gets output 0
        and minus infinity. What is in the keys and values of a tile that is left out without a
        tail, NaN too, reaches nothing, unless `precision` takes a mean or a scale of all of them;
        those that a mask leaves out of a kept tile weigh nothing, but must be finite.

    Raises:
        TypeError: a `precision` that is none, such as text.
        ValueError: tensors that do not fit the plan, or a backend that refuses, with its reason;
            with `KINORA_CHECK=1` in the environment also numbers that `BlockPlan.check` refuses.

    Source: the complement tail of Sol-Attn and BSA; its formula covers ASA_G of Video-BLADE (arXiv
    2508.10774) without counting kept tiles twice. With `means` they are, as in its authors' code,
    which computes two attentions and joins them by their log-sum-exp, as this does.
    """
    if not isinstance(precision, Precision):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"precision {precision!r}; it must be a Precision, such as Precision('int8', 'fp8') "
            "from kinora.kernels.precision"
        )
    if plan.means:
        given = scale, precision, backend
        return merge(_attend(q, k, v, plan, *given), _attend_to_means(q, k, v, plan, *given))
    return _attend(q, k, v, plan, scale, precision, backend)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    precision: Precision,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; of the kept tiles alone, whatever means the plan has."""
    if torch.compiler.is_compiling():
        return compiled.block_attention((q, k, v), plan, scale, precision, backend or "")
    name = checked(q, k, v, plan, precision, backend)
    return attend(q, k, v, plan, scale, precision, name)


def _attend_to_means(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    precision: Precision,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to one token for every `plan.means` keys, each weighing as many as it has."""
    keys, values = (_means(x, plan.means, plan.orders[1]) for x in (k, v))
    whole, rest = divmod(plan.keys, plan.means)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    if whole:
        every = BlockPlan.dense(tile=plan.tile, queries=plan.queries, keys=whole, device=q.device)
        full = keys[:, :, :whole], values[:, :, :whole]
        out, lse = _attend(q, *full, every, scale, precision, backend)
        parts.append((out, lse + math.log(plan.means)))
    if rest:  # the last has fewer tokens, a weight of its own
        high = torch.promote_types(q.dtype, torch.float32)
        logits = (q.to(high) @ keys[:, :, whole:].to(high).mT)[..., 0]
        logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale) + math.log(rest)
        parts.append((values[:, :, whole:].expand_as(q), logits))
    return merge(*parts) if len(parts) == 2 else parts[0]


def _means(x: torch.Tensor, size: int, order: torch.Tensor | None) -> torch.Tensor:
    """Means of every `size` tokens in an order, `[B, H, L, D]` to `[B, H, L / size, D]`."""
    if x.dtype != torch.float64 and (order is None or order.ndim == 1):
        return tile_means(x, size, order).to(x.dtype)
    ordered = x if order is None else permuted(x, order)
    return pool(ordered.to(torch.promote_types(x.dtype, torch.float32)), size).to(x.dtype)


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both parts, from the results over disjoint keys.

    Args:
        first, second: output `[B, H, L, D]` and log-sum-exp `[B, H, L]` each.
    """
    (a, lse_a), (b, lse_b) = first, second
    # No key on either side. The infinities are taken out before anything is computed, since their
    # difference would make gradients NaN, and put back at the end.
    empty = (lse_a == -torch.inf) & (lse_b == -torch.inf)
    lse_a, lse_b = lse_a.masked_fill(empty, 0), lse_b.masked_fill(empty, 0)
    lse = torch.logaddexp(lse_a, lse_b)
    shares = ((it - lse).exp().masked_fill(empty, 0)[..., None] for it in (lse_a, lse_b))
    # Rounded once, at the end: shares are of the precision of the log-sum-exp.
    out = (a * next(shares) + b * next(shares)).to(a.dtype)
    return out, lse.masked_fill(empty, -torch.inf)
