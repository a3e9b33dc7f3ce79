"""What leaving keys out can change at the most, whichever method does it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.accel.calibration import Tally, observed_steps
from kinora.accel.grid import TokenGrid
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import (
    METHODS,
    Blade,
    Hierarchical,
    Neighborhood,
    Paro,
    PermutedBlocks,
    SlidingTile,
    ThresholdBlocks,
    TopBlocks,
    VMoBA,
    XAttention,
)
from kinora.accel.site import Site
from kinora.accel.tiles import token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile

from .captured import captured

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile
SMALL: dict[str, Any] = {"tile": "64x64"}
ALONE: dict[str, Any] = {**SMALL, "tail": "none"}
SPARSE: list[AttentionMethod] = [
    TopBlocks(keep=0.2, **ALONE),
    TopBlocks(keep=0.2, budget="by-head", **ALONE),
    *(ThresholdBlocks(beta=beta, **ALONE) for beta in (1, -1)),
    *(ThresholdBlocks(rule="top", keep=0.05, mass=it, **ALONE) for it in (0.2, 0.8)),
    *(XAttention(threshold=it, least=0, stride="8", **ALONE) for it in (0.2, 0.8)),
    XAttention(threshold=0.5, least=0, stride="1", **ALONE),
    SlidingTile(frames=0.5, height=0.5, width=0.5, **ALONE),
    Neighborhood(frames=0.6, height=0.6, width=0.6, **SMALL),
    Neighborhood(frames=0.6, height=0.4, width=0.5, stride_width=1, stride_height=1, **SMALL),
    Neighborhood(frames=0.6, height=0.6, width=0.6, causal="frames", **SMALL),
    Blade(keep=0.4, **ALONE),
    Blade(keep=0.4, tile="128x64", tail="none"),
    Hierarchical(blocks=4, branch=3, **ALONE),
    Hierarchical(blocks=6, levels=1, **ALONE),
    Paro(),
    PermutedBlocks(keep=0.35, segment="256", **ALONE),
    PermutedBlocks(keep=0.6, segment="frame", **ALONE),
    *(PermutedBlocks(keep=it, segment="clip", **ALONE) for it in (0.35, 0.8)),
    VMoBA(keep=0.25, **SMALL),
    VMoBA(keep=0.25, shared=False, **SMALL),
    VMoBA(rule="similarity", scope="head", shared=False, **SMALL),
]
"""Without a tail, which would stand for keys that are left out."""


def site(text: int, first: bool) -> Site:
    # Of vmoba the third kind of layer, which cuts along all axes.
    return Site(GRID, layer=2, layers=3, step=2, steps=10, text=text, text_first=first, seed=5)


@functools.lru_cache(maxsize=1)
def tensors(at: Site, smooth: bool) -> list[torch.Tensor]:
    """q, k, v of 2 items and 3 heads, and the weights; `smooth`: neighbours alike, as in films."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, at.tokens, 16)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if smooth:
        order = token_order("gilbert", GRID, at.text, at.text_first)
        for x in made:
            flat = order.apply(x, 2).mT.flatten(0, 1)
            wide = torch.nn.functional.avg_pool1d(flat, 65, 1, 32, count_include_pad=False)
            x.copy_(order.undo(wide.unflatten(0, shape[:2]).mT, 2) * 10)
    return [*made, torch.softmax(made[0] @ made[1].mT / 4, -1)]


def calibrated(method: Paro, at: Site, q: torch.Tensor, k: torch.Tensor, folder: Path) -> Paro:
    tally = Tally(keep=0.3, tile=Tile(64, 64))
    for layer, step in itertools.product(range(at.layers), observed_steps(at.steps)):
        tally.observe(q, k, dataclasses.replace(at, layer=layer, step=step))
    path = folder / "paro.npz"
    path.write_bytes(tally.finish("tiny", at).to_bytes())
    return method.model_copy(update={"calibration": str(path)})


def test_every_method_that_leaves_keys_out_is_here():
    leaving = {name for name, method in METHODS.items() if method().tiling() is not None}
    assert leaving == {method.name for method in SPARSE}


@pytest.mark.parametrize("method", SPARSE, ids=lambda it: it.name)
@pytest.mark.parametrize(
    ("smooth", "text", "first"),
    [(True, 7, False), (False, 70, True), (False, 0, False)],
    ids=["smooth", "rough", "no text"],
)
def test_the_error_of_a_query_is_bounded_by_the_attention_it_misses(
    method: AttentionMethod, smooth: bool, text: int, first: bool, tmp_path: Path
):
    """|out - dense| <= 2 (1 - share held) max |v|, for weights that are scaled up to sum to 1."""
    at = site(text, first)
    q, k, v, weights = tensors(at, smooth)
    if isinstance(method, Paro):
        method = calibrated(method, at, q, k, tmp_path)
    plan = method.plan(q, k, at)
    assert isinstance(plan, BlockPlan) and plan.tail == "none" and not plan.means
    plan.check()
    held = captured(weights, plan)
    assert float(plan.density().max()) < 1 and 0 < held.amin() < 0.99
    error = (block_attention(q, k, v, plan)[0] - weights @ v).norm(dim=-1)
    bound = 2 * (1 - held) * v.norm(dim=-1).amax(-1, keepdim=True)
    assert (error <= bound + 1e-9).all()
    # Where something is missed something is wrong, and of no other query.
    assert torch.equal(error > 1e-9, 1 - held > 1e-9)
