"""Attention methods, and those that change when or how another one runs.

A method holds options and no state. What must be remembered within a run (`Reuse`) lives in the
planner that `start` makes for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch

from ..kernels.plan import BlockPlan, Tail, Tile
from ..kernels.precision import INPUT, Precision
from .options import Options, option, options_of
from .site import Site

Planner = Callable[[torch.Tensor, torch.Tensor, Site], BlockPlan | None]
"""`plan` for the calls of one run."""


class AttentionMethod(Options):
    """Which keys each query attends to, decided before attention from `q`, `k` and the site."""

    name: ClassVar[str] = ""
    """As recipes spell it."""
    paper: ClassVar[str] = ""

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """The plan of one call, or None where it shall be dense.

        Args:
            q, k: `[B, H, L, D]`, L = `site.tokens`, after norms and rotary embedding.
        """
        raise NotImplementedError

    def predict(self, site: Site) -> float:
        """The density that `plan` will execute there; 1 where it is dense."""
        raise NotImplementedError

    def tiling(self) -> tuple[Tile, Tail]:
        """What its plans are made of."""
        raise NotImplementedError

    def precision(self) -> Precision:
        """In which its plans are computed; calls that run dense are the model's own."""
        return INPUT

    def kept_plans(self, batch: int) -> int:
        """Plans of a layer held from step to step, for `batch` items in all guidance branches."""
        del batch
        return 0

    def start(self) -> Planner:
        """A planner for one run."""
        return self.plan

    def why_dense(self, site: Site) -> str:
        """Why `plan` gives None there, in words that follow "dense …"."""
        del site
        return f"by {self.name}"

    def words(self) -> str:
        """The method and its options, in words."""
        names = [it.name for it in options_of(type(self))]
        values = {name.replace("_", " "): getattr(self, name) for name in names}
        # What is off is not said.
        told = ", ".join(
            name if value is True else f"{name} {_short(value)}"
            for name, value in values.items()
            if value is not False
        )
        return f"{self.name} ({told})" if told else self.name


class Wrapper(AttentionMethod):
    """A method that changes when or how another one runs, and is that one in all else."""

    method: AttentionMethod

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`; without memory."""
        return self.method.plan(q, k, site)

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.method.predict(site)

    def tiling(self) -> tuple[Tile, Tail]:
        """See `AttentionMethod`."""
        return self.method.tiling()

    def precision(self) -> Precision:
        """See `AttentionMethod`."""
        return self.method.precision()

    def kept_plans(self, batch: int) -> int:
        """See `AttentionMethod`."""
        return self.method.kept_plans(batch)

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        return self.method.start()

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        return self.method.why_dense(site)


class Quantised(Wrapper):
    """Another method whose products are multiplied in fewer bits.

    Which tiles are kept is chosen from the numbers as they come, and calls that run dense stay in
    the model's own precision. Backpropagation, and what no kernel of the device multiplies so, is
    left to the reference, which rounds alike and is slow; where it is predicted to lose, a recipe
    for `faster` runs dense and says so. `kernels.precision` says how each is rounded.

    Source: SageAttention (arXiv 2410.02367, 2411.10958); pv in whole numbers: PAROAttention (arXiv
    2506.16054).
    """

    name: ClassVar[str] = "quantised"

    qk: Literal["input", "int8", "int4"] = option(
        "input", "Of calls that are not dense: in what queries and keys are multiplied"
    )
    pv: Literal["input", "int8", "int4", "fp8"] = option(
        "input", "Of calls that are not dense: in what weights and values are multiplied"
    )

    def precision(self) -> Precision:
        """See `AttentionMethod`."""
        return Precision(self.qk, self.pv)

    def words(self) -> str:
        """See `AttentionMethod`."""
        told = [self.method.words()]
        if self.qk != "input":
            told.append(f"queries and keys in {self.qk}")
        if self.pv != "input":
            told.append(f"weights and values in {self.pv}")
        return ", ".join(told)


class Within(Wrapper):
    """Another method in a window of steps and layers, dense outside of it.

    Early steps decide the composition and first layers look everywhere: most papers keep both
    dense. Steps are shares of the schedule, so that one recipe serves any number of them.
    """

    name: ClassVar[str] = "within"

    from_step: float = option(
        0.0, "Share of the steps that stay dense at the start", least=0, most=1, unit="of the steps"
    )
    to_step: float = option(
        1.0,
        "Share of the steps after which it is dense again",
        least=0,
        most=1,
        unit="of the steps",
    )
    from_layer: int = option(
        0, "Layers that stay dense at the start", least=0, most=1000, unit="layers"
    )

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        return self.method.plan(q, k, site) if self.covers(site) else None

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.method.predict(site) if self.covers(site) else 1.0

    def covers(self, site: Site) -> bool:
        """Whether the site lies in the window."""
        # A little more, so that 0.2 of 50 steps are ten of them, whatever 0.2 * 50 is in binary.
        step = site.step + 1e-6
        return (
            self.from_step * site.steps <= step < self.to_step * site.steps
            and site.layer >= self.from_layer
        )

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        inner = self.method.start()
        return lambda q, k, site: inner(q, k, site) if self.covers(site) else None

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        if self.covers(site):
            return self.method.why_dense(site)
        if site.step + 1e-6 < self.from_step * site.steps:
            return f"in the first {self.from_step:.0%} of the steps"
        if site.layer < self.from_layer:
            return f"in the first {self.from_layer} layers"
        return f"after {self.to_step:.0%} of the steps"

    def words(self) -> str:
        """See `AttentionMethod`."""
        told = [self.method.words()]
        if self.from_step > 0:
            told.append(f"after {self.from_step:.0%} of the steps")
        if self.to_step < 1:
            told.append(f"until {self.to_step:.0%} of them")
        if self.from_layer:
            told.append(f"from layer {self.from_layer} on")
        return ", ".join(told)


class Reuse(Wrapper):
    """Another method whose plan is made at every `every`-th step and kept in between.

    A plan is kept per denoiser and layer, has what each head has chosen, and is made anew when the
    tokens change. With `branches = "shared"` what the call with the prompt has chosen serves the
    others of the step too: where guidance is in calls of its own these are the later ones, where it
    is in the batch the first part of it, from the second step on, when that is known.

    Source: SparseD (arXiv 2509.24014), whose pattern is made once after a dense fifth of the steps:
    `every = 0` and `from_step = 0.2`, with x-attention's `threshold = 0`, `stride = 1` and
    `least = 0.3` for its share of the tiles by exact attention. Differs from it: the plan is made
    at the first step that uses it instead of the last dense one; text is always kept, where
    SparseD gives the prompt a share of its own; sharing between branches is ours.
    """

    name: ClassVar[str] = "reuse"

    every: int = option(
        1, "Steps for which a plan is kept; 0 keeps it to the end", least=0, most=1000, unit="steps"
    )
    branches: Literal["own", "shared"] = option(
        "own", "Whether guidance branches choose for themselves or the prompt's for all"
    )

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        inner = self.method.start()
        kept: dict[Any, tuple[int, int, BlockPlan | None]] = {}

        def plan(q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
            shared = self.branches == "shared"
            parts = site.branches if shared else 1
            branch = 0 if shared else site.branch
            key = (site.expert, site.layer, branch, site.grid, site.text, q.shape[0])
            made, of, found = kept.get(key, (-1, 0, None))
            if of != parts or (self.every and site.step - made >= self.every):
                first = q.shape[0] - q.shape[0] // parts
                found = inner(q[first:], k[first:], site)
                found = found and found.repeated(parts)
                kept[key] = site.step, parts, found
            return found

        return plan

    def kept_plans(self, batch: int) -> int:
        """See `AttentionMethod`."""
        if self.every == 1 and self.branches == "own":
            return 0
        return batch if self.branches == "own" else -(-batch // 2)

    def words(self) -> str:
        """See `AttentionMethod`."""
        told = [self.method.words()]
        if self.every != 1:
            span = f"for {self.every} steps" if self.every else "to the end"
            told.append(f"each plan kept {span}")
        if self.branches == "shared":
            told.append("one for all guidance branches")
        return ", ".join(told)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
