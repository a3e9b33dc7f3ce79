"""What a method keeps at one attention call, and what it misses there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import PrivateAttr

from ..kernels.lists import permuted
from ..kernels.plan import BlockPlan, tile_lengths
from .errors import AccelerationError
from .method import AttentionMethod, Delegate, Plan, Planner
from .site import Site

_CHUNK = 512
"""Queries whose attention is written down at a time."""


@dataclass(frozen=True, eq=False)
class View:
    """One attention call with the plan that a method has made for it.

    Attributes:
        q, k: `[1, H, L, D]`, those of the prompt, after norms and rotary embedding.
        plan: of one batch item.
    """

    site: Site
    q: torch.Tensor
    k: torch.Tensor
    plan: BlockPlan

    @property
    def heads(self) -> int:
        """`H`."""
        return self.q.shape[1]

    @cached_property
    def mask(self) -> torch.Tensor:
        """Tiles that are kept, `[H, Q, K]` bool."""
        return self.plan.mask()[0].expand(self.heads, -1, -1)

    @cached_property
    def mass(self) -> torch.Tensor:
        """Dense attention on each tile, mean over the queries of a row, `[H, Q, K]`."""
        return tile_mass(self.q, self.k, self.plan)[0]

    @cached_property
    def density(self) -> torch.Tensor:
        """Share of the pairs of tokens that are kept, `[H]`."""
        return self.plan.density()[0].expand(self.heads)

    @cached_property
    def recall(self) -> torch.Tensor:
        """Share of the dense attention that falls on what is kept, `[H]`."""
        if self.plan.within is None:
            return self._held(self.mass * self.mask)
        return self._held(tile_mass(self.q, self.k, self.plan, kept=True)[0])

    @cached_property
    def recall_at_best(self) -> torch.Tensor:
        """The same, were the tiles of each row the heaviest of it and as many, `[H]`.

        Where tokens in tiles are masked: as many as have its pairs of tokens.
        """
        heaviest = self.mass.sort(-1, descending=True).values
        counts = self.plan.tiles_as_many()[0, ..., None]
        return self._held(heaviest * (torch.arange(self.plan.columns).to(counts) < counts))

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each query and each key stands in the order they are cut in, `[H, L]` int64."""
        as_they_come = torch.arange(self.site.tokens, device=self.q.device)
        orders = (as_they_come if it is None else it for it in self.plan.orders)
        queries, keys = (it if it.ndim == 1 else it[0] for it in orders)
        at = self.heads, -1
        return queries.expand(*at).argsort(-1), keys.expand(*at).argsort(-1)

    def row(self, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of one query, `[H, L]`, and which keys are kept, bool.

        Both by the tokens' own numbers; `token` is one of these.
        """
        logits = (self.q[0, :, token, None].float() * self.k[0].float()).sum(-1)
        weights = (logits * self.q.shape[-1] ** -0.5).softmax(-1)
        queries, keys = self.places
        kept = [
            self.plan.token_mask(place[None])[0].expand(self.heads, -1, -1)[head, 0]
            for head, place in enumerate(queries[:, token])
        ]
        return weights, torch.stack(kept).gather(-1, keys)

    def token(self, frame: int, row: int, column: int) -> int:
        """The number of a token of the picture."""
        grid, first = self.site.grid, self.site.text if self.site.text_first else 0
        return first + (frame * grid.height + row) * grid.width + column

    def picture(self, x: torch.Tensor) -> torch.Tensor:
        """Of values by token, `[..., L]`, those of the picture, `[..., frames, height, width]`."""
        grid, first = self.site.grid, self.site.text if self.site.text_first else 0
        sides = (grid.frames, grid.height, grid.width)
        return x[..., first : first + grid.tokens].unflatten(-1, sides)

    def text(self, x: torch.Tensor) -> torch.Tensor:
        """Of values by token, `[..., L]`, those of the text, `[..., text]`."""
        return x[..., : self.site.text] if self.site.text_first else x[..., self.site.grid.tokens :]

    def _held(self, mass: torch.Tensor) -> torch.Tensor:
        lengths = tile_lengths(self.plan.queries, self.plan.tile.query, mass.device)
        return (mass.sum(-1) * lengths).sum(-1) / self.plan.queries


class Caught(Exception):  # noqa: N818 - not an error: the caller asked for it
    """Ends a run at the call that a `Lens` was to look at."""

    def __init__(self, view: View) -> None:
        super().__init__("the call was looked at")
        self.view = view


class Lens(Delegate):
    """Another method, up to one call: where that is planned, `Caught` is raised with it.

    The call is the first of its step and layer, of the last item of its batch, also where each item
    has a call of its own: in all pipelines the one that sees the prompt.

    Raises AccelerationError for a method that keeps no tiles, and at the beginning of a run that
    has no such call, or where the method is dense there, with the nearest one where it is not.
    """

    name: ClassVar[str] = "lens"

    _layer: int = PrivateAttr()
    _step: int = PrivateAttr()

    def __init__(self, method: AttentionMethod, *, layer: int, step: int) -> None:
        if method.tiling() is None:
            raise AccelerationError(
                f"{method.words()} merges keys and keeps no tiles: there is nothing to draw; "
                f"choose another attention.method, or see its density in a receipt"
            )
        super().__init__(method=method)
        self._layer, self._step = layer, step

    def start(self) -> Planner:
        """See `AttentionMethod`."""
        inner = self.method.start()

        def plan(q: torch.Tensor, k: torch.Tensor, site: Site) -> Plan | None:
            made = inner(q, k, site)
            prompt = site.branch == 0 and site.item == site.items - 1
            if not prompt or (site.layer, site.step) != (self._layer, self._step):
                return made
            if made is None:
                raise AccelerationError(why_dense(self.method, site))
            assert isinstance(made, BlockPlan)
            raise Caught(View(site, q[-1:].detach(), k[-1:].detach(), _last(made)))

        return plan

    def predict(self, site: Site) -> float:
        """See `AttentionMethod`."""
        if site.layer == 0 and site.branch == 0:
            self._check(site)
        return self.method.predict(site)

    def _check(self, site: Site) -> None:
        for what, asked, count in (
            ("layer", self._layer, site.layers),
            ("step", self._step, site.steps),
        ):
            if not 0 <= asked < count:
                raise AccelerationError(
                    f"there is no {what} {asked}: this run has 0 to {count - 1}"
                )
        wanted = dataclasses.replace(site, layer=self._layer, step=self._step)
        if self.method.predict(wanted) >= 1:
            raise AccelerationError(why_dense(self.method, wanted))


def tile_mass(
    q: torch.Tensor, k: torch.Tensor, plan: BlockPlan, *, kept: bool = False
) -> torch.Tensor:
    """Dense attention on each tile of a plan, kept or not, `[B, H, Q, K]` float32.

    Mean over the queries of a row, so that each row sums to 1.

    Args:
        q, k: `[B, H, L, D]`, not yet in the order of the plan.
        kept: only what falls on pairs of tokens that the plan keeps; rows then sum to less.
    """
    q, k = (x if it is None else permuted(x, it) for x, it in zip((q, k), plan.orders, strict=True))
    mass = torch.zeros(*q.shape[:2], plan.rows, plan.columns, device=q.device)
    column = torch.arange(plan.keys, device=q.device) // plan.tile.key
    for head in range(q.shape[1]):  # logits of all would take much memory
        keys = k[:, head].float().mT * q.shape[-1] ** -0.5
        for start in range(0, plan.queries, _CHUNK):
            part = q[:, head, start : start + _CHUNK].float()
            weights = (part @ keys).softmax(-1)
            if kept:
                queries = torch.arange(start, start + part.shape[1], device=q.device)
                by_head = plan.token_mask(queries).expand(-1, q.shape[1], -1, -1)
                weights = weights * by_head[:, head]
            tiles = weights.new_zeros(*weights.shape[:2], plan.columns)
            tiles.index_add_(2, column, weights)
            row = torch.arange(start, start + part.shape[1], device=q.device) // plan.tile.query
            mass[:, head].index_add_(1, row, tiles)
    return mass / tile_lengths(plan.queries, plan.tile.query, q.device)[:, None]


def _last(plan: BlockPlan) -> BlockPlan:
    """The plan of the last batch item."""
    order, key_order = (
        it if it is None or it.ndim == 1 else it[-1:] for it in (plan.order, plan.key_order)
    )
    return dataclasses.replace(
        plan,
        indices=plan.indices[-1:],
        counts=plan.counts[-1:],
        order=order,
        key_order=key_order,
        bias=None if plan.bias is None else plan.bias[-1:],
        within=None if plan.within is None else plan.within[-1:],
    )


def why_dense(method: AttentionMethod, site: Site) -> str:
    """Why `method` has no plan at a call that it keeps dense, and at which one near it it has."""
    near = next((it for it in _nearest_first(site) if method.predict(it) < 1), None)
    remedy = (
        "nowhere in this run is it sparse: take more steps, a larger size or another recipe"
        if near is None
        else f"the nearest sparse one is layer {near.layer} at step {near.step}"
    )
    why = method.why_dense(site)
    return f"layer {site.layer} at step {site.step} runs dense {why}; {remedy}"


def _nearest_first(site: Site) -> Iterator[Site]:
    """The calls of a run, those of the same layer first."""
    calls = itertools.product(range(site.layers), range(site.steps))
    for layer, step in sorted(
        calls, key=lambda it: (abs(it[0] - site.layer), abs(it[1] - site.step))
    ):
        yield dataclasses.replace(site, layer=layer, step=step)
