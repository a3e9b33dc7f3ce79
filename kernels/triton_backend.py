"""Block attention in Triton: one program a tile of queries, with a backward pass.

Reads q, k and v by their strides, writes down no logits.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from . import quantise
from .plan import BlockPlan, Tile, tiles_of
from .precision import INPUT, Precision
from .problem import Problem
from .triton_backward import summarize, with_gradients
from .triton_support import interpreted, on_device, padded

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TILES = (16, 32, 64, 128, 256)
TILE_POOLED = 64
"""Pooled tokens that are taken at a time."""
SHARED_BYTES = 226 * 1024
"""Of a processor of a Hopper GPU, less what barriers take."""


def refuses(problem: Problem) -> str | None:
    """Why it cannot take `problem`, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if problem.device != "cuda" and not interpreted():
        return f"it is for CUDA devices, the tensors are on {problem.device}"
    if problem.dtype not in _DTYPES:
        names = ", ".join(str(it).removeprefix("torch.") for it in _DTYPES)
        return f"it takes {names}, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.precision.pv == "fp8":
        return "it has no fp8; hopper has"
    if problem.requires_grad and problem.precision != INPUT:
        return f"it has no backward pass of {problem.precision}; the reference has"
    if problem.requires_grad and problem.masked:
        return "it has no backward pass of masks of tokens within tiles; the reference has"
    if problem.precision.bits("pv") and problem.tile.key < 32:
        return f"whole numbers of values need tiles of 32 keys or more, not {problem.tile.key}"
    if problem.head_dim > 256:
        return f"it takes head dimensions up to 256, not {problem.head_dim}"
    for size in (problem.tile.query, problem.tile.key):
        if size not in _TILES:
            return f"it takes tiles of {', '.join(map(str, _TILES))} tokens, not {size}"
    if _stages(problem.tile, problem.head_dim, problem.dtype) == 0:
        return (
            f"tiles of {problem.tile} with {problem.head_dim} channels do not fit the memory of a "
            f"processor"
        )
    return None


def _stages(tile: Tile, dim: int, dtype: torch.dtype) -> int:
    """Tiles of keys and values that are under way at once, at most 3; 0: not even one fits."""
    row = padded(dim) * dtype.itemsize
    queries, keys = tile.query * row, max(tile.key, TILE_POOLED) * row
    # With one, keys have left the memory when values come.
    needed = {3: queries + 6 * keys, 2: queries + 4 * keys, 1: queries + keys}
    return next((count for count, size in needed.items() if size <= SHARED_BYTES), 0)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; q, k, v are already in the order of the plan."""
    forward = functools.partial(_forward, precision=precision)
    return with_gradients(forward, q, k, v, plan, scale)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import triton_kernels

    kernels: Any = triton_kernels
    batch, heads, queries, dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    tail = plan.tail == "complement"
    # What a variant of the kernel does not read is given any tensor.
    pooled_k, pooled_v, left_out = k, v, counts
    if tail:
        pooled_k, pooled_v, left_out = summarize(k, v, plan)
    rows, width = indices.shape[2:]
    qk, pv = precision.bits("qk"), precision.bits("pv")
    q_scale = k_scale = v_scale = pooled_k_scale = pooled_v_scale = shift = lse
    whole = quantise.whole_numbers
    if qk:
        shared: quantise.Shared = "tile" if qk == 8 else "token"
        mean = k.mean(2, dtype=torch.float32, keepdim=True)
        given: dict[str, Any] = {"bits": qk, "shared": shared}
        q, q_scale, shift = whole(q, quantise.QUERIES, shift=(mean, scale), **given)
        k, k_scale, _ = whole(k, plan.tile.key, mean=mean, **given)
        if tail:
            pooled_k, pooled_k_scale, _ = whole(pooled_k, quantise.POOLED, mean=mean, **given)
    if pv:
        given = {"bits": pv, "shared": "channel"}
        v, v_scale, _ = whole(v, plan.tile.key, **given)
        if tail:
            pooled_v, pooled_v_scale, _ = whole(pooled_v, TILE_POOLED, **given)
    with on_device(q):
        kernels.forward[(rows, batch * heads)](
            q, k, v, out, lse, indices, counts,
            counts if plan.bias is None else plan.bias.contiguous(),
            counts if plan.within is None else plan.within.contiguous(),
            pooled_k, pooled_v, left_out,
            q_scale, k_scale, v_scale, pooled_k_scale, pooled_v_scale, shift,
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
            0 if indices.shape[0] == 1 else indices.shape[1] * rows,
            0 if indices.shape[1] == 1 else rows,
            heads, queries, plan.keys, rows, plan.columns, width,
            0 if plan.within is None else plan.within.shape[3],
            scale,
            DIM=dim,
            PADDED_DIM=max(32, padded(dim)) if qk or pv else padded(dim),
            TILE_Q=plan.tile.query,
            TILE_K=plan.tile.key,
            TILE_POOLED=TILE_POOLED,
            BIASED=plan.bias is not None,
            MASKED=plan.within is not None,
            TAIL=tail,
            WIDE=interpreted(),
            QK=qk or 0,
            PV=pv or 0,
            SHARE_Q=1 if qk == 4 else quantise.QUERIES,
            SHARE_K=1 if qk == 4 else plan.tile.key,
            SHARE_POOLED=1 if qk == 4 else quantise.POOLED,
            num_warps=4 if plan.tile.query <= 128 else 8,
            num_stages=_stages(plan.tile, dim, q.dtype),
        )  # fmt: skip
    return out, lse


def workspace(problem: Problem) -> int:
    """Pooled keys and values, in float32 first, and a bit a tile for the tail.

    With gradients also what the backward pass needs, at the same time at the most.
    """
    backward = 0
    if problem.requires_grad:
        from . import triton_backward

        backward = triton_backward.workspace(problem)
    columns = tiles_of(problem.keys, problem.tile.key)
    rows = tiles_of(problem.queries, problem.tile.query)
    pairs, dim = problem.batch * problem.heads, problem.head_dim
    size = backward
    pooled = columns if problem.tail == "complement" else 0
    if pooled:
        size += 2 * pairs * columns * dim * (4 + problem.dtype.itemsize)
        size += 4 * pairs * rows * tiles_of(columns, 32)
    if problem.precision.bits("qk"):
        # Whole numbers, packed or not, and at the most a scale and a shift for each token.
        size += pairs * (problem.queries + problem.keys + pooled) * (dim + 8)
    if problem.precision.bits("pv"):
        size += pairs * (problem.keys + pooled) * dim
        size += 4 * pairs * (columns + tiles_of(columns, TILE_POOLED)) * dim
    return size


def efficiency(problem: Problem) -> float:
    """Measured beside cuDNN's dense attention on an H100 or, whole numbers, H200; not float32."""
    if problem.dtype == torch.float32:
        return 0.05
    value = 0.75 if problem.head_dim <= 64 else 0.5
    if problem.precision.bits("pv"):
        value = 0.3 if problem.head_dim <= 64 else 0.23
    elif problem.precision != INPUT:
        value = 0.45
    return value if problem.tail == "none" else 0.7 * value
