"""Block attention for Hopper GPUs (H100, H200): warps that load beside warps that compute.

Forward only, 16-bit tensors. Written in Gluon, Triton's lower level; run on H100 and H200 with
triton 3.6. `docs/benchmarks.md` has its times beside cuDNN's dense attention.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .plan import BlockPlan
from .problem import Problem
from .triton_backend import interpreted

TRITONS = ("3.6",)
"""Versions with which it has been compared with the reference on a GPU: Gluon changes with each."""

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128)
_KEYS = (32, 64, 128)
QUERIES = 128
"""Tokens of a tile of queries: two groups of warps take half of them each."""
STEP = 128
"""Keys that are loaded and multiplied together, whatever the tile."""

_EFFICIENCIES = {64: 1.0, 128: 0.9}
"""By head dimension: the lower ones of density x cuDNN's dense time / own time at densities of a
tenth and a fifth, 17,776 to 75,600 tokens."""


def refuses(problem: Problem) -> str | None:
    """Why it cannot take `problem`, or None."""
    if problem.device != "cuda":
        return f"it is for CUDA devices, the tensors are on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"it takes float16, bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.requires_grad:
        return "it has no backward pass; the reference has"
    if problem.head_dim not in _HEAD_DIMS:
        return f"it takes head dimensions 64 and 128, not {problem.head_dim}"
    if problem.tile.query != QUERIES:
        return f"it takes tiles of {QUERIES} queries, not {problem.tile.query}"
    if problem.tile.key not in _KEYS:
        return f"it takes tiles of {', '.join(map(str, _KEYS))} keys, not {problem.tile.key}"
    if problem.tail != "none":
        return "it has no tail yet"
    if problem.biased:
        return "it does not weigh tiles yet"
    return machine()


@functools.cache
def machine() -> str | None:
    """Why this machine cannot run it, or None."""
    if interpreted():
        return "Triton's interpreter has no Gluon"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"it is for compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError:
        return "triton is not installed"
    if version.rpartition(".")[0] not in TRITONS:
        return f"it has run with triton {', '.join(TRITONS)}, here is {version}"
    return None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; q, k, v are already in the order of the plan."""
    from . import hopper_kernels

    kernels: Any = hopper_kernels
    if scale <= 0:
        # The kernel scales maxima, which a factor below 0 would make minima.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (_loadable(x) for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    rows, width = indices.shape[2:]
    total = batch * heads * rows
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device(q.device):
        kernels.forward[(min(processors, total),)](
            kernels.descriptor(q, QUERIES // 2),
            kernels.descriptor(k, plan.tile.key),
            kernels.descriptor(v, plan.tile.key),
            out, lse, indices, counts,
            *out.stride()[:3],
            0 if indices.shape[0] == 1 else indices.shape[1] * rows,
            0 if indices.shape[1] == 1 else rows,
            heads, queries, plan.keys, rows, plan.columns, width, total,
            scale * kernels.LOG2_E,
            DIM=dim,
            TILE_K=plan.tile.key,
            STEP=STEP,
            STAGES=3 if dim == 128 else 2,
            TILE_Q=QUERIES,
            REGISTERS=240,
            num_warps=4,
        )  # fmt: skip
    return out, lse


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """`x` as the copy engine reads it: rows side by side, all else in steps of 16 bytes."""
    steps = all(x.stride(i) * x.element_size() % 16 == 0 for i in range(3))
    # The copy engine knows no step of 0, which an expanded tensor has.
    steps = steps and all(x.stride(i) > 0 for i in range(3))
    if x.stride(3) == 1 and steps and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def workspace(problem: Problem) -> int:
    """Copies of tensors whose strides the copy engine cannot take; none as models have them."""
    del problem
    return 0


def efficiency(problem: Problem) -> float:
    """As measured, see `_EFFICIENCIES`; launches weigh more where there are few tokens."""
    value = _EFFICIENCIES[problem.head_dim]
    return value if problem.keys >= 16384 else value * problem.keys / 16384
