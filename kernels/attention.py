"""The one operator under every sparse method: attention over the tiles that a plan keeps."""

from __future__ import annotations

from types import ModuleType

import torch

from . import cpu, hopper, reference, triton_backend
from .plan import BlockPlan
from .precision import INPUT, Precision
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
    keeps everything is dense attention, and nothing is counted twice.

    Args:
        q, k, v: `[B, H, L, D]` of one floating dtype and device, any strides: a transposed
            `[B, L, H, D]` is as good. q has `plan.queries` tokens, k and v have `plan.keys`.
        scale: s above; None is `D ** -0.5`.
        precision: of the operands of both products; see `Precision`.
        backend: one of `BACKENDS`, or None for the fastest that can.

    Returns:
        Output like q, and the log-sum-exp of its logits `[B, H, L]`, float32 or, for float64,
        float64. A query without any key, or with biases of minus infinity alone, gets output 0
        and minus infinity. What is in the keys and values of a tile that is left out without a
        tail, NaN too, reaches nothing.

    Raises:
        ValueError: tensors that do not fit the plan, or a backend that refuses, with its reason.

    Source: the complement tail of Sol-Attn and BSA; its formula covers ASA_G of Video-BLADE (arXiv
    2508.10774) without counting kept tiles twice.
    """
    _fit(q, k, v, plan)
    problem = Problem.of(q, k, v, plan, precision)
    name = backend or choose(problem)
    reason = refuses(problem, name)
    if reason:
        raise ValueError(f"backend {name} cannot do this: {reason}")
    if plan.order is not None:
        q, k, v = (x[:, :, plan.order] for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = BACKENDS[name].attend(q, k, v, plan, scale, precision)
    if plan.order is not None:
        back = plan.order.argsort()
        out, lse = out[:, :, back], lse[:, :, back]
    return out, lse


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
    out = sum(
        part * (part_lse - lse).exp().masked_fill(empty, 0)[..., None].to(part.dtype)
        for part, part_lse in ((a, lse_a), (b, lse_b))
    )
    assert isinstance(out, torch.Tensor)
    return out, lse.masked_fill(empty, -torch.inf)


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
    for what, given, whole in zip(("B", "H"), plan.indices.shape, q.shape, strict=False):
        if given not in (1, whole):
            raise ValueError(f"the plan has {what} = {given}, the tensors {whole}; 1 or the same")


def efficiency(problem: Problem, backend: str) -> float:
    """density x dense time / time of `backend`, measured where its module says; 1 is perfect."""
    return BACKENDS[backend].efficiency(problem)


def workspace(problem: Problem, backend: str) -> int:
    """Bytes that `backend` is predicted to need beside inputs and output, at the most."""
    # Queries, keys, values and output once more, in the order of the plan.
    ordered = problem.tensor_bytes(2 * problem.queries + 2 * problem.keys)
    return ordered + BACKENDS[backend].workspace(problem)
