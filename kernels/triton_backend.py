"""Block attention in Triton: one program a tile of queries, with a backward pass.

Reads q, k and v by their strides, writes down no logits.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from .plan import BlockPlan, Tile
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
    if problem.precision != INPUT:
        return f"it multiplies what it is given, not {problem.precision}"
    if problem.head_dim > 256:
        return f"it takes head dimensions up to 256, not {problem.head_dim}"
    for size in (problem.tile.query, problem.tile.key):
        if size not in _TILES:
            return f"it takes tiles of {', '.join(map(str, _TILES))} tokens, not {size}"
    if _stages(problem.tile, problem.head_dim, problem.dtype) == 0:
        tile = f"{problem.tile.query}x{problem.tile.key}"
        return (
            f"tiles of {tile} with {problem.head_dim} channels do not fit the memory of a processor"
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
    del precision  # `refuses` let pass what it can do
    return with_gradients(_forward, q, k, v, plan, scale)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float
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
    with on_device(q):
        kernels.forward[(rows, batch * heads)](
            q, k, v, out, lse, indices, counts,
            counts if plan.bias is None else plan.bias.contiguous(),
            pooled_k, pooled_v, left_out,
            *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
            0 if indices.shape[0] == 1 else indices.shape[1] * rows,
            0 if indices.shape[1] == 1 else rows,
            heads, queries, plan.keys, rows, plan.columns, width,
            scale,
            DIM=dim,
            PADDED_DIM=padded(dim),
            TILE_Q=plan.tile.query,
            TILE_K=plan.tile.key,
            TILE_POOLED=TILE_POOLED,
            BIASED=plan.bias is not None,
            TAIL=tail,
            WIDE=interpreted(),
            num_warps=4 if plan.tile.query <= 128 else 8,
            num_stages=_stages(plan.tile, dim, q.dtype),
        )  # fmt: skip
    return out, lse


def workspace(problem: Problem) -> int:
    """Pooled keys and values, in float32 first, and a byte a tile for the tail.

    With gradients also what the backward pass needs, at the same time at the most.
    """
    backward = 0
    if problem.requires_grad:
        from . import triton_backward

        backward = triton_backward.workspace(problem)
    if problem.tail == "none":
        return backward
    columns, rows = -(-problem.keys // problem.tile.key), -(-problem.queries // problem.tile.query)
    pairs = problem.batch * problem.heads
    pooled = 2 * pairs * columns * problem.head_dim * (4 + problem.dtype.itemsize)
    return backward + pooled + 2 * pairs * rows * columns


def efficiency(problem: Problem) -> float:
    """Measured beside cuDNN's dense attention on an H100; of float32 nothing is known yet."""
    if problem.dtype == torch.float32:
        return 0.05
    value = 0.75 if problem.head_dim <= 64 else 0.5
    return value if problem.tail == "none" else 0.7 * value
