"""`shadow`: skips while the error that it has measured on itself stays small."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..options import option
from ..steps import Step
from .skipping import AdaptivePolicy, SkippingRun


class Shadow(AdaptivePolicy):
    """A step is skipped where its error, foretold from the last one measured, is below a threshold.

    Each evaluated step first tells what would have stood for it: e = |predicted - computed| /
    |computed| costs nothing but a norm. Such an error is a derivative times the product of the
    distances to the nodes; the product is known for the coming step too, and the derivative is
    taken to stay.

    Source: ours; no paper.
    """

    name: ClassVar[str] = "shadow"
    use_when: ClassVar[str] = (
        "quality comes first: a network that is hard to foretell is evaluated more often, and the "
        "error that is told at the end is the one that was kept down."
    )

    threshold: float = option(
        0.03, "Error of a skipped step, relative to its output, that is allowed", least=0, most=10
    )

    def allows(self, run: SkippingRun, step: Step, sample: torch.Tensor) -> bool:
        """See `SkipPolicy`."""
        if run.skips >= self.max_skip or run.miss is None:
            return False
        return float(run.miss) * run.reach_to(step.index) < self.threshold * run.reach
