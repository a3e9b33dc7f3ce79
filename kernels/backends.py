"""Who computes block attention: what each backend takes, costs and needs."""

from __future__ import annotations

import os
from dataclasses import replace
from types import ModuleType

import torch

from . import cpu, hopper, lists, reference, triton_backend
from .plan import BlockPlan
from .precision import Precision
from .problem import Problem

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "hopper": hopper,
    "triton": triton_backend,
    "reference": reference,
}
"""By name, in the order in which one is chosen."""


def refuses(problem: Problem, backend: str) -> str | None:
    """Why `backend` cannot take `problem`, or None. Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[backend].refuses(problem)


def choose(problem: Problem) -> str:
    """The fastest backend that takes `problem`."""
    # Triton's interpreter takes any device: it is for tests.
    names = (it for it in BACKENDS if it != "triton" or problem.device == "cuda")
    return next(name for name in names if refuses(problem, name) is None)


def checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    precision: Precision,
    backend: str | None,
    *,
    wants: bool | None = None,
) -> str:
    """The backend, or the fastest that can; ValueError where that one, or anything, does not fit.

    `wants`: whether gradients are; None: as the tensors say.
    With `KINORA_CHECK=1` in the environment the plan's numbers are looked at too, which waits for
    the device.
    """
    _fit(q, k, v, plan)
    if os.environ.get("KINORA_CHECK") == "1":
        plan.check()
    problem = Problem.of(q, k, v, plan, precision)
    if wants is not None:
        problem = replace(problem, requires_grad=wants)
    name = backend or choose(problem)
    reason = refuses(problem, name)
    if reason:
        raise ValueError(f"backend {name} cannot do this: {reason}")
    return name


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float | None,
    precision: Precision,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; `backend` does not refuse it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order, key_order = plan.orders
    if order is not None:
        q = lists.permuted(q, order)
    if key_order is not None:
        k, v = lists.permuted(k, key_order), lists.permuted(v, key_order)
    out, lse = BACKENDS[backend].attend(q, k, v, plan, scale, precision)
    if order is None:
        return out, lse
    return lists.permuted(out, order, inverse=True), lse.scatter(2, order.expand_as(lse), lse)


def efficiency(problem: Problem, backend: str) -> float:
    """density x dense time / time of `backend`, measured where its module says; 1 is perfect."""
    return BACKENDS[backend].efficiency(problem)


def workspace(problem: Problem, backend: str) -> int:
    """Bytes that `backend` is predicted to need beside inputs and output, at the most."""
    # Queries, keys, values and output once more, in the order of the plan.
    ordered = problem.tensor_bytes(2 * problem.queries + 2 * problem.keys)
    return ordered + BACKENDS[backend].workspace(problem)


def _fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan) -> None:
    """Raise ValueError where tensors and plan do not go together."""
    told = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{told}; [B, H, L, D] is needed, k and v alike, B, H and D of all alike")
    if 0 in (*q.shape, *k.shape):
        # Backends would differ: some return nothing, torch's kernel even ends the process.
        raise ValueError(f"{told}; there is nothing to attend where a dimension is 0")
    if (q.shape[2], k.shape[2]) != (plan.queries, plan.keys):
        raise ValueError(f"{told}; the plan is for {plan.queries} queries and {plan.keys} keys")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}; one floating dtype is needed")
    if not q.device == k.device == v.device == plan.indices.device:
        raise ValueError(
            f"q on {q.device}, k on {k.device}, v on {v.device}, the plan on "
            f"{plan.indices.device}; all must be on one device"
        )
    tensors = {
        "plan": plan.indices,
        "plan's counts": plan.counts,
        "plan's order": plan.order,
        "plan's key_order": plan.key_order,
        "plan's bias": plan.bias,
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != q.device:
            raise ValueError(
                f"the {name}: on {tensor.device}, q on {q.device}; all must be on one device"
            )
        if tensor.ndim == 1:
            continue
        for what, given, whole in zip(("B", "H"), tensor.shape, q.shape, strict=False):
            if given not in (1, whole):
                raise ValueError(
                    f"the {name} has {what} = {given}, the tensors {whole}; 1 or the same"
                )
