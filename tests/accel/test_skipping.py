"""Step policies on every family: what the scheduler gets, and what is not computed."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.methods import TopBlocks
from kinora.accel.recipe import Recipe
from kinora.accel.steps import Compute, Schedule, Skip, Step, StepPolicy


class EverySecond(StepPolicy):
    """Repeats what the scheduler got last, in every second step."""

    name: ClassVar[str] = "every-second"

    def start(self, schedule: Schedule) -> Any:
        return _EverySecond()


class _EverySecond:
    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.seen: list[tuple[int, bool]] = []

    def decide(self, step: Step, sample: torch.Tensor | None) -> Compute | Skip:
        if step.index % 2 == 0:
            return Compute()
        assert self.last is not None
        return Skip(self.last)

    def observe(self, step: Step, output: Any, sample: Any, *, computed: bool) -> None:
        assert sample.shape == output.shape
        self.last = output

    def errors(self) -> list[float]:
        return []


def test_a_skipped_step_gives_the_scheduler_what_the_policy_says(model: Any):
    """Guidance, batched or not, hands on exactly the policy's output."""
    got: list[torch.Tensor] = []
    calls: list[int] = []
    handle = model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    scheduler = type(model.scheduler)
    stock = scheduler.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock).bind(self, *args, **kwargs).arguments
        got.append(given["model_output"].clone())
        return stock(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", step)
        patch.setattr(step, "__signature__", inspect.signature(stock), raising=False)
        model(steps=4)
        dense, _ = len(calls), got.clear()
        calls.clear()
        with accelerate(model, Recipe(steps=EverySecond())) as session:
            model(steps=4)
    handle.remove()
    assert torch.equal(got[0], got[1]) and torch.equal(got[2], got[3])
    assert not torch.equal(got[1], got[2])
    assert len(calls) == dense // 2
    assert (session.receipt.steps, session.receipt.skipped) == (4, 2)
    assert session.receipt.words() == [
        "asked: steps by every-second",
        f"ran: 2 of 4 steps evaluated in {len(calls)} calls of the denoiser, 2 skipped: CsCs",
    ]


def test_skipped_steps_and_sparse_attention_go_together(model: Any):
    recipe = Recipe(attention=TopBlocks(keep=0.5, tile="64x64"), steps=EverySecond(), when="always")
    with accelerate(model, recipe) as session:
        model(steps=4)
    ran = session.receipt.attention
    with accelerate(model, recipe.model_copy(update={"steps": None})) as alone:
        model(steps=4)
    whole = alone.receipt.attention
    assert ran is not None and whole is not None and ran.calls == whole.calls // 2
