"""Block attention as `torch.compile` sees it: one operator and its gradient, nothing inside.

So a compiled model holds neither plans nor choices of backends: any plan of the same shapes runs
without another compilation, and what a backend does in Python breaks no graph.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import triton_backward
from .backends import attend, checked, choose
from .lists import permuted
from .plan import BlockPlan, Tile
from .precision import Precision
from .problem import Problem, wants_gradients

_GRADIENTS_OF = ("triton", "hopper")
"""Backends whose gradients come from `triton_backward`; the others' from autograd."""

_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Settings(NamedTuple):
    """What is no tensor, in the types that an operator takes."""

    sizes: list[int]
    tail: str
    scale: float | None
    qk: str
    pv: str
    backend: str


def block_attention(
    tensors: _Tensors, plan: BlockPlan, scale: float | None, precision: Precision, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention.block_attention`; `backend` "" is the fastest that can."""
    sizes = [plan.tile.query, plan.tile.key, plan.queries, plan.keys, plan.means]
    wants = wants_gradients(*tensors, plan.bias)
    return torch.ops.kinora.block_attention(
        *tensors, plan.indices, plan.counts, plan.order, plan.key_order, plan.bias, plan.within,
        sizes, plan.tail, scale, precision.qk, precision.pv, backend, wants,
    )  # fmt: skip


def _plan(tensors: tuple[Any, ...], settings: _Settings) -> BlockPlan:
    """The plan from indices, counts, both orders, bias and mask of tokens."""
    indices, counts, order, key_order, bias, within = tensors
    tile_q, tile_k, queries, keys, means = settings.sizes
    tail: Any = settings.tail
    return BlockPlan(
        indices, counts, Tile(tile_q, tile_k), queries, keys, tail,
        order, key_order, bias, means, within,
    )  # fmt: skip


def _precision(settings: _Settings) -> Precision:
    qk, pv = settings.qk, settings.pv
    return Precision(qk, pv)  # pyright: ignore[reportArgumentType] # it says what is allowed


@torch.library.custom_op("kinora::block_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    order: torch.Tensor | None,
    key_order: torch.Tensor | None,
    bias: torch.Tensor | None,
    within: torch.Tensor | None,
    sizes: list[int],
    tail: str,
    scale: float | None,
    qk: str,
    pv: str,
    backend: str,
    wants_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    settings = _Settings(sizes, tail, scale, qk, pv, backend)
    plan = _plan((indices, counts, order, key_order, bias, within), settings)
    precision = _precision(settings)
    name = checked(q, k, v, plan, precision, backend or None, wants=wants_gradients)
    out, lse = attend(q, k, v, plan, scale, precision, name)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    del k, v
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_lse_dtype(q.dtype))


@torch.library.custom_op("kinora::block_attention_backward", mutates_args=())
def _backward(
    douts: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    outs: list[torch.Tensor],
    indices: torch.Tensor,
    counts: torch.Tensor,
    order: torch.Tensor | None,
    key_order: torch.Tensor | None,
    bias: torch.Tensor | None,
    within: torch.Tensor | None,
    sizes: list[int],
    tail: str,
    scale: float | None,
    qk: str,
    pv: str,
    backend: str,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """Gradients of q, k, v and the bias; of those that nobody wants, nothing, `[0]`."""
    settings = _Settings(sizes, tail, scale, qk, pv, backend)
    plan = _plan((indices, counts, order, key_order, bias, within), settings)
    precision = _precision(settings)
    problem = replace(Problem.of(q, k, v, plan, precision), requires_grad=True)
    name = backend or choose(problem)
    if name in _GRADIENTS_OF:
        found = _by_kernels(douts, (q, k, v), outs, plan, scale, wanted)
    else:
        found = _by_autograd(douts, (q, k, v), plan, scale, precision, name, wanted)
    return [q.new_empty(0) if it is None else it.contiguous() for it in found]


@_backward.register_fake
def _(
    douts: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: Any,
) -> list[torch.Tensor]:
    del douts
    bias, wanted = others[5], others[-1]
    return [
        x.new_empty(x.shape) if want and x is not None else q.new_empty(0)
        for x, want in zip((q, k, v, bias), wanted, strict=True)
    ]


def _by_kernels(
    douts: list[torch.Tensor],
    tensors: _Tensors,
    outs: list[torch.Tensor],
    plan: BlockPlan,
    scale: float | None,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    q, k, v = tensors
    out, lse = outs
    dout, dlse = douts
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    order, key_order = plan.orders
    if order is not None:
        q, out, dout = (permuted(x, order) for x in (q, out, dout))
        lse, dlse = (x.gather(2, order.expand_as(x)) for x in (lse, dlse))
    if key_order is not None:
        k, v = permuted(k, key_order), permuted(v, key_order)
    wants = wanted[0], wanted[1], wanted[2], wanted[3]
    found = triton_backward.gradients(dout, dlse, (q, k, v, out, lse), plan, factor, wants)
    back = (
        x if x is None or by is None else permuted(x, by, inverse=True)
        for x, by in zip(found[:3], (order, key_order, key_order), strict=True)
    )
    return *back, found.bias


def _by_autograd(
    douts: list[torch.Tensor],
    tensors: _Tensors,
    plan: BlockPlan,
    scale: float | None,
    precision: Precision,
    name: str,
    wanted: list[bool],
) -> list[torch.Tensor | None]:
    """The forward pass once more, this time recorded."""
    stream = torch.cuda.current_stream(tensors[0].device) if tensors[0].is_cuda else None

    def work() -> list[torch.Tensor | None]:
        with torch.cuda.stream(stream):
            q, k, v = (x.detach().requires_grad_() for x in tensors)
            bias = None if plan.bias is None else plan.bias.detach().requires_grad_()
            made = attend(q, k, v, replace(plan, bias=bias), scale, precision, name)
            leaves = [x if want else None for x, want in zip((q, k, v, bias), wanted, strict=True)]
            given = [x for x in leaves if x is not None]
            found = iter(torch.autograd.grad(made, given, douts, materialize_grads=True))
            return [None if x is None else next(found) for x in leaves]

    # Inside an operator nothing is recorded; in another thread it is.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, sizes, tail, scale, qk, pv, backend, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = sizes, tail, scale, qk, pv, backend


def _differentiate(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, *plan, out, lse = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 7)]
    found = torch.ops.kinora.block_attention_backward(
        [dout, dlse], q, k, v, [out, lse], *plan, *ctx.settings, wanted
    )
    dq, dk, dv, dbias = (x if want else None for x, want in zip(found, wanted, strict=True))
    return dq, dk, dv, None, None, None, None, dbias, *(None for _ in range(8))


_forward.register_autograd(_differentiate, setup_context=_save)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
