"""Block attention inside `torch.compile`: the same numbers, no graph break, one compilation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.testing import (  # pyright: ignore[reportPrivateUsage]
    CompileCounterWithBackend,
)

from kinora.kernels import compiled as module
from kinora.kernels import reference
from kinora.kernels.attention import block_attention
from kinora.kernels.backends import attend
from kinora.kernels.plan import BlockPlan, Tail, Tile
from kinora.kernels.precision import INPUT, Precision
from kinora.kernels.triton_backward import Gradients

TILE = Tile(16, 8)


def _case(
    seed: int, tokens: int = 40, dtype: torch.dtype = torch.float64, keys: int | None = None
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], BlockPlan]:
    """q, k, v `[2, 3, L, 8]` and a plan in some order, its lists as wide as all tiles.

    With `keys` there are as many, each head's in an order of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=dtype)
        for length in (tokens, keys or tokens, keys or tokens)
    )
    key_order = torch.rand(2, 3, keys, generator=generator).argsort(-1) if keys else None
    plan = BlockPlan.dense(tile=TILE, queries=tokens, keys=keys or tokens)
    counts = torch.randint(1, plan.columns + 1, (2, 3, plan.rows), generator=generator)
    shuffled = torch.rand(2, 3, plan.rows, plan.columns, generator=generator).argsort(-1)
    return (q, k, v), dataclasses.replace(
        plan,
        indices=shuffled.to(torch.int32),
        counts=counts.to(torch.int32),
        order=torch.randperm(tokens, generator=generator),
        key_order=key_order,
    )


@pytest.fixture
def compiled() -> Any:
    """`block_attention` compiled whole, and what counts compilations."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(q: Any, k: Any, v: Any, plan: BlockPlan, **given: Any) -> Any:
        return block_attention(q * 1, k, v, plan, **given)

    return torch.compile(run, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("tail", ["none", "complement"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("keys", [None, 52])
def test_it_equals_what_runs_uncompiled(compiled: Any, tail: Tail, biased: bool, keys: int | None):
    run, counter = compiled
    for seed in range(3):
        tensors, plan = _case(seed, keys=keys)
        bias = torch.randn(plan.indices.shape) if biased else None
        plan = dataclasses.replace(plan, tail=tail, bias=bias)
        got, expected = run(*tensors, plan, scale=0.4), block_attention(*tensors, plan, scale=0.4)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert counter.frame_count == 1, "other numbers in a plan must not compile again"


@pytest.mark.parametrize("tail", ["none", "complement"])
@pytest.mark.parametrize("keys", [None, 52])
def test_gradients_are_those_of_the_reference(compiled: Any, tail: Tail, keys: int | None):
    """Of q, k, v and the bias, through output and log-sum-exp; the plan is in some order."""
    run, _ = compiled
    tensors, plan = _case(0, keys=keys)
    bias = torch.randn(plan.indices.shape, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 3, 40, 8, dtype=torch.float64)
    found: list[tuple[torch.Tensor, ...]] = []
    functions: list[Any] = [run, block_attention]
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in (*tensors, bias)]
        given = dataclasses.replace(plan, tail=tail, bias=leaves[3])
        out, lse = function(*leaves[:3], given)
        found.append(torch.autograd.grad((out * weights).sum() + lse.sin().sum(), leaves))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_gradients_where_logits_do_not_fit_at_once(compiled: Any, monkeypatch: pytest.MonkeyPatch):
    run, _ = compiled
    (q, k, v), plan = _case(0)
    q.requires_grad_()
    expected = torch.autograd.grad(block_attention(q, k, v, plan)[0].square().sum(), q)
    monkeypatch.setattr(reference, "LOGITS_BYTES", 2**14)
    got = torch.autograd.grad(run(q, k, v, plan)[0].square().sum(), q)
    torch.testing.assert_close(got, expected)


def test_gradients_of_some(compiled: Any):
    run, _ = compiled
    (q, k, v), plan = _case(0)
    k.requires_grad_()
    out, _ = run(q, k, v, plan)
    (dk,) = torch.autograd.grad(out.square().sum(), k)
    out, _ = block_attention(q, k, v, plan)
    torch.testing.assert_close(dk, torch.autograd.grad(out.square().sum(), k)[0])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("keys", [None, 52])
def test_the_gradients_of_kernels_are_taken_in_the_order_of_the_plan(
    compiled: Any, by_head: bool, keys: int | None, monkeypatch: pytest.MonkeyPatch
):
    """With `triton_backward` replaced by the reference, whose gradients are the truth."""
    by_autograd: Any = vars(module)["_by_autograd"]

    def gradients(
        dout: Any, dlse: Any, saved: Any, plan: BlockPlan, scale: float, wanted: Any
    ) -> Gradients:
        plan = dataclasses.replace(plan, order=None, key_order=None)
        given = [True, True, True, False]
        assert list(wanted) == given
        q, k, v, *made = saved
        rest = (plan, scale, INPUT, "reference")
        torch.testing.assert_close(attend(q, k, v, *rest), tuple(made))
        return Gradients(*by_autograd([dout, dlse], (q, k, v), *rest, given))

    monkeypatch.setattr(module, "_GRADIENTS_OF", ("reference",))
    monkeypatch.setattr(module.triton_backward, "gradients", gradients)
    run, _ = compiled
    tensors, plan = _case(0, keys=keys)
    if by_head:
        generator = torch.Generator().manual_seed(2)
        order = torch.rand(1, 3, 40, generator=generator).argsort(-1)
        plan = dataclasses.replace(plan, order=order)
    found: list[tuple[torch.Tensor, ...]] = []
    functions: list[Any] = [run, block_attention]
    for function, given in zip(functions, ({"backend": "reference"}, {}), strict=True):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = function(*leaves, plan, **given)
        found.append(torch.autograd.grad((out.square().sum() + lse.sin().sum()), leaves))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_the_fake_tells_shapes_dtypes_and_strides(compiled: Any):
    del compiled
    tensors, plan = _case(0, dtype=torch.float32, keys=52)
    q, k, v = tensors
    sizes = [plan.tile.query, plan.tile.key, plan.queries, plan.keys, plan.means]
    args = (
        q.mT.contiguous().mT, k, v, plan.indices, plan.counts, plan.order, plan.key_order, None,
        None, sizes, "none", None, "input", "input", "", False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kinora.block_attention.default, args)


def test_precision_goes_through(compiled: Any):
    run, _ = compiled
    tensors, plan = _case(0)
    given: dict[str, Any] = {"precision": Precision("int8"), "backend": "reference"}
    torch.testing.assert_close(
        run(*tensors, plan, **given), block_attention(*tensors, plan, **given)
    )


def test_what_does_not_fit_is_refused_when_it_runs(compiled: Any):
    run, _ = compiled
    (q, k, v), plan = _case(0)
    with pytest.raises(ValueError, match="the plan is for 40 queries"):
        run(q[:, :, :39], k, v, plan)
    with pytest.raises(ValueError, match="backend hopper cannot do this"):
        run(q, k, v, plan, backend="hopper")
