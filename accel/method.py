"""Attention methods, and the two that change when another one is asked.

A method holds options and no state. What must be remembered within a run (`Reuse`) lives in the
planner that `start` makes for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..kernels.plan import BlockPlan, Tail, Tile
from .options import Options, option, options_of
from .site import Site

Planner = Callable[[torch.Tensor, torch.Tensor, Site], BlockPlan | None]
"""`plan` for the calls of one run."""


class AttentionMethod(Options):
    """Which keys each query attends to, decided before attention from `q`, `k` and the site."""

    name: ClassVar[str] = ""
    """As recipes spell it."""
    paper: ClassVar[str] = ""
    """With its arXiv number; a docstring tells the rest, see `facts`."""
    licence: ClassVar[str] = ""
    """Of the authors' code, of which nothing is copied here; follows "theirs: "."""
    use_when: ClassVar[str] = ""
    """When to choose it, in words that follow "where "."""

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

    def refuses(self, weights: Callable[[], str]) -> str | None:
        """Why it cannot serve a model, or None; `weights` finds out the fingerprint of its own."""
        del weights
        return None

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
        told = ", ".join(f"{it.replace('_', ' ')} {_short(getattr(self, it))}" for it in names)
        return f"{self.name} ({told})" if told else self.name


class Wrapper(AttentionMethod):
    """A method that changes when another one is asked, and is that one in all else."""

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

    def refuses(self, weights: Callable[[], str]) -> str | None:
        """See `AttentionMethod`."""
        return self.method.refuses(weights)

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        return self.method.start()

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        return self.method.why_dense(site)


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

    Source: sharing masks over steps, SparseD (arXiv 2509.24014) and others. A plan is kept per
    denoiser, layer and guidance branch and made anew when the tokens change.
    """

    name: ClassVar[str] = "reuse"

    every: int = option(1, "Steps for which a plan is kept", least=1, most=1000, unit="steps")

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        inner = self.method.start()
        kept: dict[Any, tuple[int, BlockPlan | None]] = {}

        def plan(q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
            key = (site.expert, site.layer, site.branch, site.grid, site.text, q.shape[0])
            if key not in kept or site.step - kept[key][0] >= self.every:
                kept[key] = site.step, inner(q, k, site)
            return kept[key][1]

        return plan

    def words(self) -> str:
        """See `AttentionMethod`."""
        return f"{self.method.words()}, each plan kept for {self.every} steps"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
