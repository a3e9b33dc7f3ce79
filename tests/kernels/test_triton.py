"""The Triton kernels, run by Triton's interpreter, against the reference."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

import pytest
import torch

from kinora.kernels.attention import block_attention
from kinora.kernels.backends import choose, refuses
from kinora.kernels.plan import BlockPlan, Tail, Tile
from kinora.kernels.precision import Precision
from kinora.kernels.problem import Problem

pytest.importorskip("triton", reason="the test group has it on Linux")

TAILS: tuple[Tail, ...] = ("none", "complement")
SHAPES = [(64, 64, 16), (40, 40, 8), (33, 71, 20), (7, 130, 32), (70, 70, 40)]
TILES = [Tile(16, 16), Tile(32, 16), Tile(16, 64), Tile(64, 32)]


def tensors(
    queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v `[2, 3, L, dim]`: `[B, L, H, D]` in memory, a slice of a tensor full of NaN."""
    generator = torch.Generator().manual_seed(queries + keys + dim)
    made: list[torch.Tensor] = []
    for tokens in (queries, keys, keys):
        whole = torch.full((2, tokens + 5, 4, dim + 3), torch.nan, dtype=dtype)
        whole[:, :tokens, :3, :dim] = torch.randn(2, tokens, 3, dim, generator=generator).to(dtype)
        made.append(whole[:, :tokens, :3, :dim].transpose(1, 2))
    return made[0], made[1], made[2]


def plan_of(
    queries: int,
    keys: int,
    tile: Tile,
    tail: Tail,
    *,
    shape: tuple[int, int] = (2, 3),
    share: float = 0.4,
) -> BlockPlan:
    generator = torch.Generator().manual_seed(1)
    tiles = (-(-queries // tile.query), -(-keys // tile.key))
    mask = torch.rand(*shape, *tiles, generator=generator) < share
    return BlockPlan.from_mask(mask, tile=tile, queries=queries, keys=keys, tail=tail)


WHOLE: tuple[Literal["input", "int8", "int4"], ...] = ("input", "int8", "int4")
PRECISIONS = [Precision(qk, pv) for qk, pv in itertools.product(WHOLE, WHOLE)][1:]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "tile"), [(140, 170, 40, Tile(128, 32)), (33, 71, 21, Tile(16, 32))]
)
def test_whole_numbers_equal_those_of_the_reference(
    queries: int, keys: int, dim: int, tile: Tile, tail: Tail, precision: Precision
):
    """But for numbers in the middle between two steps, which sums in another order may turn."""
    q, k, v = tensors(queries, keys, dim)
    k = k + 4  # a mean that matters
    plan = plan_of(queries, keys, tile, tail)
    got, got_lse = block_attention(q, k, v, plan, precision=precision, backend="triton")
    out, lse = block_attention(q, k, v, plan, precision=precision, backend="reference")
    exact, _ = block_attention(q, k, v, plan, backend="reference")
    near = torch.isclose(got, out, rtol=1e-4, atol=1e-4)
    assert near.float().mean() > 0.97
    assert (got - out).norm() <= 0.1 * (out - exact).norm()
    torch.testing.assert_close(got_lse, lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "dim"), SHAPES)
def test_it_equals_the_reference(queries: int, keys: int, dim: int, tile: Tile, tail: Tail):
    q, k, v = tensors(queries, keys, dim)
    plan = plan_of(queries, keys, tile, tail)
    expected = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="triton"), expected)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (1, 1)])
def test_a_plan_of_one_batch_or_head_serves_all(shape: tuple[int, int], tail: Tail):
    q, k, v = tensors(40, 70, 16)
    plan = plan_of(40, 70, Tile(16, 16), tail, shape=shape)
    expected = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="triton"), expected)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_kept(share: float, tail: Tail):
    q, k, v = tensors(40, 40, 16)
    plan = plan_of(40, 40, Tile(16, 16), tail, share=share)
    out, lse = block_attention(q, k, v, plan, backend="triton")
    expected, expected_lse = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    if share == 1:
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out, dense)
    elif tail == "none":
        assert not out.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("tail", TAILS)
def test_it_weighs_tiles_scales_and_orders(tail: Tail):
    q, k, v = tensors(71, 71, 16)
    plan = plan_of(71, 71, Tile(16, 16), tail)
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(plan.indices.shape, generator=generator)
    order = torch.randperm(71, generator=generator)
    plan = dataclasses.replace(plan, bias=bias, order=order)
    expected = block_attention(q, k, v, plan, backend="reference", scale=0.7)
    torch.testing.assert_close(
        block_attention(q, k, v, plan, backend="triton", scale=0.7), expected
    )


@pytest.mark.parametrize("tail", TAILS)
def test_a_bias_of_minus_infinity_leaves_a_tile_out(tail: Tail):
    q, k, v = tensors(40, 40, 16)
    plan = plan_of(40, 40, Tile(16, 16), tail, share=1.0)
    bias = torch.zeros(plan.indices.shape)
    bias[:, :, 0] = bias[:, :, 1, :2] = -torch.inf
    plan = dataclasses.replace(plan, bias=bias)
    got = block_attention(q, k, v, plan, backend="triton")
    torch.testing.assert_close(got, block_attention(q, k, v, plan, backend="reference"))
    assert not got[0][:, :, :16].any() and bool((got[1][:, :, :16] == -torch.inf).all())


@pytest.mark.parametrize("whose", ["keys", "values"])
def test_what_is_left_out_may_be_broken(whose: str):
    q, k, v = tensors(40, 40, 16)
    mask = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)[None, None]
    plan = BlockPlan.from_mask(mask, tile=Tile(16, 16), queries=40, keys=40)
    expected = block_attention(q, k, v, plan, backend="triton")
    (k if whose == "keys" else v)[:, :, :16] = torch.nan
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="triton"), expected)


def test_entries_that_do_not_count_are_not_read():
    q, k, v = tensors(40, 40, 16)
    plan = plan_of(40, 40, Tile(16, 16), "complement")
    expected = block_attention(q, k, v, plan, backend="triton")
    plan.indices[~plan.kept] = 1_000_000
    got = block_attention(q, k, v, plan, backend="triton")
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_logits_far_from_zero_do_not_overflow():
    q, k, v = tensors(40, 40, 16)
    plan = plan_of(40, 40, Tile(16, 16), "complement")
    expected = block_attention(q * 60, k, v, plan, backend="reference")
    got = block_attention(q * 60, k, v, plan, backend="triton")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tail", TAILS)
def test_half_precision_errs_little_more_than_dense_attention_does(dtype: torch.dtype, tail: Tail):
    q, k, v = tensors(70, 70, 32, dtype)
    plan = plan_of(70, 70, Tile(16, 32), tail)
    out, lse = block_attention(q, k, v, plan, backend="triton")
    expected, expected_lse = block_attention(
        q.double(), k.double(), v.double(), plan, backend="reference"
    )
    dense = torch.nn.functional.scaled_dot_product_attention
    dense_error = (dense(q, k, v).double() - dense(q.double(), k.double(), v.double())).norm()
    assert out.dtype == dtype and lse.dtype == torch.float32
    error = (out.double() - expected).norm() / expected.norm()
    # The interpreter cuts bfloat16 off where GPUs round: twice the error, twice (weights, output).
    times = 4.0 if dtype == torch.bfloat16 else 1.5
    assert error < times * dense_error / dense(q.double(), k.double(), v.double()).norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": torch.float64}, "it takes float16, bfloat16, float32, not float64"),
        ({"precision": Precision(pv="fp8")}, "has no fp8; hopper has"),
        ({"head_dim": 320}, "head dimensions up to 256, not 320"),
        ({"tile": Tile(16, 24)}, "tiles of 16, 32, 64, 128, 256 tokens, not 24"),
        ({"tile": Tile(256, 256), "head_dim": 256}, "tiles of 256x256 with 256 channels"),
    ],
)
def test_a_refusal_has_a_reason(changes: dict[str, object], told: str):
    problem = Problem.of(*tensors(40, 40, 16), plan_of(40, 40, Tile(16, 16), "none"))
    assert refuses(problem, "triton") is None
    reason = refuses(dataclasses.replace(problem, **changes), "triton")  # pyright: ignore[reportArgumentType]
    assert reason is not None and told in reason


def test_it_is_for_gpus(monkeypatch: pytest.MonkeyPatch):
    problem = Problem.of(*tensors(40, 40, 16), plan_of(40, 40, Tile(16, 16), "none"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "the tensors are on cpu" in (refuses(problem, "triton") or "")
    cuda = dataclasses.replace(problem, device="cuda")
    assert refuses(cuda, "triton") is None and choose(cuda) == "triton"
