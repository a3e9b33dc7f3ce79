"""What a session remembers of one run, and the receipt that comes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from ..method import Planner
from ..receipt import AttentionReceipt
from ..steps import Compute, Skip, Step, StepRun


@dataclass
class Run:
    """From one `set_timesteps` to the next."""

    planner: Planner | None
    policy: StepRun | None
    steps: int
    first: int = 0
    """Where in the schedule it begins: an image that is changed starts in the middle."""
    done: int = 0
    branch: int = 0
    forwards: int = 0
    batch: int = 0
    """Items of the step's first call of a denoiser."""
    branches: int = 1
    """Guidance branches in that batch, see `Site`."""
    skipped: int = 0
    decision: Compute | Skip | None = None
    """For the step that runs; None until it is asked."""
    _kernels: Counter[str] = field(default_factory=Counter[str])
    _dense: Counter[str] = field(default_factory=Counter[str])
    _dense_kernels: Counter[str] = field(default_factory=Counter[str])
    _fallbacks: dict[str, None] = field(default_factory=dict[str, None])
    _calls: dict[int, list[tuple[int, torch.Tensor | float]]] = field(
        default_factory=dict[int, list[tuple[int, torch.Tensor | float]]]
    )
    """By layer: pairs of tokens and the density of each call."""

    @property
    def over(self) -> bool:
        """Whether the last step is done: what comes then belongs to no run."""
        return self.first + self.done >= self.steps

    @property
    def step(self) -> Step:
        """The step that runs."""
        return Step(self.first + self.done, self.steps)

    def decide(self) -> Compute | Skip:
        """What the policy wants of the step that runs."""
        if self.decision is None:
            self.decision = self.policy.decide(self.step) if self.policy else Compute()
        return self.decision

    def finish_step(self, output: torch.Tensor, sample: torch.Tensor) -> None:
        """The scheduler got `output` for `sample`: the step is done."""
        skipped = isinstance(self.decision, Skip)
        if self.policy is not None:
            self.policy.observe(self.step, output, sample, computed=not skipped)
        self.skipped += skipped
        if self.branch == 1 and self.batch % sample.shape[0] == 0:
            self.branches = self.batch // sample.shape[0]
        self.done, self.branch, self.decision = self.done + 1, 0, None

    def ran(self, layer: int, kernel: str, density: torch.Tensor, *, pairs: int) -> None:
        """Note a sparse call of `pairs` of tokens.

        `density` is a scalar and read at the end, for the device's sake.
        """
        self._kernels[kernel] += 1
        self._calls.setdefault(layer, []).append((pairs, density))

    def ran_dense(
        self, layer: int, reason: str, *, fallback: bool, pairs: int, kernel: str
    ) -> None:
        """Note a dense call, whether the recipe did not ask for it, and its kernel."""
        if kernel != "stock":
            self._dense_kernels[kernel] += 1
        self._dense[reason] += 1
        if fallback:
            self._fallbacks[reason] = None
        self._calls.setdefault(layer, []).append((pairs, 1.0))

    def receipt(self, asked: str, precision: str, layers: list[str]) -> AttentionReceipt:
        """What happened so far, in the attention modules of these names."""
        found = {
            layer: [(pairs, float(density)) for pairs, density in calls]
            for layer, calls in self._calls.items()
        }
        every = [call for calls in found.values() for call in calls]
        return AttentionReceipt(
            asked=asked,
            layers=len(layers),
            calls=self._kernels.total() + self._dense.total(),
            kernels=dict(self._kernels),
            precision=precision,
            dense=dict(self._dense),
            fallbacks=list(self._fallbacks),
            density=_mean(every) if every else 1.0,
            density_by_layer=[
                _mean(found[layer]) if layer in found else None for layer in range(len(layers))
            ],
            layer_names=layers,
            dense_kernels=dict(self._dense_kernels),
        )


def _mean(calls: list[tuple[int, float]]) -> float:
    """The density of several calls together."""
    pairs = sum(pairs for pairs, _ in calls)
    return round(sum(pairs * density for pairs, density in calls) / pairs, 4)
