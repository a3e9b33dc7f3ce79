"""What the policies have in common that skip whole steps: a window, a past and a reconstruction.

In a skipped step x0 is extrapolated from the last evaluated ones by a polynomial in the noise level
(`Level.share`: sigma, where it is flow matching), and the scheduler gets the output that says this
x0 of the sample as it really is. A gate decides where; that is what the policies differ in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import RecipeError
from ..options import option
from ..steps import Compute, Decision, Schedule, Skip, Step, StepPolicy, StepRun

FEWEST_STEPS = 12
"""In fewer a step changes too much for its output to be told from those before."""
EDGE = 3
"""Steps at both ends of a run that are always evaluated."""
_NODES = {"hold": 1, "linear-x0": 2, "three-node": 3}
_MOST_WEIGHT = 6.0
"""Sum of the weights of an extrapolation, by which errors of its nodes may grow."""


def at_share(share: float, steps: int) -> int:
    """The first step that begins at or after a share of them."""
    # A little less, so that 0.2 of 50 steps are ten of them, whatever 0.2 * 50 is in binary.
    return math.ceil(share * steps - 1e-6)


def check_window(policy: Any) -> None:
    """Raise `RecipeError` where `from_step` and `to_step` of `policy` leave nothing between."""
    if policy.from_step >= policy.to_step:
        raise RecipeError(
            f"steps.from_step {policy.from_step:g} must be below steps.to_step "
            f"{policy.to_step:g}, else nothing is skipped"
        )


def too_few(steps: int, first: int) -> str | None:
    """Why a run of so many steps that begins with step `first` is too short, or None."""
    if steps - first >= FEWEST_STEPS:
        return None
    return (
        f"step policies need {FEWEST_STEPS} steps or more, this run has {steps - first}: raise the "
        f"number of steps, or leave the policy out (balanced is the preset fast without one)"
    )


def lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """Weights of values at `nodes` for the polynomial through them at `at`; their sum is 1."""
    return [
        math.prod((at - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """An evaluated step: its place on the axis, and what the scheduler got."""

    index: int
    share: float
    output: torch.Tensor
    sample: torch.Tensor
    estimate: torch.Tensor


class SkipPolicy(StepPolicy):
    """A gate between `from_step` and `to_step`; the first and last three steps are evaluated."""

    reconstruct: Literal["hold", "linear-x0", "three-node"] = option(
        "linear-x0",
        "What stands for a skipped step: the last x0, or a line or parabola through the last ones",
    )
    from_step: float = option(
        0.2, "Share of the steps that are all evaluated at the start", least=0, most=1,
        unit="of the steps",
    )  # fmt: skip
    to_step: float = option(
        1.0, "Share of the steps after which all are evaluated again", least=0, most=1,
        unit="of the steps",
    )  # fmt: skip

    def allows(self, run: SkippingRun, step: Step, sample: torch.Tensor) -> bool:
        """The gate: whether a step in the window may be skipped.

        Args:
            run: the past, with three evaluated steps or more.
            sample: that the step will move.
        """
        raise NotImplementedError

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        check_window(cls(**values))

    def window(self, steps: int) -> range:
        """See `StepPolicy`."""
        first = max(EDGE, at_share(self.from_step, steps))
        return range(first, min(steps - EDGE, at_share(self.to_step, steps)))

    def refuses(self, steps: int, first: int = 0) -> str | None:
        """See `StepPolicy`."""
        short = too_few(steps, first)
        if short or self.window(steps)[-1:]:
            return short
        return (
            f"steps.from_step {self.from_step:g} and steps.to_step {self.to_step:g} leave none of "
            f"{steps} steps to skip: the first and last {EDGE} are always evaluated"
        )

    def start(self, schedule: Schedule) -> StepRun:
        """See `StepPolicy`."""
        return SkippingRun(self, schedule)


class AdaptivePolicy(SkipPolicy):
    """A gate that looks at the run; `max_skip` keeps it from going on for too long."""

    max_skip: int = option(
        1, "Steps that may be skipped one after another", least=0, most=20, unit="steps"
    )

    def computed(self, steps: int, experts: int = 1) -> tuple[int, int]:
        """See `StepPolicy`."""
        del experts
        open_to = len(self.window(steps))
        return steps - open_to + open_to // (self.max_skip + 1), steps


class SkippingRun:
    """One run of a `SkipPolicy`.

    Attributes:
        nodes: the last three evaluated steps, the oldest first.
        skips: steps skipped since.
        miss: by how much the last one evaluated differs from what would have stood for it,
            relative to its output; None before there was enough past.
        reach: how far that prediction had to reach, see `reach_to`.
    """

    def __init__(self, policy: SkipPolicy, schedule: Schedule) -> None:
        self.policy, self.schedule = policy, schedule
        self.nodes: list[Node] = []
        self.skips = 0
        self.miss: torch.Tensor | None = None
        self.reach = 0.0
        self._reaches: list[float] = []
        self._errors: list[torch.Tensor] = []

    def decide(self, step: Step, sample: torch.Tensor | None) -> Decision:
        """See `StepRun`."""
        if sample is None or len(self.nodes) < EDGE:
            return Compute()
        if step.index not in self.policy.window(step.steps):
            return Compute()
        if not self.policy.allows(self, step, sample):
            return self.instead(step)
        predicted = self._predicted(step.index)
        self._reaches.append(self.reach_to(step.index))
        return Skip(self.schedule.output(predicted, sample, step.index))

    def instead(self, step: Step) -> Decision:
        """What is done in a step of the window that is not skipped."""
        del step
        return Compute()

    def observe(
        self, step: Step, output: torch.Tensor, sample: torch.Tensor, *, computed: bool
    ) -> None:
        """See `StepRun`."""
        if not computed:
            self.skips += 1
            return
        share = self.schedule.levels[step.index].share
        if self.nodes and self.nodes[-1].share == share:
            self.nodes.pop()  # evaluated twice at one level, as some samplers begin
        if len(self.nodes) == EDGE:
            would = self.schedule.output(self._predicted(step.index), sample, step.index)
            self.miss = relative_error(would, output)
            self.reach = self.reach_to(step.index)
            self._errors += [self.miss * (it / self.reach) for it in self._reaches]
        estimate = self.schedule.estimate(output, sample, step.index)
        self.nodes = [*self.nodes[1 - EDGE :], Node(step.index, share, output, sample, estimate)]
        self.skips, self._reaches = 0, []

    def errors(self) -> list[float]:
        """See `StepRun`."""
        return [float(it) for it in self._errors]

    def reach_to(self, index: int) -> float:
        """|(t - t_1) (t - t_2) …| for the nodes that serve step `index`.

        The error of a polynomial through them is that times a derivative of what it stands for.
        """
        at = self.schedule.levels[index].share
        return math.prod(abs(at - node.share) for node in self._serving(index)[0])

    def _predicted(self, index: int) -> torch.Tensor:
        nodes, weights = self._serving(index)
        return weighted(weights, [node.estimate for node in nodes])

    def _serving(self, index: int) -> tuple[list[Node], list[float]]:
        """The nodes that a step is told from, and their weights."""
        at = self.schedule.levels[index].share
        nodes = self.nodes[-_NODES[self.policy.reconstruct] :]
        weights = lagrange([it.share for it in nodes], at)
        while sum(map(abs, weights)) > _MOST_WEIGHT:
            nodes = nodes[1:]
            weights = lagrange([it.share for it in nodes], at)
        return nodes, weights


def weighted(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of `values`, each times its weight."""
    total: Any = sum(w * value for w, value in zip(weights, values, strict=True))
    return total


def relative_error(estimate: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """|estimate - truth| / |truth|, a scalar on the device; 0 where both are 0."""
    wide = truth.to(estimate.dtype)
    return (estimate - wide).norm() / wide.norm().clamp_min(torch.finfo(wide.dtype).tiny)
