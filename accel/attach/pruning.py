"""Steps on some tokens alone: whole blocks run on these, for the others stands what was there.

Between the blocks of a stack nothing looks at the tokens that are left out. So these are taken out
before the first one and put back behind the last, as it returned them in the last step that ran it
on all tokens or, where they were kept since, in the last that kept them: the same as if each block
put its own back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..errors import AccelerationError
from ..grid import TokenGrid
from ..steps import Prune
from ..tokens import kept_tokens
from .blocks import BLOCKS, Kept, refusal
from .denoisers import Denoiser
from .entered import Called, entered
from .family import Stack
from .run import Run

_WITHOUT = "leave steps.prune out"


@dataclass
class _Pass:
    """A call of a denoiser."""

    denoiser: Denoiser
    tokens: int
    """That its blocks are given."""
    kept: Kept | None
    """None where all run."""
    caches: dict[int, torch.Tensor]
    """By stack, `[B, tokens, d]`: what its last block returned."""
    inside: bool = False
    """Whether some tokens are out."""
    cuts: dict[int, tuple[Any, Any]] = field(default_factory=dict[int, tuple[Any, Any]])
    """Arguments that were cut, by their identity, and what they became: blocks share them."""


class Pruning:
    """The blocks of a pipeline's denoisers while a session lasts."""

    def __init__(self, denoisers: list[Denoiser], seed: int) -> None:
        self._denoisers, self._seed = denoisers, seed
        self._stacks: dict[int, list[Stack]] = {}
        """By denoiser, from `attach` on."""
        self._now: _Pass | None = None
        self._caches: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        """By denoiser and guidance branch."""
        self._rows: tuple[int, torch.Tensor] | None = None
        """Of a step, those that all its calls keep."""

    def check(self) -> None:
        """Raise AccelerationError where blocks of a denoiser cannot run on some tokens alone."""
        for denoiser in self._denoisers:
            inner, name = denoiser.inner, type(denoiser.inner).__name__
            refused = refusal(name, inner.config)
            if refused:
                raise AccelerationError(refused)
            why = None
            modules = list(inner.modules())
            if denoiser.module is not inner or any(
                vars(it).get("_compiled_call_impl") is not None for it in modules
            ):
                why = "is compiled, and pruning changes what its blocks are given from step to step"
            elif getattr(inner, "_parallel_config", None) is not None:
                why = "is shared by several processes, each of which sees a part of its tokens"
            elif any(getattr(it, "_chunk_size", None) is not None for it in modules):
                why = "cuts its tokens into chunks of one size: call disable_forward_chunking()"
            if why:
                raise AccelerationError(f"{name} cannot be pruned: it {why}; {_WITHOUT}")

    def attach(self, stack: ExitStack) -> None:
        """Stand before all blocks until `stack` closes."""
        stack.callback(self.start)  # nothing is kept longer than the session
        for denoiser in self._denoisers:
            named = dict(denoiser.inner.named_modules())
            stacks = BLOCKS[denoiser.family.denoiser].stacks(denoiser.inner)
            self._stacks[denoiser.number] = stacks
            for number, blocks in enumerate(stacks):
                denoiser.pruned = blocks.halvings
                for name in blocks.names:
                    last = name == blocks.names[-1]
                    stack.enter_context(
                        entered(named[name], partial(self._block, number, last=last))
                    )

    def start(self) -> None:
        """A run begins; what one before has left is gone."""
        self._caches.clear()
        self._rows = self._now = None

    def call(
        self, denoiser: Denoiser, run: Run, given: Mapping[str, Any], call: Callable[[], Any]
    ) -> Any:
        """What a call of a denoiser returns that is evaluated, on some tokens or on all.

        A branch that was not called in the last whole step, or with another batch, runs on all.

        Raises:
            AccelerationError: tokens are not where they are looked for, or cannot be kept.
        """
        decision, key = run.decision, (denoiser.number, run.branch)
        grid, stacks = _grid(denoiser, given), self._stacks[denoiser.number]
        tokens, kept = grid.halved(stacks[0].halvings).tokens, None
        _check_given(denoiser, given)
        if not isinstance(decision, Prune):
            if run.branch == 0:
                self._caches.clear()
            if run.done == 0:
                self._check_fits(denoiser, given, grid)
            caches = self._caches[key] = {}
        else:
            caches = self._caches.setdefault(key, {})
            items = given[denoiser.family.latents].shape[0]
            if len(caches) == len(stacks) and all(len(it) == items for it in caches.values()):
                kept = self._kept(denoiser, run, decision, grid, stacks[0].halvings)
            ran = tokens if kept is None else len(kept.rows)
            run.tokens = run.tokens[0] + ran, run.tokens[1] + tokens
        self._now = _Pass(denoiser, tokens, kept, caches)
        try:
            result = call()
        finally:
            self._now = None
        held = sum(it.nbytes for those in self._caches.values() for it in those.values())
        run.cache_bytes = max(run.cache_bytes, held)
        return result

    def _kept(
        self, denoiser: Denoiser, run: Run, decision: Prune, grid: TokenGrid, halvings: int
    ) -> Kept:
        index = run.step.index
        if self._rows is None or self._rows[0] != index:
            rows = kept_tokens(
                decision,
                grid,
                # One draw for all blocks and branches of a step.
                seed=(self._seed * 1_000_003 + index) % 2**63,
                halvings=halvings,
                channels=BLOCKS[denoiser.family.denoiser].channels,
            )
            self._rows = index, rows
        tokens = grid.halved(halvings).tokens
        return Kept(self._rows[1], tokens, denoiser.family.text_first)

    def _block(self, number: int, call: Called, *, last: bool) -> Any:
        """A call of a block of the stack of this number."""
        now, given = self._now, call.given
        if now is None:
            return call()
        blocks, states = BLOCKS[now.denoiser.family.denoiser], given["hidden_states"]
        if not now.inside and states.shape[1] != now.tokens:
            raise AccelerationError(
                f"blocks of {now.denoiser.family.denoiser} are given {states.shape[1]} tokens, "
                f"which are no grid of {now.tokens}, as with pictures beside its own: {_WITHOUT}"
            )
        changed: dict[str, Any] = {}
        if now.kept is not None:
            for name in blocks.cuts.keys() & given.keys():
                value = given[name]
                if id(value) not in now.cuts:
                    now.cuts[id(value)] = value, blocks.cuts[name](value, now.kept)
                changed[name] = now.cuts[id(value)][1]
            if not now.inside:
                changed["hidden_states"] = now.kept.of(states, 1)
                now.inside = True
        result = call(**changed)
        if not last:
            return result
        place = blocks.place
        out = result if place is None else result[place]
        if now.kept is not None:
            out = now.caches[number].index_copy(1, now.kept.rows, out)
            now.inside = False
        now.caches[number] = out
        if place is None:
            return out
        return type(result)(out if i == place else it for i, it in enumerate(result))

    def _check_fits(self, denoiser: Denoiser, given: Mapping[str, Any], grid: TokenGrid) -> None:
        """Raise AccelerationError where what a branch keeps is more than the device has left."""
        latents = given[denoiser.family.latents]
        config, dtype = denoiser.inner.config, denoiser.inner.dtype
        needed = cache_bytes(
            denoiser.family.denoiser, config, grid, dtype.itemsize, items=latents.shape[0]
        )
        left = _left(latents.device)
        if needed > left:
            raise AccelerationError(
                f"pruning keeps {needed / 1e9:.2f} GB of tokens for each call of "
                f"{denoiser.family.denoiser} in a step, and {latents.device} has {left / 1e9:.2f} "
                f"GB left: choose a smaller size, or {_WITHOUT}"
            )


def cache_bytes(
    denoiser: str, config: Mapping[str, Any], grid: TokenGrid, itemsize: int, *, items: int
) -> int:
    """What is kept of the tokens of `items` in a batch, or in several calls, by this class."""
    every = BLOCKS[denoiser].caches(config)
    numbers = sum(grid.halved(halvings).tokens * width for width, halvings in every)
    return items * numbers * itemsize


def _grid(denoiser: Denoiser, given: Mapping[str, Any]) -> TokenGrid:
    try:
        return denoiser.family.grid(denoiser.inner.config, given)
    except (LookupError, TypeError, ValueError) as error:
        raise AccelerationError(
            f"it is not known which tokens {denoiser.family.denoiser} runs on: {_WITHOUT}"
        ) from error


def _check_given(denoiser: Denoiser, given: Mapping[str, Any]) -> None:
    """Raise AccelerationError where an argument of a denoiser has to do with all of its tokens."""
    found = [it for it in BLOCKS[denoiser.family.denoiser].between if given.get(it) is not None]
    more = given.get("cross_attention_kwargs") or {}
    found += [it for it in ("ip_adapter_masks",) if it in more]
    if found:
        raise AccelerationError(
            f"{denoiser.family.denoiser} is given {found[0]}, which is of all tokens: {_WITHOUT}"
        )


def _left(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU those of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
