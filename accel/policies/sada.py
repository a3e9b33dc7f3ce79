"""`sada`: stability decides from step to step, later ones are interpolated."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..codec import Codec, wide
from ..options import option
from ..steps import Compute, Decision, Schedule, Skip, Step, StepRun
from .pruning import Pruner, PruningPolicy
from .sign import stable
from .skipping import EDGE, at_share, check_window, lagrange, relative_error, too_few, weighted

_LAST, _BEFORE, _FIRST = 5 / 6, 5 / 6, -2 / 3
"""Of the derivatives y_i, y_{i-1} and y_{i-2} in the third-order estimate; they sum to 1."""
_IMAGES, _FLOW = (0.48, 4), (0.4, 3)
"""The paper's Lagrange step, as a share, and terms: SD 2 and SDXL; Flux."""


class Sada(PruningPolicy):
    """A step is skipped where the solver's own curve is stable; later ones are told from x0s.

    y is the derivative of the sample by time: (beta / 2) (noise / sigma - x) for diffusions, the
    velocity for flow matching. From step i to i + 1 it gives a third-order estimate x^ = x - h (5/6
    y_i + 5/6 y_{i-1} - 2/3 y_{i-2}); i + 1 is stable where <x_{i+1} - x^, y_i - 2 y_{i-1} +
    y_{i-2}> < 0, with x_{i+1} as the solver has left it. Then the last noise (or velocity) is kept,
    and x0 is that of x^ with it. From `lagrange_step` on all but every `lagrange_every`-th step are
    skipped, x0 being that of the polynomial in time through the last `lagrange_terms` kept ones.
    With `prune` an unstable step before that runs on the tokens alone where the mean of the
    product's terms is 0 or more, and on one of each cell; it is evaluated whole after a skip.

    Source: SADA (arXiv 2507.17135). Time is that of the diffusion, from 1 to 0, with beta its
    continuous rate; of flow matching it is sigma.
    Differs from the paper: `prune` is to be asked for, and is not bounded by a number of tokens;
    the last block's output is kept alone, which comes to the same as that of each block; step
    numbers are shares of the steps, so that a recipe serves any number of them; the last two steps
    are always evaluated, in short runs too. Differs from the authors' code: beta is of the
    same time as h, theirs steps over one training step however few are left; the coefficients are
    the paper's, theirs make every Euler step stable; flow matching goes by the same criterion and
    the same interpolation, theirs takes the mean of the second difference and holds the velocity;
    kept tokens have their own places in the picture, theirs are numbered anew on a smaller grid.
    """

    name: ClassVar[str] = "sada"
    paper: ClassVar[str] = "arXiv 2507.17135"
    licence: ClassVar[str] = "MIT"
    use_when: ClassVar[str] = "the method as published is wanted, in runs of about 50 steps."

    from_step: float = option(
        0.2, "Share of the steps after which steps may be skipped", least=0, most=1,
        unit="of the steps",
    )  # fmt: skip
    to_step: float = option(
        0.94, "Share of the steps up to which they may", least=0, most=1, unit="of the steps"
    )
    max_interval: int = option(
        4, "Steps that may be skipped one after another", least=0, most=20, unit="steps"
    )
    lagrange_step: float = option(
        0.0, "Share of the steps from which x0 is interpolated; 1 is never, 0 as in the paper: "
        "0.48, and 0.4 of flow matching", least=0, most=1, unit="of the steps",
    )  # fmt: skip
    lagrange_every: int = option(
        4, "Of so many steps one is evaluated there", least=1, most=20, unit="steps"
    )
    lagrange_terms: int = option(
        0, "How many x0s it goes through; 0 as in the paper: 4, and 3 of flow matching",
        least=0, most=8,
    )  # fmt: skip

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        check_window(cls(**values))

    def window(self, steps: int) -> range:
        """See `StepPolicy`: the one after the first that may decide, and so on."""
        first = max(EDGE, at_share(self.from_step, steps))
        return range(first + 1, min(at_share(self.to_step, steps), steps - EDGE) + 1)

    def refuses(self, steps: int, first: int = 0) -> str | None:
        """See `StepPolicy`."""
        short = too_few(steps, first)
        if short or self.window(steps)[-1:]:
            return short
        return (
            f"steps.from_step {self.from_step:g} and steps.to_step {self.to_step:g} leave none of "
            f"{steps} steps to skip: the first {EDGE + 1} and the last two are always evaluated"
        )

    def needs_x0(self) -> bool:
        """See `StepPolicy`."""
        return True

    def lagrange_from(self, steps: int, *, flow: bool) -> int:
        """The step after which x0 is interpolated: a multiple of `lagrange_every`."""
        share = self.lagrange_step or (_FLOW if flow else _IMAGES)[0]
        if share >= 1:
            return steps
        return -(-at_share(share, steps) // self.lagrange_every) * self.lagrange_every

    def terms(self, *, flow: bool) -> int:
        """How many x0s the polynomial goes through."""
        return self.lagrange_terms or (_FLOW if flow else _IMAGES)[1]

    def keeps(self, index: int) -> bool:
        """Whether x0 of a step is kept for the polynomial; later on these alone are evaluated."""
        return index % self.lagrange_every == 1 % self.lagrange_every

    def computed(self, steps: int, experts: int = 1) -> tuple[int, int]:
        """See `StepPolicy`."""
        window, counts = self.window(steps), list[int]()
        for flow, calm in ((True, True), (False, False)):
            start, skips, count = self.lagrange_from(steps, flow=flow), 0, 0
            for index in range(steps):
                late = index > start
                may = index in window and skips < self.max_interval
                skipped = may and (not self.keeps(index) if late else calm)
                skips, count = (skips + 1, count) if skipped else (0, count + 1)
            counts.append(count)
        # Until a denoiser has three derivatives, and two kept x0s of its own.
        anew = max(EDGE, 2 * self.lagrange_every)
        return counts[0], min(steps, counts[1] + anew * (experts - 1))

    def start(self, schedule: Schedule) -> StepRun:
        """See `StepPolicy`."""
        return _Run(self, schedule)


class _Run:
    """One run: the last three derivatives, the sample before and the x0s that are kept."""

    def __init__(self, policy: Sada, schedule: Schedule) -> None:
        self.policy, self.schedule = policy, schedule
        steps, flow = len(schedule.levels), schedule.flow
        self.window = policy.window(steps)
        self.start = policy.lagrange_from(steps, flow=flow)
        self.kept = deque[tuple[float, torch.Tensor]](maxlen=policy.terms(flow=flow))
        self.slopes = deque[torch.Tensor](maxlen=3)
        self.sample: torch.Tensor | None = None
        self.held: torch.Tensor | None = None
        """Noise or velocity of the last evaluated step, as `codec` says."""
        assert schedule.codec is not None
        told = schedule.codec.prediction
        self.codec = Codec("epsilon") if told == "sample" else schedule.codec
        self.skips = 0
        self._pruner = Pruner(policy)
        self._reaches: list[tuple[bool, float]] = []
        self._errors: list[torch.Tensor] = []

    def decide(self, step: Step, sample: torch.Tensor | None) -> Decision:
        """See `StepRun`."""
        return self._pruner.decided(self._decided(step, sample))

    def _decided(self, step: Step, sample: torch.Tensor | None) -> Decision:
        if sample is None or len(self.slopes) < 3 or step.index not in self.window:
            return Compute()
        if self.skips >= self.policy.max_interval:
            return Compute()
        index = step.index
        if index > self.start:
            if self.policy.keeps(index) or not self._enough:
                return Compute()
            self._reaches.append(self._reach(index))
            return Skip(self.schedule.output(self._interpolated(index), sample, index))
        y2, y1, y0 = self.slopes
        estimate = self._estimated(index)
        second, gap = y0 - 2 * y1 + y2, self._scaled(sample, index) - estimate
        if not stable(second, gap, kappa=0):
            return self._pruner.unstable(lambda: second * gap, skips=self.skips)
        self._reaches.append(self._reach(index))
        return Skip(self.schedule.output(self._x0(estimate, index), sample, index))

    def observe(
        self, step: Step, output: torch.Tensor, sample: torch.Tensor, *, computed: bool
    ) -> None:
        """See `StepRun`."""
        index, schedule = step.index, self.schedule
        x0 = schedule.estimate(output, sample, index)
        if computed:
            self._measure(output, sample, index)
            self.held = output if self.codec == schedule.codec else self._noise(x0, sample, index)
        self.slopes.append(self._slope(sample, index))
        if self.policy.keeps(index):
            if self.kept and self.kept[-1][0] == schedule.levels[index].time:
                self.kept.pop()  # evaluated twice at one time, as some samplers begin
            self.kept.append((schedule.levels[index].time, x0))
        self.sample = self._scaled(sample, index)
        self.skips = 0 if computed else self.skips + 1

    def _measure(self, output: torch.Tensor, sample: torch.Tensor, index: int) -> None:
        """Estimate the errors of the steps skipped before this one."""
        if not self._reaches:
            return
        late, reach = self._reach(index)
        would = self._interpolated(index) if late else self._x0(self._estimated(index), index)
        miss = relative_error(self.schedule.output(would, sample, index), output)
        # Of the other rule the distances are not to be compared.
        self._errors += [miss * (it / reach if late == was else 1) for was, it in self._reaches]
        self._reaches = []

    def errors(self) -> list[float]:
        """See `StepRun`."""
        return [float(it) for it in self._errors]

    @property
    def _enough(self) -> bool:
        """Whether a polynomial goes through two kept x0s, or through one where it is of one."""
        return len(self.kept) >= min(2, self.kept.maxlen or 0)

    def _reach(self, index: int) -> tuple[bool, float]:
        """Whether a step is interpolated, and a distance to which its error is proportional."""
        if index <= self.start or not self._enough:
            return False, self.skips + 1
        at = self.schedule.levels[index].time
        return True, math.prod(abs(at - time) for time, _ in self.kept)

    def _slope(self, sample: torch.Tensor, index: int) -> torch.Tensor:
        """y: the derivative of the sample, in the scale of the equation, by `Level.time`."""
        level, scaled = self.schedule.levels[index], self._scaled(sample, index)
        x0 = self._x0(scaled, index)
        if self.schedule.flow:
            return self.schedule.velocity(x0, sample, index)
        sigma = level.sigma / self._scale(index)
        return level.rate / 2 * (self._noise(x0, sample, index) / sigma - scaled)

    def _scale(self, index: int) -> float:
        """Of the sampler's sample against that of the equation, whose variance is constant."""
        level = self.schedule.levels[index]
        return 1.0 if self.schedule.flow else (level.alpha**2 + level.sigma**2) ** 0.5

    def _scaled(self, sample: torch.Tensor, index: int) -> torch.Tensor:
        return wide(sample) / self._scale(index)

    def _noise(self, x0: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        level = self.schedule.levels[index]
        return (wide(sample) - level.alpha * x0) / level.sigma

    def _estimated(self, index: int) -> torch.Tensor:
        """x^ of a step, in the scale of the equation."""
        assert self.sample is not None
        y2, y1, y0 = self.slopes
        levels = self.schedule.levels
        h = levels[index - 1].time - levels[index].time
        return self.sample - h * (_LAST * y0 + _BEFORE * y1 + _FIRST * y2)

    def _x0(self, scaled: torch.Tensor, index: int) -> torch.Tensor:
        """x0 of a sample, in the scale of the equation, with the noise or velocity that is held."""
        assert self.held is not None
        sample = scaled * self._scale(index)
        return self.codec.x0(self.held, sample, self.schedule.levels[index])

    def _interpolated(self, index: int) -> torch.Tensor:
        """x0 by the polynomial in time through those that are kept."""
        times = [time for time, _ in self.kept]
        weights = lagrange(times, self.schedule.levels[index].time)
        return weighted(weights, [x0 for _, x0 in self.kept])
