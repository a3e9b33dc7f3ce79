"""One call of a denoiser while it runs: what its attention calls do."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.attention import block_attention
from ...kernels.backends import choose
from ...kernels.dense import fastest
from ...kernels.merging import KERNEL, KeyMerge, merged_attention
from ...kernels.problem import Problem
from ..cost import problem_of, slower
from ..errors import AccelerationError
from ..method import AttentionMethod, Plan
from ..recipe import Recipe
from ..site import Site
from ..steps import Prune
from .denoisers import Denoiser
from .dense import by_kernel
from .exchange import all_heads, exchanged, mean_of_heads
from .family import Arguments, Expected
from .parallel import Ranks, check_given, plans_by_head
from .routes import Call, unrouted
from .run import Run
from .sites import NoSiteError, everywhere, text_tokens, unmasked


class Forward:
    """Listens to the routes: calls come in the order in which the family expects them."""

    def __init__(
        self,
        denoiser: Denoiser,
        run: Run,
        given: Arguments,
        recipe: Recipe,
        *,
        strict: bool,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        family = denoiser.family
        self.denoiser, self.run, self.recipe = denoiser, run, recipe
        self.strict, self.seed = strict, seed
        try:
            self.grid = family.grid(denoiser.inner.config, given)
        except (LookupError, TypeError, ValueError):
            self.grid = None
        self.expected = family.expected(denoiser.attentions, given)
        self._items = 1 + max(it.item for it in self.expected)
        self._done = 0
        self._ranks = ranks if ranks and ranks.context else None
        self._guided = ranks is not None and ranks.asked.cfg > 1
        if self._ranks is not None:
            check_given(family.denoiser, given)
            self._ranks.cut(*self._lengths(self.expected[0]))

    def _lengths(self, expected: Expected) -> tuple[int, int]:
        """Tokens of the text and of the picture. Raises AccelerationError."""
        if self.grid is None:
            raise AccelerationError(
                f"it is not known which tokens {self.denoiser.family.denoiser} runs on, so that "
                f"they cannot be shared: leave [parallel] out"
            )
        return expected.text, self.grid.tokens

    def stock_backend(self) -> Any:
        """See `routes.Listener`; only models that dispatch ask."""
        return self.denoiser.stock[self._next.place]

    def attend(self, call: Call) -> torch.Tensor:
        """See `routes.Listener`."""
        expected = self._next
        self._done += 1
        layer = self.denoiser.layers.get(expected.place)
        if layer is None:
            return call.dense()

        def attend(call: Call) -> torch.Tensor:
            method = self.recipe.attention
            if method is None:
                return self._dense(self.denoiser.offset + layer, call, "as asked")
            return self._attended(call, method, expected, layer)

        if self._ranks is None:
            return attend(call)
        text, picture = self._lengths(expected)
        first = self.denoiser.family.text_first
        return exchanged(call, self._ranks, text=text, picture=picture, first=first, attend=attend)

    def at(self, place: int) -> None:
        """The attention at `place` is next; a cache has left out those before it."""
        ahead = range(self._done, len(self.expected))
        self._done = next((i for i in ahead if self.expected[i].place == place), self._done)

    def check_complete(self) -> None:
        """Raise AccelerationError where the denoiser ended and not all calls have come."""
        if self._done != len(self.expected):
            raise AccelerationError(
                f"{self.denoiser.family.denoiser} attends {len(self.expected)} times a call, "
                f"{self._done} of these reached the recipe: something else took the others over"
            )

    @property
    def _next(self) -> Expected:
        if self._done >= len(self.expected):
            raise AccelerationError(
                f"{self.denoiser.family.denoiser} attends more often than it has layers, as with "
                f"an IP adapter: unload it, or use --recipe dense"
            )
        return self.expected[self._done]

    def _attended(
        self, call: Call, method: AttentionMethod, expected: Expected, layer: int
    ) -> torch.Tensor:
        """One self-attention, as the recipe wants it."""
        run, family = self.run, self.denoiser.family
        attention = self.denoiser.attentions[expected.place]
        key = self.denoiser.offset + layer
        pruned = attention.halvings == self.denoiser.pruned
        if pruned and isinstance(run.decision, Prune):
            return self._dense(key, call, "between the kept tokens of a pruned step")
        grid = self.grid and self.grid.halved(attention.halvings)
        try:
            rows = unmasked(call)
            text = text_tokens(call, rows, grid, expected.text, family.text_first)
        except NoSiteError as refusal:
            return self._dense(key, call, str(refusal), fallback=True)
        assert grid is not None
        site = Site(
            grid=grid,
            layer=layer,
            layers=len(self.denoiser.layers),
            step=run.first + run.done,
            steps=run.steps,
            skipped=run.skipped + (run.pruned if pruned else 0),
            text=text,
            text_first=family.text_first,
            branch=run.branch,
            branches=run.branches if self._items == 1 and not self._guided else 1,
            item=expected.item,
            items=self._items,
            expert=self.denoiser.number,
            seed=self.seed,
        )
        density, precision = method.predict(site), method.precision()
        if density >= 1:
            return self._dense(key, call, method.why_dense(site))
        if self.recipe.when == "faster":
            computed = method.computed(site)
            problem = problem_of(
                method.tiling(),
                call.q.device.type,
                call.q.dtype,
                (*call.q.shape[:2], site.tokens, call.q.shape[3]),
                precision=precision,
                requires_grad=torch.is_grad_enabled() and call.q.requires_grad,
                masked=computed > density,
            )
            reason = slower(problem, computed, method.beside())
            if reason:
                return self._dense(key, call, reason, fallback=True)
        q, k, v = (x if rows is None else x[:, :, rows] for x in (call.q, call.k, call.v))
        plan = self._plan(method, q, k, site)
        if plan is None:
            return self._dense(key, call, method.why_dense(site))
        if isinstance(plan, KeyMerge):
            kernel = KERNEL
            with unrouted():
                out = merged_attention(q, k, v, plan, scale=call.scale)
        else:
            kernel = choose(Problem.of(q, k, v, plan, precision))
            out, _ = block_attention(
                q, k, v, plan, scale=call.scale, precision=precision, backend=kernel
            )
        density = plan.density().mean()
        if self._ranks is not None:
            density = mean_of_heads(density, self._ranks)
        run.ran(key, kernel, density, pairs=site.tokens**2)
        return call.laid_out(everywhere(call, rows, out))

    def _plan(
        self, method: AttentionMethod, q: torch.Tensor, k: torch.Tensor, site: Site
    ) -> Plan | None:
        """The plan of a call, of this process's heads where several share it."""
        planner, ranks = self.run.planner, self._ranks
        assert planner is not None
        if ranks is None or ranks.asked.ulysses == 1 or plans_by_head(method):
            return planner(q, k, site)
        plan = planner(all_heads(q, ranks), all_heads(k, ranks), site)
        return plan and plan.of_heads(ranks.heads(q.shape[1]))

    def _dense(self, key: int, call: Call, reason: str, fallback: bool = False) -> torch.Tensor:
        asked, attend = self.recipe.dense_kernel, call.dense
        kernel = asked if asked != "fastest" else fastest(call.q) or "stock"
        if kernel != "stock":
            try:
                attend = by_kernel(call, kernel)
            except NoSiteError as refusal:
                if asked == kernel:
                    reason, fallback = f"{reason}, not by the {kernel} kernel {refusal}", True
                kernel = "stock"
        if fallback and self.strict:
            raise AccelerationError(
                f"strict: attention of layer {key} would run dense {reason}; "
                f"change the recipe, or allow fallbacks (strict=False, --no-strict)"
            )
        pairs = call.q.shape[2] * call.k.shape[2]
        self.run.ran_dense(key, reason, fallback=fallback, pairs=pairs, kernel=kernel)
        return attend()
