"""How `lists` launches its kernels, and which calls they take."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from .plan import tiles_of
from .triton_support import interpreted, on_device, padded

Backend = Literal["torch", "triton"]

FUSED_COLUMNS = 1024
"""Tiles of keys, in the next power of two, up to which scores never leave the registers."""
MOST_COLUMNS = 2**15 - 1
"""Tiles of a row that the kernels can count; torch takes over above."""
MEANS_WARPS = 1
MEANS_ELEMENTS = 2**12
"""Of a tile that a program of one warp reads at a time: 8 KiB in half precision."""
SCORES_BYTES = 2**28
"""Scores that are alive at a time where there are more than `FUSED_COLUMNS`."""


def takes(
    backend: str | None,
    *tensors: torch.Tensor,
    columns: int = 1,
    integers: torch.Tensor | None = None,
) -> bool:
    """Whether `triton` does it: if it is asked for and, if none is, where it can."""
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend {backend!r}; there are torch, triton")
    if backend == "torch":
        return False
    reason = _refuses(tensors, columns, (tensors[0] if integers is None else integers).device.type)
    if backend == "triton" and reason:
        raise ValueError(f"backend triton cannot do this: {reason}")
    return backend == "triton" or (reason is None and not interpreted())


def _refuses(tensors: tuple[torch.Tensor, ...], columns: int, device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and not interpreted():
        return f"it is for CUDA devices, the tensors are on {device}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it has no backward pass; torch has"
    known = (torch.float16, torch.bfloat16, torch.float32)
    if any(x.dtype not in known for x in tensors):
        return f"it takes float16, bfloat16, float32, not {tensors[0].dtype}"
    if columns > MOST_COLUMNS:
        return f"it takes up to {MOST_COLUMNS} tiles, not {columns}"
    return None


def means(
    q: torch.Tensor, k: torch.Tensor | None, sizes: tuple[int, int], order: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of both in one launch; without `k` the second are nothing."""
    batch, heads, queries, dim = q.shape
    keys = 0 if k is None else k.shape[2]
    rows, columns = tiles_of(queries, sizes[0]), tiles_of(keys, sizes[1])
    means_q = torch.empty(batch, heads, rows, dim, dtype=torch.float32, device=q.device)
    means_k = means_q if k is None else means_q.new_empty(batch, heads, columns, dim)
    k = q if k is None else k
    most = max(16, MEANS_ELEMENTS // padded(dim))
    with on_device(q):
        _kernels().means[((rows + columns) * batch * heads,)](
            q, k, means_q if order is None else order.contiguous(), means_q, means_k,
            *q.stride(), *k.stride(), *_steps(order),
            batch, heads, queries, keys, rows, columns,
            SIZE_Q=sizes[0], SIZE_K=sizes[1],
            CHUNK_Q=min(most, padded(sizes[0])), CHUNK_K=min(most, padded(sizes[1])),
            DIM=dim, PADDED_DIM=padded(dim), ORDERED=order is not None, num_warps=MEANS_WARPS,
        )  # fmt: skip
    return means_q, means_k


def permuted(x: torch.Tensor, order: torch.Tensor, inverse: bool) -> torch.Tensor:
    """See `lists.permuted`."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunk = max(16, min(64, MEANS_ELEMENTS // padded(dim)))
    with on_device(x):
        _kernels().permute[(tiles_of(tokens, chunk) * batch * heads,)](
            x, order.contiguous(), out, *x.stride(), *_steps(order), batch, heads, tokens,
            TOKENS=chunk, DIM=dim, PADDED_DIM=padded(dim), INVERSE=inverse, num_warps=4,
        )  # fmt: skip
    return out


def _steps(order: torch.Tensor | None) -> tuple[int, int]:
    """From the order of one batch item, and of one head, to the next in contiguous memory."""
    if order is None or order.ndim == 1:
        return 0, 0
    batch, heads, tokens = order.shape
    return heads * tokens if batch > 1 else 0, tokens if heads > 1 else 0


def choose(
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    forced: torch.Tensor | None,
    width: int,
    most: int,
    least: int = 0,
    by_mass: tuple[float, float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_tiles` and, with mass, scale and logarithm of the last tile, `mass_tiles`."""
    numbers = width, most, least, *(by_mass or (0.0, 1.0, 0.0))
    given = {"BY_MASS": by_mass is not None}
    return _chosen(_kernels().choose, means_q, means_k, forced, *numbers, **given)


def choose_above(
    means_q: torch.Tensor, means_k: torch.Tensor, forced: torch.Tensor | None, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`above_tiles`, of means of keys around 0."""
    return _chosen(_kernels().choose_above, means_q, means_k, forced, means_k.shape[2], float(beta))


def _chosen(
    kernel: Any,
    means_q: torch.Tensor,
    means_k: torch.Tensor,
    forced: torch.Tensor | None,
    width: int,
    *numbers: float,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of `width` by a kernel that takes `numbers` behind it."""
    batch, heads, rows, dim = means_q.shape
    columns, device = means_k.shape[2], means_q.device
    indices = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=device)
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=device)
    most_columns = padded(columns)
    fused = most_columns <= FUSED_COLUMNS
    given |= {
        **_shape(most_columns, fused),
        "DIM": dim,
        "COLUMNS": most_columns,
        "SCORED": not fused,
        "IS_FORCED": forced is not None,
        "PRECISION": precision(device),
    }
    means_q, means_k = (x.contiguous().flatten(0, 1) for x in (means_q, means_k))
    flat_indices, flat_counts = indices.flatten(0, 1), counts.flatten(0, 1)
    mask = flat_counts if forced is None else forced.contiguous().view(torch.int8)
    step = batch * heads if fused else max(1, SCORES_BYTES // (4 * rows * columns))
    with on_device(means_q):
        for start in range(0, batch * heads, step):
            part = slice(start, start + step)
            q, k = means_q[part], means_k[part]
            kernel[(tiles_of(rows, given["ROWS"]), len(q))](
                q, k, q if fused else q @ k.mT, mask, flat_indices[part], flat_counts[part],
                rows, columns, width, *numbers, **given,
            )  # fmt: skip
    return indices, counts


def choose_scored(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    width: int,
    most: int,
    least: int,
    by_mass: tuple[float, float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`heaviest_tiles`, see `choose`, of scores `[B, H, Q, K]`."""
    batch, heads, rows, columns = scores.shape
    indices = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=scores.device)
    most_columns = padded(columns)
    scores = scores.contiguous()
    mask = counts if forced is None else forced.contiguous().view(torch.int8)
    given = _shape(most_columns, False)
    with on_device(scores):
        _kernels().choose[(tiles_of(rows, given["ROWS"]), batch * heads)](
            scores, scores, scores, mask, indices, counts,
            rows, columns, width, most, least, *by_mass, **given,
            DIM=1, COLUMNS=most_columns, SCORED=True, IS_FORCED=forced is not None, BY_MASS=True,
            PRECISION="ieee",
        )  # fmt: skip
    return indices, counts


def transposed(
    indices: torch.Tensor, counts: torch.Tensor, columns: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lists.transposed`."""
    batch, heads, rows, entries = indices.shape
    words = tiles_of(rows, 32)
    like: dict[str, Any] = {"dtype": torch.int32, "device": indices.device}
    bits = torch.zeros(batch, heads, columns, words, **like)
    rows_of = torch.empty(batch, heads, columns, width, **like)
    counts_t = torch.empty(batch, heads, columns, **like)
    most_rows = padded(rows)
    step = max(1, 4096 // most_rows)
    with on_device(indices):
        _kernels().mark[(rows, batch * heads)](
            indices.contiguous(), counts.contiguous(), bits, rows, columns, entries, words,
            ENTRIES=min(1024, padded(entries)), num_warps=4,
        )  # fmt: skip
        _kernels().gather[(tiles_of(columns, step), batch * heads)](
            bits, rows_of, counts_t, rows, columns, width, words,
            ROWS=most_rows, COLUMNS=step, num_warps=4 if most_rows <= 4096 else 16,
        )  # fmt: skip
    return rows_of, counts_t


def left_out(indices: torch.Tensor, counts: torch.Tensor, columns: int, words: int) -> torch.Tensor:
    """See `lists.left_out`."""
    batch, heads, rows, width = indices.shape
    bits = torch.empty(batch, heads, rows, words, dtype=torch.int32, device=indices.device)
    most_words = 1 << (words - 1).bit_length()
    with on_device(indices):
        _kernels().left_out[(rows, batch * heads)](
            indices.contiguous(), counts.contiguous(), bits, rows, columns, width, words,
            ENTRIES=min(128, padded(width)), WORDS=most_words, num_warps=4,
        )  # fmt: skip
    return bits


def _shape(columns: int, fused: bool) -> dict[str, int]:
    """What a program of `choose` takes.

    Fused: 32 scores a thread, and keys in up to 64 KiB of shared memory. Else a row, in one warp
    where that can hold it, since warps that share one wait for each other at each step.
    """
    if fused:
        stages = 3 if columns <= 512 else 2
        return {"ROWS": 16, "STEP": 16, "num_warps": max(4, columns // 64), "num_stages": stages}
    return {"ROWS": 1, "STEP": 16, "num_warps": max(1, min(16, columns // 1024)), "num_stages": 1}


def _kernels() -> Any:
    from . import lists_kernels

    return lists_kernels


def precision(device: torch.device) -> str:
    """Of products of float32: three of TF32 err as little as one of float32, and are fast."""
    nvidia = device.type == "cuda" and torch.version.hip is None and not interpreted()
    return "tf32x3" if nvidia and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"
