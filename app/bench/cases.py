"""What attention is timed on: random numbers or recorded ones, and which tiles are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...accel.grid import TokenGrid
from ...accel.order import gilbert
from ...kernels.lists import pair_means, tile_means, top_tiles
from ...kernels.plan import BlockPlan, Tile, tiles_of

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one attention call, batch 1."""

    heads: int
    tokens: int
    dim: int

    def __str__(self) -> str:
        return f"{self.heads}x{self.tokens}x{self.dim}"


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Queries, keys and values `[1, H, L, D]` and what is kept of them."""

    tensors: Tensors
    plan: BlockPlan


def random(shape: Shape, tile: Tile, density: float, device: str, dtype: torch.dtype) -> Case:
    """Normal numbers, `[B, L, H, D]` in memory as in models; tiles drawn for each row."""
    rows, columns, kept = _counts(shape, tile, density)
    chosen = torch.rand(1, shape.heads, rows, columns, device=device).argsort(-1)[..., :kept]
    return Case(_normal(shape, device, dtype), _plan(chosen.sort(-1).values, shape, tile))


def local(shape: Shape, tile: Tile, density: float, device: str, dtype: torch.dtype) -> Case:
    """The same numbers; of each row the tiles nearest in space and time, as windows in 3-D keep.

    The tokens are the first ones along a Gilbert curve through a cuboid of a quarter as many frames
    as rows.
    """
    rows, columns, kept = _counts(shape, tile, density)
    side = math.ceil((4 * shape.tokens) ** (1 / 3))
    grid = TokenGrid(math.ceil(shape.tokens / side**2), side, side)
    place = gilbert(grid).places[: shape.tokens]
    where = torch.stack([place // side**2, place // side % side, place % side], -1)[None, None]
    centres_q, centres_k = (
        tile_means(where.float(), size, backend="torch")[0, 0] for size in (tile.query, tile.key)
    )
    nearest = torch.cdist(centres_q, centres_k).topk(kept, largest=False).indices
    indices = nearest.sort(-1).values.expand(1, 1, rows, kept).to(device)
    return Case(_normal(shape, device, dtype), _plan(indices, shape, tile))


def recorded(shape: Shape, tile: Tile, density: float, device: str, dtype: torch.dtype) -> Case:
    """Those of a middle layer of `kinora-tiny` at 256 x 256, whose shape it is; the tiles whose
    means have the largest products are kept."""
    q, k, v = (x.to(device, dtype) for x in recording(device))
    if q.shape[1:] != (shape.heads, shape.tokens, shape.dim):
        raise ValueError(f"recorded numbers have the shape {_shape(q)}, not {shape}")
    return Case((q, k, v), by_means(q, k, tile, density))


PATTERNS: dict[str, Callable[[Shape, Tile, float, str, torch.dtype], Case]] = {
    "random": random,
    "local": local,
    "recorded": recorded,
}


def by_means(q: torch.Tensor, k: torch.Tensor, tile: Tile, density: float) -> BlockPlan:
    """The plan that keeps the tiles whose means have the largest products."""
    shape = _shape(q)
    kept = _counts(shape, tile, density)[2]
    indices, counts = top_tiles(*pair_means(q, k, tile), kept, width=kept)
    return BlockPlan(indices, counts, tile, shape.tokens, shape.tokens)


def first(case: Case, tokens: int) -> Case:
    """The first `tokens` of a case of one tile's heads, everything kept, for comparisons."""
    q, k, v = (x[:, :2, :tokens] for x in case.tensors)
    dense = BlockPlan.dense(tile=case.plan.tile, queries=tokens, keys=tokens, device=q.device)
    half = max(1, dense.columns // 2)
    shifted = (dense.indices + torch.arange(dense.rows, device=q.device)[:, None]) % dense.columns
    indices = shifted[..., :half].sort(-1).values.to(torch.int32).expand(1, 2, -1, -1).contiguous()
    counts = torch.full_like(indices[..., 0], half)
    return Case((q, k, v), replace(dense, indices=indices, counts=counts, tail=case.plan.tail))


def _shape(q: torch.Tensor) -> Shape:
    return Shape(q.shape[1], q.shape[2], q.shape[3])


def _counts(shape: Shape, tile: Tile, density: float) -> tuple[int, int, int]:
    """Rows, columns, and how many of these are kept."""
    columns = tiles_of(shape.tokens, tile.key)
    return tiles_of(shape.tokens, tile.query), columns, max(1, round(density * columns))


def _normal(shape: Shape, device: str, dtype: torch.dtype) -> Tensors:
    q, k, v = (
        torch.randn(1, shape.tokens, shape.heads, shape.dim, device=device, dtype=dtype)
        for _ in range(3)
    )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _plan(indices: torch.Tensor, shape: Shape, tile: Tile) -> BlockPlan:
    """A plan of equally long lists."""
    indices = indices.to(torch.int32).contiguous()
    counts = torch.full_like(indices[..., 0], indices.shape[-1])
    return BlockPlan(indices, counts, tile, shape.tokens, shape.tokens)


class _Recorder(TorchFunctionMode):
    """Keeps what one self-attention layer is given."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0
        self.kept: Tensors | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention and given["query"].shape == given["key"].shape:
            if self.calls == self.layer:
                q, k, v = (given[name].detach().clone() for name in ("query", "key", "value"))
                self.kept = q, k, v
            self.calls += 1
        return func(*args, **(kwargs or {}))


RECORDED = Shape(4, 9216, 64)
"""What `recording` has."""
_STEPS, _STEP, _LAYER = 4, 1, 5


@lru_cache(maxsize=1)
def recording(device: str) -> Tensors:
    """q, k, v `[1, 4, 9216, 64]` of `kinora-tiny`: 33 frames of 256 x 256, layer 5, step 1 of 4."""
    from diffusers import WanPipeline

    from ...pipelines.tiny import WEIGHTS

    pipe: Any = WanPipeline.from_pretrained(WEIGHTS).to(device)
    pipe.set_progress_bar_config(disable=True)
    recorder = _Recorder(_LAYER)

    def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        del timestep
        recorder.calls = 0 if step == _STEP - 1 else 10**6
        pipe._interrupt = recorder.kept is not None and step >= _STEP
        return given

    recorder.calls = 10**6
    with recorder:
        pipe(
            "a red circle moving left and a blue star standing still over a gray background",
            height=256,
            width=256,
            num_frames=33,
            num_inference_steps=_STEPS,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=after_step,
            output_type="latent",
        )
    assert recorder.kept is not None, "the layer was not met"
    return recorder.kept
