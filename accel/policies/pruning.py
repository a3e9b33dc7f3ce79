"""Token-wise pruning: an unstable step is evaluated on a part of its tokens.

Of the others there stands what came out of the last whole evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..options import option
from ..steps import Compute, Decision, Prune, StepPolicy


class PruningPolicy(StepPolicy):
    """A policy with a criterion that can also be read token by token."""

    prune: bool = option(
        False, "Evaluate unstable steps on their unstable tokens, and one of each cell, alone"
    )
    prune_cell: int = option(
        3, "Side of the cells in each of which one token, drawn anew in each step, is kept; 1 "
        "keeps all", least=1, most=64, unit="tokens",
    )  # fmt: skip
    prune_interval: int = option(
        4, "Of so many unstable steps in a row the last is evaluated whole", least=2, most=20,
        unit="steps",
    )  # fmt: skip
    prune_threshold: float = option(
        0.0, "Score from which a token is unstable, in means of the scores' magnitudes; a higher "
        "one keeps fewer", least=-100, most=100,
    )  # fmt: skip

    def prunes(self) -> bool:
        """See `StepPolicy`."""
        return self.prune

    def unsaid(self) -> set[str]:
        """See `Named`."""
        own = {"prune_cell", "prune_interval", "prune_threshold"}
        return set() if self.prune else own


class Pruner:
    """How far a run has gone since its last whole evaluation."""

    def __init__(self, policy: PruningPolicy) -> None:
        self.policy = policy
        self._pruned = 0

    def unstable(self, scores: Callable[[], torch.Tensor], *, skips: int) -> Decision:
        """What is done in an unstable step that comes after `skips` skipped ones.

        `scores` tells the criterion before it is summed, see `Prune`.
        """
        policy = self.policy
        if not policy.prune or skips or self._pruned + 1 >= policy.prune_interval:
            return Compute()
        return Prune(scores(), policy.prune_cell, policy.prune_threshold)

    def decided(self, decision: Decision) -> Decision:
        """The same decision, noted."""
        self._pruned = self._pruned + 1 if isinstance(decision, Prune) else 0
        return decision
