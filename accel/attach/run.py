"""What a session remembers of one run, and the receipt that comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..method import Planner
from ..receipt import AttentionReceipt, StepsReceipt
from ..steps import Compute, Decision, Prune, Schedule, Skip, Step, StepPolicy, StepRun
from .denoisers import Denoiser

_INERT = "no step was pruned: none was unstable right after one that was evaluated"


@dataclass
class Run:
    """From one `set_timesteps` to the next."""

    planner: Planner | None
    policy: StepPolicy | None
    steps: int
    agree: Callable[[Decision], Decision] | None = None
    """Makes decisions those of all processes that share the run."""
    begun: bool = False
    """Whether something was called."""
    first: int = 0
    """Where in the schedule it begins: an image that is changed starts in the middle."""
    schedule: Schedule | None = None
    """What a policy must know of it; None before the first call."""
    sample: torch.Tensor | None = None
    """As the last step has left it."""
    done: int = 0
    branch: int = 0
    forwards: int = 0
    denoiser: Denoiser | None = None
    """That was called last."""
    batch: int = 0
    """Items of the step's first call of a denoiser."""
    branches: int = 1
    """Guidance branches in that batch, see `Site`."""
    evaluated_calls: int = 0
    pattern: str = ""
    """A letter for each step that is done: C evaluated, p on some tokens alone, s skipped."""
    tokens: tuple[int, int] = (0, 0)
    """In steps of the letter p: those that blocks ran on, and all."""
    cache_bytes: int = 0
    """Of tokens that were kept for such steps, at most."""
    decision: Decision | None = None
    """For the step that runs; None until it is asked."""
    _turns: list[StepRun] = field(default_factory=list[StepRun])
    """Of the policy, one for each turn of a denoiser: what one did says nothing of the other."""
    _expert: int | None = None
    """Whose turn it is."""
    _began: int = 0
    """The step with which the turn began."""
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

    @property
    def skipped(self) -> int:
        """Steps so far for which no denoiser was evaluated."""
        return self.pattern.count("s")

    @property
    def pruned(self) -> int:
        """Steps so far that were evaluated on some tokens alone."""
        return self.pattern.count("p")

    @property
    def inert(self) -> str:
        """Why a policy that prunes pruned nothing in the whole run; else empty."""
        asked = self.policy is not None and self.policy.prunes()
        return _INERT if asked and self.over and not self.pruned else ""

    @property
    def never_sparse(self) -> str:
        """Why no attention of the whole run was sparse, though a method was asked; else empty.

        Empty too where steps were left out, which may be those that it was asked in.
        """
        asked = self.planner is not None and self.over and not self.skipped and not self.pruned
        if not asked or self._kernels:
            return ""
        return "; ".join(self._dense)

    def take_turn(self, expert: int) -> None:
        """It is the turn of the denoiser of this number."""
        if self.policy is None or expert == self._expert:
            return
        assert self.schedule is not None
        self._turns.append(self.policy.start(self.schedule))
        self._expert, self._began = expert, self.done
        self.decision = None

    def decide(self) -> Decision:
        """What the policy wants of the step that runs; the first of a turn is evaluated."""
        if self.decision is None:
            asked = self._turns and self.done > self._began
            self.decision = self._turns[-1].decide(self.step, self.sample) if asked else Compute()
            if asked and self.agree is not None:
                self.decision = self.agree(self.decision)
        return self.decision

    def finish_step(self, output: torch.Tensor, sample: torch.Tensor) -> None:
        """The scheduler got `output` for `sample`: the step is done."""
        skipped = isinstance(self.decision, Skip)
        if self._turns:
            self._turns[-1].observe(self.step, output, sample, computed=not skipped)
        self.pattern += "s" if skipped else "p" if isinstance(self.decision, Prune) else "C"
        self.evaluated_calls += 0 if skipped else self.branch
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

    def steps_receipt(self) -> StepsReceipt | None:
        """What the policy did so far."""
        if self.policy is None:
            return None
        errors = [error for turn in self._turns for error in turn.errors()]
        return StepsReceipt(
            asked=self.policy.words(),
            pattern=self.pattern,
            evaluations=self.done - self.skipped,
            calls=self.evaluated_calls,
            mean_error=sum(errors) / len(errors) if errors else None,
            max_error=max(errors, default=None),
            raw=self.schedule.why_raw if self.schedule else "",
            kept=self.tokens[0] / self.tokens[1] if self.tokens[1] else None,
            cache_bytes=self.cache_bytes,
            inert=self.inert,
        )

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
