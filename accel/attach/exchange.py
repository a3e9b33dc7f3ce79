"""Attention of tokens that several processes hold: Ulysses and ring, through diffusers' templates.

In Ulysses (arXiv 2309.14509) each process gets all tokens of some of the heads, attends, and gives
the results back; in a ring (arXiv 2310.01889) each keeps its queries, sees the keys of one process
after another, and joins the results by the logarithms of their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models import _modeling_parallel as modeling  # pyright: ignore[reportPrivateUsage]
from diffusers.models import attention_dispatch as dispatch
from torch import distributed

from ..errors import AccelerationError
from .parallel import Ranks
from .routes import Call, unrouted

Attend = Callable[[Call], torch.Tensor]


def exchanged(
    call: Call, ranks: Ranks, *, text: int, picture: int, first: bool, attend: Attend
) -> torch.Tensor:
    """What `attend` makes of the call of all tokens and this process's heads; laid out as `call`.

    Args:
        text, picture: tokens of all processes; text is `first`, or last.
        attend: is called once, and its result is laid out as that of a call.
    """
    _check(call, ranks, text, picture)
    assert ranks.context is not None
    ring = ranks.asked.ring > 1
    own = call.k.shape[2]
    local = call.mask is not None and call.mask.shape[-1] == own
    if ring and call.mask is not None:
        raise AccelerationError(
            "parallel.ring sees the keys piece by piece, and some tokens are masked: use "
            "parallel.ulysses"
        )

    def forward(_: Any, q: Any, k: Any, v: Any, mask: Any, *__: Any, **___: Any) -> Any:
        """Of `[B, L, H, D]`."""
        if ring:
            return _with_lse(q, k, v, call.scale)
        order = ranks.order(text, picture, first, q.device) if text else None
        if order is not None:
            q, k, v = (x[:, order.places] for x in (q, k, v))
            mask = mask[..., order.places] if mask is not None else None
        mask = mask if local else call.mask
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        whole = replace(call, q=q, k=k, v=v, mask=mask, dense=lambda: call.stock(q, k, v, mask))
        # Both layouts are turned into each other alike.
        out = call.laid_out(attend(whole)).transpose(1, 2)
        return out if order is None else out[:, order.row]

    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    template: Any = dispatch._templated_context_parallel_attention  # pyright: ignore[reportPrivateUsage]
    out = template(
        q,
        k,
        v,
        call.mask if local else None,
        scale=call.scale,
        forward_op=forward,
        backward_op=None,
        _parallel_config=modeling.ParallelConfig(context_parallel_config=ranks.context),
    )
    return call.laid_out(out.transpose(1, 2))


def _check(call: Call, ranks: Ranks, text: int, picture: int) -> None:
    """Raise AccelerationError where a call is not of the tokens that were split."""
    own = call.q.shape[2]
    if call.k.shape != call.q.shape or not call.flags.plain:
        raise AccelerationError(
            "attention that processes share must be plain self-attention: leave [parallel] out"
        )
    parts = zip(ranks.parts(text), ranks.parts(picture), strict=True)
    if own not in [a + b for a, b in parts]:
        raise AccelerationError(
            f"a process has {own:,} tokens, which are no part of {picture:,} and {text} of text, "
            f"as with pictures beside its own: leave [parallel] out"
        )


def _with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `[B, L, H, D]` and the logarithms of its sums `[B, L, H]`, by torch's kernels."""
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    aten: Any = torch.ops.aten
    with unrouted():
        if q.device.type == "cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*turned, scale=scale)
        elif q.dtype in (torch.float16, torch.bfloat16):
            out, lse, *_ = aten._scaled_dot_product_flash_attention(*turned, scale=scale)
        else:
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(
                *turned, None, True, scale=scale
            )
            lse = lse[:, :, : q.shape[1]]  # that kernel rounds its length up
    return out.transpose(1, 2), lse.transpose(1, 2)


def all_heads(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """`[B, H, L, D]` of all processes, of the heads of each."""
    own = x.contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.asked.ulysses)]
    distributed.all_gather(parts, own, ranks.heads_group)
    return torch.cat(parts, dim=1)


def mean_of_heads(value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The mean of a number over the processes that share heads."""
    total = value.clone()
    distributed.all_reduce(total, group=ranks.heads_group)
    return total / ranks.asked.ulysses
