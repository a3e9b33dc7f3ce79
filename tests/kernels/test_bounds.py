"""What backends keep to: memory, precision whatever torch's default is, no float64 of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kinora.kernels import reference
from kinora.kernels.attention import block_attention
from kinora.kernels.backends import workspace
from kinora.kernels.plan import BlockPlan, Tail, Tile
from kinora.kernels.problem import Problem

TAILS: tuple[Tail, ...] = ("none", "complement")
ANYWHERE = ("cpu", "reference")
"""Backends that need no GPU."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _tensors(
    tokens: int, dim: int = 8, dtype: torch.dtype = torch.float32, heads: int = 2
) -> Tensors:
    """q, k, v `[1, H, L, D]`."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, heads, tokens, dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v


def _plan(
    tokens: int, tile: Tile, *, tail: Tail, share: float = 0.3, biased: bool = False
) -> BlockPlan:
    """A random plan in a random order."""
    generator = torch.Generator().manual_seed(1)
    tiles = (-(-tokens // tile.query), -(-tokens // tile.key))
    mask = torch.rand(1, 2, *tiles, generator=generator, dtype=torch.float32) < share
    order = torch.randperm(tokens, generator=generator)
    plan = BlockPlan.from_mask(mask, tile=tile, queries=tokens, keys=tokens, tail=tail, order=order)
    bias = torch.randn(plan.indices.shape, generator=generator, dtype=torch.float32)
    return dataclasses.replace(plan, bias=bias) if biased else plan


# Memory.


def _peak_bytes(call: Callable[[], Any]) -> int:
    """The most that `call` holds at a time beyond what there was before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results: Any = profiled.profiler
    events = [it for it in results.kineto_results.events() if it.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda it: it.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tokens", [4096, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predicted_workspace_is_near_what_is_taken(
    backend: str, tail: Tail, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reference, "LOGITS_BYTES", 2**23)
    q, k, v = _tensors(tokens, 64, dtype)
    plan = _plan(tokens, Tile(128, 64), tail=tail)
    taken = _peak_bytes(lambda: block_attention(q, k, v, plan, backend=backend))
    predicted = workspace(Problem.of(q, k, v, plan), backend)
    assert 0.4 * predicted < taken - q.nbytes < 1.15 * predicted


def test_the_workspace_grows_with_heads_and_tokens_and_the_reference_stays_bounded():
    q, k, v = _tensors(256, 64)
    small = Problem.of(q, k, v, _plan(256, Tile(64, 64), tail="none"))
    for backend in ANYWHERE:
        for changes in ({"heads": 200}, {"batch": 100}, {"queries": 75_600, "keys": 75_600}):
            assert workspace(dataclasses.replace(small, **changes), backend) > workspace(
                small, backend
            )
    large = dataclasses.replace(small, heads=40, head_dim=128, queries=75_600, keys=75_600)
    inputs = 3 * large.tensor_bytes(75_600)
    assert workspace(large, "reference") < 2 * inputs + 2**28


@pytest.mark.parametrize("grad", [False, True])
def test_the_reference_holds_few_logits_at_a_time(grad: bool, monkeypatch: pytest.MonkeyPatch):
    q, k, v = (x.requires_grad_(grad) for x in _tensors(2048))
    plan = _plan(2048, Tile(64, 64), tail="complement")

    def run() -> None:
        out, lse = block_attention(q, k, v, plan, backend="reference")
        if grad:
            (out.sum() + lse.sum()).backward()

    all_logits = 2 * 2048 * (2048 + 32) * 4
    whole = _peak_bytes(run)
    monkeypatch.setattr(reference, "LOGITS_BYTES", all_logits // 32)
    assert whole > 2 * all_logits
    assert _peak_bytes(run) < all_logits / 2


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("logits_bytes", [1, 5_000, 40_000])
def test_chunks_of_the_reference_give_the_same_and_the_same_gradients(
    logits_bytes: int, biased: bool, tail: Tail, monkeypatch: pytest.MonkeyPatch
):
    plan = _plan(70, Tile(16, 8), tail=tail, biased=biased)

    def results() -> list[torch.Tensor]:
        q, k, v = (x.requires_grad_() for x in _tensors(70, dtype=torch.float64))
        out, lse = block_attention(q, k, v, plan, backend="reference")
        loss = (out * out.cos()).sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
        return [out, lse, *torch.autograd.grad(loss, (q, k, v))]

    whole = results()
    monkeypatch.setattr(reference, "LOGITS_BYTES", logits_bytes)
    torch.testing.assert_close(results(), whole)


# Precision.


@pytest.fixture
def half_by_default() -> Generator[Callable[[], None], None, None]:
    """Makes bfloat16 torch's default when called, until the test is over."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.bfloat16)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("biased", [False, True])
def test_torchs_default_dtype_changes_nothing(
    backend: str, tail: Tail, biased: bool, half_by_default: Callable[[], None]
):
    def results() -> list[torch.Tensor]:
        q, k, v = _tensors(70)
        plan = _plan(70, Tile(16, 8), tail=tail, biased=biased)
        return [plan.density(), *block_attention(q, k, v, plan, backend=backend)]

    expected = results()
    half_by_default()
    for got, wanted in zip(results(), expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


class _NoFloat64(TorchDispatchMode):
    """A device without float64, as MPS is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for it in result if isinstance(result, tuple | list) else (result,):
            assert not isinstance(it, torch.Tensor) or it.dtype != torch.float64, func
        return result


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_is_computed_in_float64(backend: str, tail: Tail):
    q, k, v = _tensors(70)
    with _NoFloat64():
        plan = _plan(70, Tile(16, 8), tail=tail, biased=True)
        block_attention(q, k, v, plan, backend=backend)
        density = plan.density()
    assert density.dtype == torch.float32


def test_a_density_of_many_tokens_is_exact():
    dense = BlockPlan.dense(tile=Tile(128, 64), queries=75_611, keys=75_611)
    assert float(dense.density()) == 1
    mask = torch.ones(1, 1, 591, 1182, dtype=torch.bool)
    mask[..., 0, 0] = False
    almost = BlockPlan.from_mask(mask, tile=Tile(128, 64), queries=75_611, keys=75_611)
    assert float(almost.density()) == pytest.approx(1 - 128 * 64 / 75_611**2, abs=1e-7)
