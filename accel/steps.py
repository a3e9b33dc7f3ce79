"""Step policies: which steps of a sampler evaluate the denoiser, and what stands for it elsewhere.

A policy holds options and no state; `start` makes the run that remembers. What is predicted is the
*guided* output, the one that the scheduler gets: given to every guidance branch alike, any affine
guidance u + g (c - u) hands on exactly it, so that one prediction serves all pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from .codec import Codec, Level, wide
from .named import Named


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a run; 0 is the noisiest."""

    index: int
    steps: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The noise levels of all steps, and what outputs mean.

    `codec` is None where that is not known, `why_raw` says why: what is estimated of an output is
    then the output itself, elsewhere it is x0.
    """

    levels: tuple[Level, ...]
    codec: Codec | None
    why_raw: str = ""

    @property
    def flow(self) -> bool:
        """Whether it is known to be flow matching, alpha + sigma = 1."""
        return self.codec is not None and self.levels[0].rate == 0

    def estimate(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """What `output` says of `sample` in a step, in float32 or more."""
        if self.codec is None:
            return wide(output)
        return self.codec.x0(output, sample, self.levels[index])

    def output(self, estimate: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """The output that says `estimate` of `sample`."""
        if self.codec is None:
            return estimate
        return self.codec.output(estimate, sample, self.levels[index])

    def velocity(self, estimate: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """The derivative by `Level.share` of the sample, brought to a common scale."""
        if self.codec is None:
            return estimate
        return self.codec.velocity(estimate, sample, self.levels[index])


@dataclass(frozen=True, slots=True)
class Compute:
    """Evaluate the denoiser."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Hand `output` to the scheduler in place of the guided output of the denoiser."""

    output: torch.Tensor


@dataclass(frozen=True, slots=True)
class Prune:
    """Evaluate the denoiser on its unstable tokens, and on one of each cell, alone.

    Attributes:
        scores: of each number of the sample, laid out as it is; those of a token are averaged.
        cell: side of the cells of the token grid, in each frame.
        threshold: a token is unstable from this score on, in means of their magnitudes.
    """

    scores: torch.Tensor
    cell: int
    threshold: float


Decision: TypeAlias = Compute | Prune | Skip
"""What a policy can want of a step."""


class StepRun(Protocol):
    """A policy during one run."""

    def decide(self, step: Step, sample: torch.Tensor | None) -> Decision:
        """What to do in a step, asked once, before the denoiser is called.

        Args:
            sample: that the step will move, as the step before has left it; None in the first.
        """
        ...

    def observe(
        self, step: Step, output: torch.Tensor, sample: torch.Tensor, *, computed: bool
    ) -> None:
        """What the scheduler got in a step: the guided output and the sample that it moves."""
        ...

    def errors(self) -> list[float]:
        """Estimates of how far what stood for skipped steps missed, relative to the outputs."""
        ...


class StepPolicy(Named):
    """Which steps are evaluated."""

    def start(self, schedule: Schedule) -> StepRun:
        """A policy's run."""
        raise NotImplementedError

    def computed(self, steps: int, experts: int = 1) -> tuple[int, int]:
        """How many of `steps` are evaluated, at least and at most.

        Args:
            experts: denoisers that share the steps, each of which begins with no past.
        """
        del experts
        return 1, steps

    def refuses(self, steps: int, first: int = 0) -> str | None:
        """Why it cannot serve a run of `steps` that begins with step `first`, or None."""
        del steps, first
        return None

    def window(self, steps: int) -> range:
        """The steps of a run that may be skipped; none where it is blocks that are left out."""
        del steps
        return range(0)

    def needs_x0(self) -> bool:
        """Whether it cannot do without knowing what outputs mean."""
        return False

    def prunes(self) -> bool:
        """Whether it may want steps evaluated on some tokens alone."""
        return False
