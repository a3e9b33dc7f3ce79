"""Samplers of diffusers with a formula in the place of the network, and what they are given."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kinora.accel.attach.schedulers import schedule_of
from kinora.accel.steps import Schedule, Skip, Step, StepPolicy

Network = Callable[[Schedule, int, torch.Tensor], torch.Tensor]
"""The true x0, or whatever an output says, in a step for a sample."""
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++ eps": ("DPMSolverMultistepScheduler", {}),
    "dpm++ v": ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "dpm++ flow": ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    "unipc flow": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    "euler eps": ("EulerDiscreteScheduler", {}),
    "euler sample": ("EulerDiscreteScheduler", {"prediction_type": "sample"}),
    "ddim v": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "flow euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow euler reversed": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
}


def sampler(name: str, steps: int) -> Any:
    kind, options = SAMPLERS[name]
    made = getattr(importlib.import_module("diffusers"), kind)(**options)
    made.set_timesteps(steps)
    return made


def polynomial(degree: int, seed: int = 0) -> Network:
    """x0 that depends on the noise level alone."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, 3, 4, generator=generator) * 0.3 for _ in range(degree + 1)]

    def x0(schedule: Schedule, index: int, sample: torch.Tensor) -> torch.Tensor:
        del sample
        share = schedule.levels[index].share
        return sum((part * share**i for i, part in enumerate(parts)), torch.zeros(()))

    return x0


def mixture(schedule: Schedule, index: int, sample: torch.Tensor) -> torch.Tensor:
    """The exact x0 of data that is a mixture of two Gaussians of width 0.5 around ±1."""
    level = schedule.levels[index]
    width = level.alpha**2 * 0.25 + level.sigma**2
    towards = torch.tanh(level.alpha * sample / width)
    return (0.25 * level.alpha * sample + level.sigma**2 * towards) / width


def run(
    name: str,
    policy: StepPolicy | None,
    network: Network,
    steps: int = 20,
    on_skip: Callable[..., None] = lambda *_: None,
) -> tuple[torch.Tensor, str, Any]:
    """The last sample, a letter for each step, and the policy's run."""
    scheduler = sampler(name, steps)
    schedule = schedule_of(scheduler)
    ran = policy and policy.start(schedule)
    first = schedule.levels[0]
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    x, letters, left = x * (first.alpha + first.sigma), "", None
    for index, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        step = Step(index, steps)
        decision = ran.decide(step, left) if ran else None
        if isinstance(decision, Skip):
            output = decision.output
            on_skip(schedule, index, x, output)
        else:
            output = schedule.output(network(schedule, index, x), x, index)
        letters += "s" if isinstance(decision, Skip) else "C"
        if ran:
            ran.observe(step, output, x, computed=letters[-1] == "C")
        x = left = scheduler.step(output, t, x, return_dict=False)[0]
    return x, letters, ran


@contextmanager
def spied(scheduler: Any) -> Generator[list[tuple[torch.Tensor, torch.Tensor]], None, None]:
    """Outputs and samples that a scheduler gets, by its class's method."""
    kind, got = type(scheduler), list[tuple[torch.Tensor, torch.Tensor]]()
    stock = kind.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(stock).bind(self, *args, **kwargs).arguments
        got.append((given["model_output"].clone(), given["sample"].clone()))
        return stock(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "step", step)
        patch.setattr(step, "__signature__", inspect.signature(stock), raising=False)
        yield got
