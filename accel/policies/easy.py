"""`easy`: EasyCache's foretold change of the output."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..codec import wide
from ..options import option
from ..steps import Step
from .skipping import AdaptivePolicy, SkippingRun


class Easy(AdaptivePolicy):
    """A step is skipped while the sample has moved too little to change the output much.

    From the last two evaluated steps comes how much the output changes with the sample, k =
    |dm| / |dx|; foretold for a step is k |x - x'| / |m'|, with x' and m' those of the last
    evaluated one. All are sums of magnitudes.

    Source: EasyCache (arXiv 2507.02860).
    Differs from the paper: what is measured and predicted is the guided output, once for all
    guidance branches, where it decides by the call with the prompt and keeps an offset for each;
    the distance is from the last evaluated step at once, where it adds up those of single steps;
    what stands for a skipped step is the extrapolated x0, where it adds the last output less input
    to the input; `max_skip` bounds it.
    """

    name: ClassVar[str] = "easy"
    paper: ClassVar[str] = "arXiv 2507.02860"
    licence: ClassVar[str] = "none stated in its README"
    use_when: ClassVar[str] = "outputs change little from step to step, as in long schedules."

    threshold: float = option(
        0.1, "Change of the output, relative to it, up to which it is foretold", least=0, most=10
    )
    max_skip: int = option(
        3, "Steps that may be skipped one after another", least=0, most=20, unit="steps"
    )

    def allows(self, run: SkippingRun, step: Step, sample: torch.Tensor) -> bool:
        """See `SkipPolicy`."""
        if run.skips >= self.max_skip:
            return False

        def scaled(x: torch.Tensor, index: int) -> torch.Tensor:
            level = run.schedule.levels[index]
            return wide(x) / (level.alpha + level.sigma)

        *_, before, last = run.nodes
        x = scaled(last.sample, last.index)
        moved = _sum(scaled(sample, step.index) - x)
        turned = _sum(wide(last.output) - wide(before.output))
        past = _sum(x - scaled(before.sample, before.index)) * _sum(wide(last.output))
        return bool(turned * moved < self.threshold * past)


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.abs().sum()
