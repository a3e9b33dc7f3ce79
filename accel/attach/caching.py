"""A cache on the denoisers of a pipeline: on for a run, counted, and off again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import lru_cache
from typing import Any

import diffusers
import torch

from ..errors import AccelerationError
from ..policies import CachePolicy, DBCache
from ..receipt import CacheReceipt
from . import dbcache, hooked
from .denoisers import Denoiser
from .hooked import Stood, Tally
from .run import Run

_ALLOW = "or allow fallbacks (strict=False, --no-strict)"


def refusal(
    policy: CachePolicy,
    denoiser: str,
    config: Mapping[str, Any],
    *,
    experts: int = 1,
    sparse: bool = False,
) -> str | None:
    """Why `policy` is wrong for a class of denoisers of this config, or None.

    Args:
        experts: how many of them a pipeline has.
        sparse: whether their attention is too.
    """
    if isinstance(policy, DBCache):
        return dbcache.absent()
    made = getattr(diffusers, denoiser, None)
    # Of a class that is not of diffusers it is told when it is there.
    if made is not None and not hasattr(made, "enable_cache"):
        return _no_cache(policy, denoiser)
    if policy.from_start and experts > 1:
        return (
            f"{policy.name} counts steps from the first one, and the second of two denoisers "
            f"begins in the middle: choose first-block-cache, or a policy that skips steps"
        )
    if sparse and policy.why_dense:
        return (
            f"{policy.name} and sparse attention do not go together: {policy.why_dense}; leave one "
            f"of them out"
        )
    return policy.misfit(denoiser, config)


def inert(policy: CachePolicy, denoiser: str, config: Mapping[str, Any]) -> str | None:
    """Why `policy` stands on nothing in a class of denoisers of this config, or None.

    It is put on one without weights, so that diffusers itself finds the modules; None also where
    that is not known: of other libraries' caches and other libraries' classes.

    Raises:
        AccelerationError: diffusers refuses.
    """
    # Blocks are there, or else it is refused.
    if policy.library != "diffusers" or policy.unit == "block":
        return None
    key: Any = policy  # frozen, so that it has a hash, which type checkers do not see
    return _inert(key, denoiser, json.dumps(config))


@lru_cache(maxsize=64)  # large denoisers take a second, and the page asks at every change
def _inert(policy: CachePolicy, denoiser: str, config: str) -> str | None:
    made = getattr(diffusers, denoiser, None)
    if made is None:
        return None
    try:
        with torch.device("meta"):
            inner: Any = made.from_config(json.loads(config))
    except Exception:  # classes raise kinds of their own; what is wrong is told when it is loaded
        return None
    with hooked.on(policy, inner, 1, lambda: 0.0, Tally()) as stood:
        return None if stood.hooked else _nothing_in(policy, denoiser)


def _nothing_in(policy: CachePolicy, denoisers: str) -> str:
    return f"{policy.name} found no {policy.unit} in {denoisers} to stand on: {policy.elsewhere()}"


def _no_cache(policy: CachePolicy, denoiser: str) -> str:
    return (
        f"{policy.name} is a cache of diffusers, and {denoiser} has none (it is no CacheMixin): "
        f"choose a policy that skips steps, such as shadow"
    )


class Caching:
    """The cache of a session; it is on from `start` to `stop`."""

    def __init__(self, policy: CachePolicy, denoisers: list[Denoiser], pipe: Any) -> None:
        self.policy, self._denoisers, self._pipe = policy, denoisers, pipe
        self._stack = ExitStack()
        self._stood: list[Stood] = []
        self._hooked = 0
        self._tally = Tally()
        self._timesteps: list[float] = []
        self._timestep = 0.0
        self._over = False
        self._before = (0, 0, 0)
        """Counts when the step began."""

    def check(self, *, sparse: bool, strict: bool) -> None:
        """See before anything runs that it can be put on; it is off again.

        Raises:
            AccelerationError: it is wrong for a denoiser or for sparse attention; in strict mode,
                it stands on nothing.
        """
        for denoiser in self._denoisers:
            refused = self._refusal(denoiser, sparse=sparse)
            if refused:
                raise AccelerationError(refused)
        try:
            self.start([0.0])
        finally:
            self.stop()
        if strict and not self._hooked:
            raise AccelerationError(f"strict: {self._nothing_found()}, {_ALLOW}")

    def start(self, timesteps: list[float]) -> None:
        """A run of these begins; what one before has left is gone."""
        self.stop()
        self._tally, self._timesteps, self._over = Tally(), timesteps, False
        self._before = (0, 0, 0)
        try:
            self._stood = [
                self._stack.enter_context(self._on(it.inner, len(timesteps)))
                for it in self._denoisers
            ]
        except BaseException:
            self.stop()
            raise
        self._hooked = sum(it.hooked for it in self._stood)

    def _on(self, inner: Any, steps: int) -> AbstractContextManager[Stood]:
        policy, tally = self.policy, self._tally
        if isinstance(policy, DBCache):
            guided = getattr(self._pipe, "do_classifier_free_guidance", True)
            return dbcache.on(policy, inner, steps, tally, guided=guided)
        return hooked.on(policy, inner, steps, lambda: self._timestep, tally)

    def stop(self) -> None:
        """The denoisers are as before."""
        self._stack.close()
        self._stood = []

    def call(
        self, denoiser: Denoiser, run: Run, given: Mapping[str, Any], call: Callable[[], Any]
    ) -> tuple[Any, bool]:
        """What a call of a denoiser returns, and whether nothing in it was reused.

        Raises:
            AccelerationError: the cache is wrong for such calls.
        """
        policy, name = self.policy, denoiser.family.denoiser
        step = run.step.index
        self._timestep = self._timesteps[step]
        if run.branch and policy.one_call:
            raise AccelerationError(
                f"{policy.name} keeps one past for all calls, and {name} is called again in a "
                f"step, as for guidance in calls of its own: choose first-block-cache, or run it "
                f"without guidance"
            )
        if run.forwards == 0:
            refused = policy.misbegun(name, self._timestep, run.batch)
            if not refused and policy.from_start and run.first:
                refused = (
                    f"{policy.name} counts steps from the first one, and this run begins with step "
                    f"{run.first}: choose first-block-cache"
                )
            if refused:
                raise AccelerationError(refused)
        sigmas = getattr(self._pipe.scheduler, "sigmas", None)
        sigma = None if sigmas is None or len(sigmas) <= step else float(sigmas[step])
        managers = self._stood[denoiser.number].managers
        before = self._counts()
        with hooked.placed(managers, str(run.branch), step, run.steps, sigma):
            result = call()
        return result, _whole(before, self._counts())

    def finish_step(self, run: Run, *, strict: bool) -> None:
        """A step is done; after the last one the cache is off.

        Raises:
            AccelerationError: guidance is not as the cache takes it; in strict mode, nothing was
                reused in the run.
        """
        policy, tally, now = self.policy, self._tally, self._counts()
        tally.pattern += "C" if _whole(self._before, now) else "r"
        self._before = now
        assert run.denoiser is not None
        name = run.denoiser.family.denoiser
        refused = policy.misguided(name, run.branches)
        expected = self._stood[run.denoiser.number].calls_a_step
        if expected and run.done == 1 and run.forwards != expected:
            refused = (
                f"{policy.name} counts on {expected} calls of {name} in a step, and there are "
                f"{run.forwards}, so that guidance branches would share a past: choose "
                f"first-block-cache"
            )
        if refused:
            raise AccelerationError(refused)
        if not run.over:
            return
        self._over = True
        tally.ratios = hooked.measured_ratios(self._stood[0].managers) if policy.measures() else []
        self.stop()
        if strict and self._inert():
            raise AccelerationError(f"strict: {self._inert()}, {_ALLOW}")

    def receipt(self) -> CacheReceipt:
        """What it did so far in the last run."""
        tally = self._tally
        return CacheReceipt(
            asked=self.policy.words(),
            unit=self.policy.unit,
            hooked=self._hooked,
            calls=tally.calls,
            evaluated=tally.evaluated,
            halved=tally.halved,
            pattern=tally.pattern,
            inert=self._inert(),
            ratios=[round(it, 5) for it in tally.ratios],
        )

    def _refusal(self, denoiser: Denoiser, *, sparse: bool) -> str | None:
        policy, inner = self.policy, denoiser.inner
        name = type(inner).__name__
        if policy.library == "diffusers" and not hasattr(inner, "enable_cache"):
            return _no_cache(policy, name)
        refused = refusal(policy, name, inner.config, experts=len(self._denoisers), sparse=sparse)
        if refused:
            return refused
        blocks = len(hooked.blocks_in(inner))
        if policy.unit == "block" and blocks < 2:
            return f"{policy.name} needs two blocks or more, and this {name} has {blocks}"
        compiled = [it for it in inner.modules() if vars(it).get("_compiled_call_impl") is not None]
        if compiled or denoiser.module is not inner:
            return (
                f"{name} is compiled, and {policy.name} changes its modules at the start and at "
                f"the end of a run: use it without torch.compile"
            )
        if getattr(inner, "_parallel_config", None) is not None and not policy.shards:
            return (
                f"{policy.name} decides by what is computed, in each process for itself, and "
                f"{name} is shared by several: choose pattern, which decides alike in all"
            )
        return None

    def _counts(self) -> tuple[int, int, int]:
        return self._tally.calls, self._tally.evaluated, self._tally.halved

    def _inert(self) -> str:
        """Why it did nothing; empty where it did something, or may still do it."""
        if not self._hooked:
            return self._nothing_found()
        whole = _whole((0, 0, 0), self._counts())
        if not self._over or not whole or self.policy.measures():
            return ""
        return f"{self.policy.name} reused nothing in {len(self._tally.pattern)} steps: " + (
            self.policy.remedy()
        )

    def _nothing_found(self) -> str:
        names = sorted({it.family.denoiser for it in self._denoisers})
        return _nothing_in(self.policy, ", ".join(names))


def _whole(before: tuple[int, int, int], now: tuple[int, int, int]) -> bool:
    """Whether nothing was reused between two counts."""
    calls, evaluated, halved = (b - a for a, b in zip(before, now, strict=True))
    return calls == evaluated and not halved
