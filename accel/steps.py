"""Step policies: which steps of a sampler evaluate the denoiser, and what stands for it elsewhere.

A policy holds options and no state; `start` makes the run that remembers. What is predicted is the
*guided* output, the one that the scheduler gets: given to every guidance branch alike, any affine
guidance u + g (c - u) hands on exactly it, so that one prediction serves all pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from .options import Options


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a run; 0 is the noisiest."""

    index: int
    steps: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Evaluate the denoiser."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Hand `output` to the scheduler in place of the guided output of the denoiser."""

    output: torch.Tensor


class StepRun(Protocol):
    """A policy during one run."""

    def decide(self, step: Step) -> Compute | Skip:
        """What to do in a step, asked once, before the denoiser is called."""
        ...

    def observe(
        self, step: Step, output: torch.Tensor, sample: torch.Tensor, *, computed: bool
    ) -> None:
        """What the scheduler got in a step: the guided output and the sample that it moves."""
        ...


class StepPolicy(Options):
    """Which steps are evaluated."""

    name: ClassVar[str] = ""

    def start(self) -> StepRun:
        """A policy's run."""
        raise NotImplementedError

    def words(self) -> str:
        """The policy and its options, in words."""
        told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self)
        return f"{self.name} ({told})" if told else self.name
