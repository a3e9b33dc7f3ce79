"""Attention methods, and what those that change another one have in common; see `wrappers`.

A method holds options and no state. What must be remembered within a run lives in the planner that
`start` makes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from ..kernels.merging import KeyMerge
from ..kernels.plan import BlockPlan, Tail, Tile
from ..kernels.precision import INPUT, Precision
from .named import Named
from .site import Site

Plan = BlockPlan | KeyMerge
"""What a method makes of a call that is not dense: tiles to keep, or keys that become one."""
Planner = Callable[["torch.Tensor", "torch.Tensor", Site], Plan | None]
"""`plan` for the calls of one run."""


class AttentionMethod(Named):
    """Which keys each query attends to, decided before attention from `q`, `k` and the site."""

    quantises: ClassVar[bool] = True
    """Whether its plans can be computed in other precisions than the input's."""

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
        """The plan of one call, or None where it shall be dense.

        Args:
            q, k: `[B, H, L, D]`, L = `site.tokens`, after norms and rotary embedding.
        """
        raise NotImplementedError

    def predict(self, site: Site) -> float:
        """The density that `plan` will execute there; 1 where it is dense."""
        raise NotImplementedError

    def computed(self, site: Site) -> float:
        """The share of the pairs of tokens in tiles that are computed there.

        More than `predict` where plans mask tokens within tiles, and only there.
        """
        return self.predict(site)

    def tiling(self) -> tuple[Tile, Tail] | None:
        """What its plans are made of; None: of merged keys."""
        raise NotImplementedError

    def beside(self) -> float:
        """Pairs of tokens that are computed beside those of its plans, as a share of all."""
        return 0.0

    def precision(self) -> Precision:
        """In which its plans are computed; calls that run dense are the model's own."""
        return INPUT

    def masks(self, heads: int) -> int:
        """Masks of tokens that a plan holds for each item of a batch; 0: one for all that there is.

        Counted where `computed` says that there are any.
        """
        del heads
        return 0

    def orders(self, heads: int) -> int:
        """Orders of tokens that a plan holds; 0: one for all that there is."""
        del heads
        return 0

    def longest(self, computed: float, text: int) -> float:
        """Share of the tiles of keys in the longest row of plans that compute so much.

        All lists are as long. Beside `text` its queries keep every tile.
        """
        return 1.0 if text else computed

    def kept_plans(self, batch: int) -> int:
        """Plans of a layer held from step to step, for `batch` items in all guidance branches."""
        del batch
        return 0

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


class Delegate(AttentionMethod):
    """A method that is another one in all that it does not say itself."""

    method: AttentionMethod

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
        """See `AttentionMethod`; without memory."""
        return self.method.plan(q, k, site)

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.method.predict(site)

    def computed(self, site: Site) -> float:
        """See `AttentionMethod`."""
        return self.method.computed(site)

    def tiling(self) -> tuple[Tile, Tail] | None:
        """See `AttentionMethod`."""
        return self.method.tiling()

    def beside(self) -> float:
        """See `AttentionMethod`."""
        return self.method.beside()

    def precision(self) -> Precision:
        """See `AttentionMethod`."""
        return self.method.precision()

    def masks(self, heads: int) -> int:
        """See `AttentionMethod`."""
        return self.method.masks(heads)

    def orders(self, heads: int) -> int:
        """See `AttentionMethod`."""
        return self.method.orders(heads)

    def longest(self, computed: float, text: int) -> float:
        """See `AttentionMethod`."""
        return self.method.longest(computed, text)

    def kept_plans(self, batch: int) -> int:
        """See `AttentionMethod`."""
        return self.method.kept_plans(batch)

    def refuses(self, weights: Callable[[], str]) -> str | None:
        """See `AttentionMethod`."""
        return self.method.refuses(weights)

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        return self.method.start()

    def why_dense(self, site: Site) -> str:
        """See `AttentionMethod`."""
        return self.method.why_dense(site)


class Wrapper(Delegate):
    """A method that changes when or how another one runs; recipes have its options beside.

    `idle`: of the options whose default changes something, the values that change nothing.
    """

    idle: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def check(cls, method: type[AttentionMethod], values: Mapping[str, Any]) -> None:
        """Whether option `values` go together around `method`, whose are among them.

        Raises RecipeError.
        """
        del method, values
