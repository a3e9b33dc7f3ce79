"""`sign`: SADA's criterion on its own, for any sampler."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..options import option
from ..steps import Compute, Decision, Schedule, Step, StepRun
from .pruning import Pruner, PruningPolicy
from .skipping import AdaptivePolicy, SkippingRun


class Sign(PruningPolicy, AdaptivePolicy):
    """A step is skipped where the curve of the sample bends back towards a straight line.

    With velocities v at the last three evaluated steps, a their second difference and b the first
    one before: stable is a step with <a, b> < kappa |a|². Differences are divided ones in the noise
    level, scaled to the coming step, so that gaps and uneven schedules count as what they are. A
    larger kappa skips more. With `prune` an unstable step runs on the tokens alone where the mean
    of the terms of <a, b> - kappa |a|² is 0 or more, and on one of each cell.

    Source: SADA (arXiv 2507.17135), whose criterion it is, written without the solver's state: for
    an Euler step of flow matching the two are equal with kappa = 1/3.
    Differs from the paper: for all samplers it looks at the velocity of flow matching, to which
    samples of any scale are brought; what stands for a skipped step is the extrapolated x0.
    Differs from the authors' code: its coefficients would make kappa infinite, which always skips.
    """

    name: ClassVar[str] = "sign"
    paper: ClassVar[str] = "arXiv 2507.17135"
    licence: ClassVar[str] = "MIT"
    use_when: ClassVar[str] = (
        "SADA's criterion is wanted with another reconstruction; in 16 bits rounding decides it, "
        "`shadow` is better there."
    )

    kappa: float = option(
        1 / 3, "How much the second difference may follow the first", least=-1000, most=1000
    )

    def start(self, schedule: Schedule) -> StepRun:
        """See `StepPolicy`."""
        return _Run(self, schedule)

    def allows(self, run: SkippingRun, step: Step, sample: torch.Tensor) -> bool:
        """See `SkipPolicy`."""
        if run.skips >= self.max_skip:
            return False
        return stable(*differences(run, step.index), self.kappa)


class _Run(SkippingRun):
    """A run whose unstable steps may be pruned."""

    def __init__(self, policy: Sign, schedule: Schedule) -> None:
        super().__init__(policy, schedule)
        self._kappa, self._pruner = policy.kappa, Pruner(policy)

    def decide(self, step: Step, sample: torch.Tensor | None) -> Decision:
        """See `StepRun`."""
        return self._pruner.decided(super().decide(step, sample))

    def instead(self, step: Step) -> Decision:
        """See `SkippingRun`."""
        # Where no step may be skipped the gate has not looked.
        second, first = differences(self, step.index)
        if stable(second, first, self._kappa):
            return Compute()
        return self._pruner.unstable(
            lambda: second * first - self._kappa * second.square(), skips=self.skips
        )


def differences(run: SkippingRun, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the velocity at the last three nodes, the second and the first one before, by step."""
    schedule = run.schedule
    h = abs(schedule.levels[index - 1].share - schedule.levels[index].share)
    (t0, v0), (t1, v1), (t2, v2) = (
        (node.share, schedule.velocity(node.estimate, node.sample, node.index))
        for node in run.nodes
    )
    early, late = (v1 - v0) / (t1 - t0), (v2 - v1) / (t2 - t1)
    return 2 * h * h * (late - early) / (t2 - t0), -h * early


def stable(second: torch.Tensor, first: torch.Tensor, kappa: float) -> bool:
    """<second, first> < kappa |second|²."""
    inner = torch.linalg.vecdot(second.flatten(), first.flatten())
    return bool(inner < kappa * torch.linalg.vecdot(second.flatten(), second.flatten()))
