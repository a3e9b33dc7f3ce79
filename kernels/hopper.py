"""Block attention for Hopper GPUs (H100, H200): warps that load beside warps that compute.

16-bit tensors, or 8 bits made of them; gradients come from `triton_backward`. Written in Gluon,
Triton's lower level; run on H100 and H200 with triton 3.6. `docs/benchmarks.md` has its times
beside cuDNN's dense attention.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch

from . import quantise, triton_backward
from .lists import left_out, pair_means
from .plan import BlockPlan, Tile, tiles_of
from .precision import INPUT, Precision
from .problem import Problem
from .triton_support import interpreted, on_device

LOG2_E = 1.4426950408889634
TRITONS = ("3.6",)
"""Versions with which it has been compared with the reference on a GPU: Gluon changes with each."""

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128)
_QUERIES = (64, 128, 256)
_KEYS = (32, 64, 128)
STEP = 128
"""Keys that are loaded and multiplied together, whatever the tile; 64 where queries come by 64."""

_EFFICIENCIES = {
    "bfloat16": {(64, 128): 1.09, (64, 64): 1.02, (128, 128): 1.05, (128, 64): 0.92},
    "float16": {(64, 128): 1.0, (64, 64): 0.9, (128, 128): 0.95, (128, 64): 0.79},
    "8 bits": {(64, 128): 1.0, (64, 64): 0.94, (128, 128): 1.1, (128, 64): 1.0},
}
"""Of products in these, by head dimension and queries of a tile, 128 or more and 64: the lower ones
of density x cuDNN's dense time / own time at densities of a tenth and a fifth, 17,776 to 75,600
tokens, on an H200. float16 is what bfloat16 was with the same loop."""
_TAIL = 0.88
"""What the tail leaves of that, pooling included."""


def refuses(problem: Problem) -> str | None:
    """Why it cannot take `problem`, or None."""
    if problem.device != "cuda":
        return f"it is for CUDA devices, the tensors are on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"it takes float16, bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.requires_grad and problem.precision != INPUT:
        return f"it has no backward pass of {problem.precision}; the reference has"
    if problem.precision.qk == "int4" or problem.precision.bits("pv"):
        return f"it multiplies in 16 bits, int8 x 16 bits and fp8 values, not {problem.precision}"
    if problem.head_dim not in _HEAD_DIMS:
        return f"it takes head dimensions 64 and 128, not {problem.head_dim}"
    if problem.tile.query not in _QUERIES:
        return f"it takes tiles of 64, 128 or 256 queries, not {problem.tile.query}"
    if problem.tile.key not in _KEYS:
        return f"it takes tiles of 32, 64 or 128 keys, not {problem.tile.key}"
    if problem.tile.query == 64 and problem.tile.key == 128:
        return "it takes tiles of 128 keys with 128 or 256 queries only"
    if problem.masked and problem.requires_grad:
        return "it has no backward pass of masks of tokens within tiles; the reference has"
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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `block_attention`; q, k, v are already in the order of the plan."""
    forward = functools.partial(_forward, precision=precision)
    return triton_backward.with_gradients(forward, q, k, v, plan, scale)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import hopper_kernels, hopper_pieces_kernels

    if scale <= 0:
        # The kernel scales maxima, which a factor below 0 would make minima.
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    forward: Any = hopper_kernels.forward
    descriptor: Any = hopper_pieces_kernels.descriptor
    batch, heads, queries, dim = q.shape
    tile, columns = plan.tile.key, plan.columns
    groups = 1 if plan.tile.query == 64 else 2
    step = STEP if groups == 2 else 64
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    indices, counts = plan.indices.contiguous(), plan.counts.contiguous()
    tail = plan.tail == "complement"
    pooled_k, pooled_v, words, bits = k, v, 0, counts
    if tail:
        pooled_k, pooled_v = pair_means(k, v, Tile(tile, tile))
        words = 4 * tiles_of(columns, 128)
        bits = left_out(indices, counts, columns, words=words)
    # What a variant of the kernel does not read is given any tensor.
    shift = q_scale = k_scale = tail_scale = v_scale = lse
    if precision == INPUT:
        found = quantise.Ranges(lse, lse)
    else:
        found = quantise.ranges(k, v, values=precision.pv == "fp8")
    if precision.qk == "int8":
        q, q_scale, shift = quantise.whole_numbers(q, quantise.QUERIES, shift=(found.mean, scale))
        k, k_scale, _ = quantise.whole_numbers(k, tile, mean=found.mean)
        if tail:
            pooled_k, tail_scale, _ = quantise.whole_numbers(pooled_k, step, mean=found.mean)
    else:
        q, k, pooled_k = _loadable(q), _loadable(k), pooled_k.to(k.dtype)
    if precision.pv == "fp8":
        v_scale = found.scale
        v = quantise.eighths(v, v_scale)
        v_desc = tail_v_desc = descriptor(v, dim, tile)
        if tail:
            tail_v_desc = descriptor(quantise.eighths(pooled_v, v_scale), dim, tile)
    else:
        v = _loadable(v)
        v_desc = tail_v_desc = descriptor(v, tile)
        if tail:
            tail_v_desc = descriptor(pooled_v.to(v.dtype), step)
    k_desc = descriptor(k, tile)
    rows = tiles_of(queries, 64 * groups)
    total = batch * heads * rows
    factor = scale * LOG2_E
    last = plan.keys - (columns - 1) * tile
    # Weights in float16 or 8 bits have too few exponents for a reference that stays.
    lazy = precision.pv == "input" and v.dtype == torch.bfloat16
    again = torch.zeros(1 + groups * total, dtype=torch.int32, device=q.device) if lazy else counts
    q_desc = descriptor(q, 64)
    tail_k_desc = descriptor(pooled_k, step) if tail else k_desc
    with on_device(q):
        for part in (1, 2) if lazy else (0,):
            forward[(min(_programs(q.device, groups), total),)](
                q_desc, k_desc, v_desc, tail_k_desc, tail_v_desc,
                out, lse, indices, counts,
                lse if plan.bias is None else plan.bias.contiguous(),
                counts if plan.within is None else plan.within.contiguous(), bits,
                q_scale, k_scale, tail_scale, v_scale, shift, again,
                *out.stride()[:3],
                0 if indices.shape[0] == 1 else indices.shape[1] * indices.shape[2],
                0 if indices.shape[1] == 1 else indices.shape[2],
                heads, queries, plan.keys, rows, columns, indices.shape[3],
                0 if plan.within is None else plan.within.shape[3], words, total, factor,
                math.log2(tile), math.log2(last),
                DIM=dim, TILE_K=tile, STEP=step, GROUPS=groups,
                SPLIT=max(1, plan.tile.query // 128),
                STAGES=3 if dim == 128 or groups == 1 else 2, TAIL=tail,
                BIASED=plan.bias is not None, MASKED=plan.within is not None,
                INT8=precision.qk == "int8", FP8=precision.pv == "fp8", PASS=part, REGISTERS=240,
                num_warps=4, **({} if groups == 2 else {"maxnreg": 128}),
            )  # fmt: skip
    return out, lse


@functools.cache
def _programs(device: torch.device, groups: int) -> int:
    """Programs that run at once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors if groups == 2 else 2 * processors


def _loadable(x: torch.Tensor) -> torch.Tensor:
    """`x` as the copy engine reads it: rows side by side, all else in steps of 16 bytes."""
    steps = all(x.stride(i) * x.element_size() % 16 == 0 for i in range(3))
    # The copy engine knows no step of 0, which an expanded tensor has.
    steps = steps and all(x.stride(i) > 0 for i in range(3))
    if x.stride(3) == 1 and steps and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def workspace(problem: Problem) -> int:
    """Pooled tokens and a bit a tile for the tail, operands in 8 bits, numbers of query tiles.

    Tensors whose strides the copy engine cannot take are copied too, and queries where the scale is
    not above 0; models have neither.
    """
    pairs = problem.batch * problem.heads
    columns, rows = (
        tiles_of(problem.keys, problem.tile.key),
        tiles_of(problem.queries, problem.tile.query),
    )
    dim, tail = problem.head_dim, problem.tail == "complement"
    size = triton_backward.workspace(problem) if problem.requires_grad else 0
    if problem.precision.pv == "input" and problem.dtype == torch.bfloat16:
        # What the second pass does: at the most all.
        size += 4 * (1 + pairs * (tiles_of(problem.queries, 128) * 2))
    if tail:
        # In float32, and in the dtype of the tensors.
        size += 2 * pairs * columns * dim * (4 + problem.dtype.itemsize)
        size += 16 * pairs * rows * tiles_of(columns, 128)
    if problem.precision != INPUT:
        # A mean, in parts, and the largest values.
        size += 4 * pairs * (quantise.PARTS + 1) * dim
    if problem.precision.qk == "int8":
        # A scale for some tokens; a shift for each query.
        size += pairs * (problem.queries * (dim + 4) + problem.keys * dim)
        size += 4 * pairs * (tiles_of(problem.queries, quantise.QUERIES) + columns + columns * tail)
    if problem.precision.pv == "fp8":
        tokens = 128 * (tiles_of(problem.keys, 128) + tail * tiles_of(columns, 128))
        size += pairs * tokens * dim
    return size


def efficiency(problem: Problem) -> float:
    """As measured, see `_EFFICIENCIES`; launches weigh more where there are few tokens."""
    made = "8 bits" if problem.precision != INPUT else str(problem.dtype).removeprefix("torch.")
    value = _EFFICIENCIES[made][problem.head_dim, min(128, problem.tile.query)]
    value *= 1 if problem.tail == "none" else _TAIL
    return value if problem.keys >= 16384 else value * problem.keys / 16384
