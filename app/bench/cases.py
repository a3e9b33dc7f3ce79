"""What attention is timed on: random numbers or recorded ones, and which tiles are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ...accel.grid import TokenGrid
from ...accel.order import gilbert
from ...kernels.lists import pair_means, tile_means, top_tiles
from ...kernels.plan import BlockPlan, Tile, tiles_of
from ...pipelines.tiny.recording import recording

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
    rows, _, kept = _counts(shape, tile, density)
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
    q, k, v = (x.to(device, dtype) for x in _recorded(device))
    if q.shape[1:] != (shape.heads, shape.tokens, shape.dim):
        raise ValueError(f"recorded numbers have the shape {_shape(q)}, not {shape}")
    return Case((q, k, v), by_means(q, k, tile, density))


RECORDED = Shape(4, 9216, 64)
"""The shape of what is recorded."""


@lru_cache(maxsize=1)
def _recorded(device: str) -> Tensors:
    return recording(layers=(5,), steps=(1,), of=4, device=device)[1, 5]


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
    heads = min(2, case.tensors[0].shape[1])
    q, k, v = (x[:, :heads, :tokens] for x in case.tensors)
    dense = BlockPlan.dense(tile=case.plan.tile, queries=tokens, keys=tokens, device=q.device)
    half = max(1, dense.columns // 2)
    shifted = (dense.indices + torch.arange(dense.rows, device=q.device)[:, None]) % dense.columns
    lists = shifted[..., :half].sort(-1).values.to(torch.int32)
    indices = lists.expand(1, heads, -1, -1).contiguous()
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
