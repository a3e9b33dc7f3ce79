"""Gradients of the Triton kernels, run by Triton's interpreter, against those of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kinora.kernels import triton_backward
from kinora.kernels.attention import block_attention, merge
from kinora.kernels.backends import refuses, workspace
from kinora.kernels.plan import BlockPlan, Tail, Tile, tiles_of
from kinora.kernels.problem import Problem
from kinora.kernels.triton_backward import LAUNCHES, Launch, transpose

pytest.importorskip("triton", reason="the test group has it on Linux")

TAILS: tuple[Tail, ...] = ("none", "complement")
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tensors = tuple[torch.Tensor, ...]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch):
    """The interpreter takes its time for each."""
    monkeypatch.setattr(triton_backward, "POOLED_PROGRAMS", 8)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(queries: int, keys: int, dim: int, batch: int = 1, heads: int = 2) -> Inputs:
    """q, k, v `[B, H, L, dim]`."""
    keys_values = numbers(1, 2, batch, heads, keys, dim)
    return numbers(0, batch, heads, queries, dim), keys_values[0], keys_values[1]


def plan_of(
    queries: int,
    keys: int,
    tile: Tile,
    tail: Tail,
    *,
    shape: tuple[int, int] = (1, 2),
    share: float = 0.4,
    biased: bool = False,
) -> BlockPlan:
    """Random; what follows the counts is garbage."""
    tiles = tiles_of(queries, tile.query), tiles_of(keys, tile.key)
    mask = torch.rand(*shape, *tiles, generator=torch.Generator().manual_seed(5)) < share
    plan = BlockPlan.from_mask(mask, tile=tile, queries=queries, keys=keys, tail=tail)
    indices = plan.indices.where(plan.kept, 1_000_000_000)
    bias = numbers(6, *indices.shape).where(plan.kept, torch.nan) if biased else None
    return dataclasses.replace(plan, indices=indices, bias=bias)


def loss_of(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Through both, with another weight for each number, of queries without a key too."""
    alive = lse.masked_fill(lse == -torch.inf, 0)
    weights = numbers(7, *lse.shape).to(lse.dtype)
    return (out * numbers(8, *out.shape).to(out.dtype)).sum() + (alive * weights).sum()


def gradients(
    given: Inputs,
    plan: BlockPlan,
    backend: str,
    loss: Loss = loss_of,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensors:
    """Of q, k, v and, if there is one, of the bias."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    q, k, v = leaves
    if plan.bias is not None:
        leaves.append(plan.bias.detach().to(dtype or plan.bias.dtype).requires_grad_())
        plan = dataclasses.replace(plan, bias=leaves[-1])
    out, lse = block_attention(q, k, v, plan, scale=scale, backend=backend)
    return torch.autograd.grad(loss(out, lse), leaves, materialize_grads=True)


def check(given: Inputs, plan: BlockPlan, loss: Loss = loss_of, scale: float | None = None):
    """Gradients equal those that the reference has in float64."""
    # The reference reads no bias behind the counts, but 0 x NaN is NaN where it scatters.
    bias = None if plan.bias is None else plan.bias.where(plan.kept, 0)
    clean = dataclasses.replace(
        plan, bias=bias, indices=plan.indices.where(plan.kept, torch.zeros_like(plan.indices))
    )
    expected = gradients(given, clean, "reference", loss, scale, torch.float64)
    got = gradients(given, plan, "triton", loss, scale)
    for it, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(it.double(), wanted, rtol=1e-4, atol=2e-5)
    return got


@pytest.mark.parametrize(
    ("tail", "biased"), [("none", False), ("none", True), ("complement", True)]
)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "tile"),
    [
        (32, 32, 16, Tile(16, 16)),
        (40, 51, 20, Tile(32, 16)),
        (23, 100, 8, Tile(16, 64)),
        (100, 50, 32, Tile(128, 32)),
        (7, 90, 40, Tile(64, 256)),
    ],
)
def test_gradients_equal_those_of_the_reference(
    queries: int, keys: int, dim: int, tile: Tile, tail: Tail, biased: bool
):
    check(tensors(queries, keys, dim), plan_of(queries, keys, tile, tail, biased=biased))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (1, 1)])
def test_a_plan_of_one_batch_or_head_serves_all(shape: tuple[int, int], tail: Tail):
    plan = plan_of(20, 40, Tile(16, 32), tail, shape=shape, biased=True)
    check(tensors(20, 40, 16, batch=2), plan)


def output_only(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return loss_of(out, lse.detach())


def lse_only(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return loss_of(out.detach(), lse)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("loss", [output_only, lse_only])
def test_output_and_log_sum_exp_alone(loss: Loss, tail: Tail):
    got = check(tensors(40, 40, 16), plan_of(40, 40, Tile(16, 16), tail, biased=True), loss)
    assert bool(got[2].any()) == (loss is output_only)


def test_gradients_through_a_merge_are_those_of_the_whole():
    whole = plan_of(40, 40, Tile(16, 16), "none", share=1.0)
    mask = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    parts = [BlockPlan.from_mask(it, tile=whole.tile, queries=40, keys=40) for it in (mask, ~mask)]
    more = plan_of(40, 30, Tile(16, 16), "complement")
    q, k, v = (x.requires_grad_() for x in tensors(40, 40, 16))
    other_k, other_v = (x[:, :, :30] for x in tensors(1, 50, 16)[1:])

    def results(backend: str, plans: list[BlockPlan]) -> Tensors:
        got = [block_attention(q, k, v, it, backend=backend) for it in plans]
        got.append(block_attention(q, other_k, other_v, more, backend=backend))
        joined = got[0]
        for it in got[1:]:
            joined = merge(joined, it)
        return torch.autograd.grad(loss_of(*joined), (q, k, v))

    torch.testing.assert_close(
        results("triton", parts), results("reference", [whole]), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("tail", TAILS)
def test_rows_without_a_tile(tail: Tail):
    plan = plan_of(60, 40, Tile(16, 16), tail, share=0.6, biased=True)
    plan.counts[0, 0, 1] = plan.counts[0, 1, 3] = 0
    got = check(tensors(60, 40, 16), plan)
    if tail == "none":
        assert not got[0][0, 0, 16:32].any() and not got[0][0, 1, 48:].any()


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_kept(tail: Tail):
    got = check(tensors(40, 40, 16), plan_of(40, 40, Tile(16, 16), tail, share=0.0))
    assert tail == "complement" or not any(x.any() for x in got)


def test_everything_kept_is_dense_attention():
    q, k, v = (x.requires_grad_() for x in tensors(40, 50, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    expected = torch.autograd.grad(output_only(dense, dense[..., 0]), (q, k, v))
    plan = plan_of(40, 50, Tile(32, 32), "complement", share=1.0)
    got = gradients((q, k, v), plan, "triton", output_only)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale: float):
    check(tensors(30, 40, 16), plan_of(30, 40, Tile(16, 16), "complement"), scale=scale)


def test_an_order():
    plan = plan_of(41, 41, Tile(16, 32), "complement")
    order = torch.randperm(41, generator=torch.Generator().manual_seed(4))
    check(tensors(41, 41, 16), dataclasses.replace(plan, order=order))


def test_a_tile_of_no_weight():
    plan = plan_of(40, 40, Tile(16, 16), "none", biased=True)
    assert plan.bias is not None
    plan.bias[0, 0, 1] = plan.bias[0, 1, :, 0] = -torch.inf
    q, k, v = (x.requires_grad_() for x in tensors(40, 40, 16))
    out, lse = block_attention(q, k, v, plan, backend="triton")
    assert bool((lse[0, 0, 16:32] == -torch.inf).all())
    # Whatever the gradient of minus infinity is.
    dlse = torch.ones_like(lse).where(lse > -torch.inf, torch.nan)
    got = torch.autograd.grad([out, lse], (q, k, v), [torch.ones_like(out), dlse])
    assert not got[0][0, 0, 16:32].any() and all(bool(x.isfinite().all()) for x in got)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pieces", [(16, 16), (32, 16)], ids=str)
def test_tiles_are_cut_into_pieces(
    pieces: tuple[int, int], tail: Tail, monkeypatch: pytest.MonkeyPatch
):
    # 100 queries: tile 1 has a ragged piece and one without any query; so has tile 1 of 90 keys.
    cut = {16: Launch(*pieces, 4, 2)}
    monkeypatch.setattr(triton_backward, "LAUNCHES", dict.fromkeys(triton_backward.LAUNCHES, cut))
    plan = plan_of(100, 90, Tile(64, 64), tail, shape=(1, 1), share=0.6, biased=True)
    check(tensors(100, 90, 16, heads=1), plan)


def test_pooled_tokens_are_spread_over_programs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_backward, "POOLED_PROGRAMS", 1024)
    # 19 pooled tokens: two chunks, of small pieces.
    cut = {16: Launch(16, 16, 4, 2)}
    monkeypatch.setattr(
        triton_backward,
        "LAUNCHES",
        triton_backward.LAUNCHES | {("pooled", 4): cut, ("queries", 4): cut},
    )
    check(tensors(50, 300, 8, heads=1), plan_of(50, 300, Tile(32, 16), "complement", shape=(1, 1)))


@pytest.mark.parametrize("tail", TAILS)
def test_any_strides_and_no_memory_behind_the_tensors(tail: Tail):
    """`[B, L, H, D]` in memory, a slice of a tensor full of NaN; last dimension outermost; keys of
    one head for all."""
    plan = plan_of(40, 70, Tile(16, 32), tail)
    q, k, v = tensors(40, 70, 20)
    whole = torch.full((2, 45, 4, 23), torch.nan)
    whole[1:, 3:43, 1:3, 2:22] = q.transpose(1, 2)
    sliced = whole[1:, 3:43, 1:3, 2:22].transpose(1, 2)
    outside = torch.full((22, 1, 2, 80), torch.nan)
    outside[:20, ..., :70] = v.permute(3, 0, 1, 2)
    values = outside[:20, ..., :70].permute(1, 2, 3, 0)
    keys = k[:, :1].expand(-1, 2, -1, -1)

    def results(backend: str, dtype: torch.dtype) -> Tensors:
        leaves = [x.to(dtype).requires_grad_() for x in (whole, keys[:, :1], outside)]
        q = leaves[0][1:, 3:43, 1:3, 2:22].transpose(1, 2)
        v = leaves[2][:20, ..., :70].permute(1, 2, 3, 0)
        assert torch.equal(q, sliced) and torch.equal(v, values)
        k = leaves[1].expand(-1, 2, -1, -1)
        out, lse = block_attention(q, k, v, plan, backend=backend)
        # Gradients of stride 0 and, of the output's, in another layout.
        wide = numbers(9, 20, 40, 2, 1).to(dtype).permute(3, 2, 1, 0)
        return torch.autograd.grad([out, lse], leaves, [wide, lse.new_ones(()).expand_as(lse)])

    got, expected = results("triton", torch.float32), results("reference", torch.float64)
    for it, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(it.double(), wanted, rtol=1e-4, atol=2e-5)
    leaves = q, k, v = tuple(x.clone().requires_grad_() for x in (q, k, v))
    out, _ = block_attention(q, k, v, plan, backend="triton")
    again, _ = block_attention(q, k, v, plan, backend="reference")
    for it, wanted in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(again.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(it, wanted, rtol=1e-4, atol=2e-5)


def test_gradients_lie_in_memory_as_their_tensors_do():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(40, 40, 16))
    got = gradients((q, k, v), plan_of(40, 40, Tile(16, 16), "none"), "triton")
    assert [x.stride() for x in got] == [x.stride() for x in (q, k, v)]


def test_two_runs_are_equal_bit_for_bit():
    given, plan = tensors(50, 50, 16), plan_of(50, 50, Tile(32, 32), "complement", biased=True)
    first, second = (gradients(given, plan, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_slopes():
    given, plan = tensors(30, 40, 16), plan_of(30, 40, Tile(16, 16), "complement")
    slopes = gradients(given, plan, "triton")
    for seed in (20, 30):
        ways = [numbers(seed + i, *x.shape) for i, x in enumerate(given)]

        def at(far: float, ways: list[torch.Tensor] = ways) -> torch.Tensor:
            q, k, v = (x + far * way for x, way in zip(given, ways, strict=True))
            return loss_of(*block_attention(q, k, v, plan, backend="triton"))

        expected = sum((it * way).sum() for it, way in zip(slopes, ways, strict=True))
        measured = (at(1e-2) - at(-1e-2)) / 2e-2
        torch.testing.assert_close(measured, torch.as_tensor(expected), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_little(dtype: torch.dtype):
    q, k, v = (x.to(dtype) for x in tensors(50, 70, 32))
    given = q, k, v
    plan = plan_of(50, 70, Tile(32, 32), "complement", biased=True)
    assert plan.bias is not None
    plan = dataclasses.replace(plan, bias=plan.bias.where(plan.kept, 0))
    clean = dataclasses.replace(plan, indices=plan.indices.where(plan.kept, 0))
    got = gradients(given, plan, "triton")
    expected = gradients(given, clean, "reference", dtype=torch.float64)
    assert [x.dtype for x in got] == [dtype, dtype, dtype, torch.float32]
    for it, wanted in zip(got, expected, strict=True):
        error = (it.double() - wanted).norm() / wanted.norm()
        # The interpreter cuts bfloat16 off where GPUs round.
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("dim", [72, 256])
def test_large_heads(dim: int):
    check(tensors(20, 40, dim, heads=1), plan_of(20, 40, Tile(16, 16), "complement", shape=(1, 1)))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_is_asked_for(which: int, monkeypatch: pytest.MonkeyPatch):
    given = q, k, v = tensors(30, 30, 16)
    plan = plan_of(30, 30, Tile(16, 16), "complement")
    expected = gradients(given, plan, "triton")[which]
    given[which].requires_grad_()
    transposed: list[BlockPlan] = []

    def spy(plan: BlockPlan) -> Any:
        transposed.append(plan)
        return transpose(plan)

    monkeypatch.setattr(triton_backward, "transpose", spy)
    out, lse = block_attention(q, k, v, plan, backend="triton")
    (got,) = torch.autograd.grad(loss_of(out, lse), given[which])
    assert torch.equal(got, expected)
    assert len(transposed) == (which > 0)


def test_the_bias_alone():
    q, k, v = tensors(30, 30, 16)
    plan = plan_of(30, 30, Tile(16, 16), "complement", biased=True)
    expected = gradients((q, k, v), plan, "triton")[3]
    assert plan.bias is not None
    bias = plan.bias.clone().requires_grad_()
    out, lse = block_attention(q, k, v, dataclasses.replace(plan, bias=bias), backend="triton")
    (got,) = torch.autograd.grad(loss_of(out, lse), bias)
    assert torch.equal(got, expected) and not got[~plan.kept].any()


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in tensors(20, 20, 16))
    out, _ = block_attention(q, k, v, plan_of(20, 20, Tile(16, 16), "none"), backend="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_transposed_list_names_who_keeps_a_key_tile(shape: tuple[int, int], share: float):
    plan = plan_of(70, 100, Tile(16, 16), "none", shape=shape, share=share, biased=True)
    lists, mask = transpose(plan), plan.mask().flatten(0, 1)
    bias = dataclasses.replace(plan, indices=plan.indices.where(plan.kept, 0)).tile_bias()
    assert bias is not None and lists.bias is not None
    bias = bias.flatten(0, 1)
    for head in range(len(mask)):
        for column in range(plan.columns):
            place = head * plan.columns + column
            here = slice(int(lists.starts[place]), int(lists.starts[place + 1]))
            rows = lists.rows[here]
            assert rows.tolist() == mask[head, :, column].nonzero().flatten().tolist()
            assert torch.equal(lists.bias[here], bias[head, rows, column])


def test_it_takes_problems_with_gradients_and_counts_their_memory():
    plan = plan_of(40, 40, Tile(16, 16), "complement")
    q, k, v = tensors(40, 40, 16)
    without = Problem.of(q, k, v, plan)
    problem = Problem.of(q.requires_grad_(), k, v, plan)
    assert problem.requires_grad and refuses(problem, "triton") is None
    more = workspace(problem, "triton") - workspace(without, "triton")
    assert more >= problem.tensor_bytes(3 * 40)


@pytest.mark.parametrize(("room", "stages"), [(99, 2), (163, 3), (227, 3)])
def test_stages_fit_into_shared_memory(room: int, stages: int, monkeypatch: pytest.MonkeyPatch):
    device = SimpleNamespace(shared_memory_per_block_optin=room * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    launch = LAUNCHES["queries", 2][128]
    assert launch.stages_on(torch.device("cuda")) == stages
    assert launch.stages_on(torch.device("cpu")) == launch.stages == 2
