"""Predictions: what a kernel needs of memory beside what it gains."""

from __future__ import annotations

import pytest
import torch

from kinora.accel.cost import LayerShape, Prediction, Shape, predict, together, transformer_layer
from kinora.accel.grid import TokenGrid
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import KvMerge, TopBlocks
from kinora.accel.recipe import changed, find
from kinora.accel.wrappers import Within

SHAPE = Shape((transformer_layer(4, 64, 1024, cross_attention=True),) * 2)
GRID = TokenGrid(9, 32, 32)


def predicted(
    method: AttentionMethod,
    *,
    device: str = "cpu",
    always: bool = True,
    batch: int = 2,
    shape: Shape = SHAPE,
    grid: TokenGrid = GRID,
) -> Prediction:
    return predict(
        method,
        shape,
        grid,
        device=device,
        dtype=torch.float32,
        steps=5,
        always=always,
        batch=batch,
    )


def test_sparse_attention_needs_a_workspace_that_grows_with_the_batch():
    tensor = GRID.tokens * 4 * 64 * 4
    one, two = (predicted(TopBlocks(), batch=batch).workspace for batch in (1, 2))
    assert two - one == 7 * tensor  # q, k, v in order and in tiles, and the output
    assert one > 7 * tensor


def test_dense_attention_needs_none():
    assert predicted(TopBlocks(keep=1)).workspace == 0
    assert predicted(Within(method=TopBlocks(), from_step=1.0)).workspace == 0
    # Predicted to lose, so that it runs dense.
    assert predicted(TopBlocks(keep=0.8), always=False).workspace == 0
    assert predicted(Within(method=TopBlocks(), from_step=0.8)).workspace > 0


def test_the_reference_on_a_gpu_counts_its_logits():
    # Heads that no kernel takes.
    found = predicted(TopBlocks(), device="cuda", shape=Shape((transformer_layer(4, 320, 1024),)))
    assert found.kernel == "reference" and found.workspace > 2**28


@pytest.mark.parametrize("grid", [TokenGrid(9, 16, 16), GRID])
def test_larger_tiles_are_predicted_to_be_faster_on_a_cpu(grid: TokenGrid):
    small = find("balanced")
    large = changed(small, ["attention.tile=256x128"])
    assert small.attention is not None and large.attention is not None
    faster = predicted(small.attention, grid=grid).speedup
    assert 1 < 1.1 * faster < predicted(large.attention, grid=grid).speedup


def test_skipped_steps_and_sparse_attention_together():
    half = (0.5,) * 10
    assert together(half, 10, range(10)) == pytest.approx(2)
    assert together(half, 5, range(2, 8)) == pytest.approx(4)
    # What is skipped are cheap steps, since the others are dense: less than the product.
    mixed = (1.0,) * 2 + (0.5,) * 8
    assert together(mixed, 10, range(2, 10)) == pytest.approx(10 / 6)
    assert together(mixed, 4, range(2, 10)) == pytest.approx(10 / 3)
    assert together((1.0,) * 10, 4, range(2, 10)) == pytest.approx(10 / 4)
    assert together(mixed, 10, range(0)) == pytest.approx(10 / 6)


def test_calls_that_are_over_before_a_sparse_one_begins_stay_dense():
    """As measured on an H200: slower at 9,216 tokens of 4 heads, 4 times as fast at Wan 1.3B's."""

    def on(device: str, layer: LayerShape, grid: TokenGrid, *, always: bool = False) -> Prediction:
        return predict(
            TopBlocks(keep=0.2), Shape((layer,)), grid, device=device, dtype=torch.bfloat16,
            steps=5, always=always,
        )  # fmt: skip

    tiny, wan = transformer_layer(4, 64, 1024), transformer_layer(12, 128, 8960)
    found = on("cuda", tiny, GRID)
    assert found.speedup == found.density == 1
    assert "at 9,216 tokens it takes the GPU about 0.87 ms, and starting a sparse" in found.dense
    assert on("cuda", tiny, GRID, always=True).density < 0.3
    assert on("cuda", wan, TokenGrid(21, 30, 52)).speedup > 1
    assert on("cpu", tiny, GRID).speedup > 1


@pytest.mark.parametrize(
    ("head_dim", "grid", "sparse"),
    [
        (128, TokenGrid(21, 30, 52), True),
        (64, TokenGrid(21, 30, 52), False),
        (128, TokenGrid(13, 30, 45), False),
    ],
)
def test_keys_are_merged_on_a_gpu_only_where_that_was_measured(
    head_dim: int, grid: TokenGrid, sparse: bool
):
    shape = Shape((transformer_layer(12, head_dim, 8960, cross_attention=True),))
    found = predicted(KvMerge(), device="cuda", always=False, shape=shape, grid=grid)
    assert (found.density < 1, found.speedup > 1) == (sparse, sparse)
    assert bool(found.dense) is not sparse
