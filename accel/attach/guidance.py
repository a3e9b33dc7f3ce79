"""The two guidance branches of a step in two processes, which give each other their outputs.

Where branches are one batch each process has a half of it. Where they are calls of their own, each
process makes one of them; what it returns for the other, if that is the first, is filled in once
both are there, which is before the pipeline looks at either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed

from ..errors import AccelerationError
from .denoisers import Denoiser
from .parallel import BATCHED_GUIDANCE, Ranks
from .run import Run

_UNGUIDED = "parallel.cfg shares two guidance branches, and {}: leave it out"


class Guidance:
    """Of one session; a run begins with `start`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.start()

    def start(self) -> None:
        """A run begins, of which it is not known yet how often a step calls a denoiser."""
        self._calls = 0
        self._made = 0
        self._seen = False
        self._own: torch.Tensor | None = None
        self._first: torch.Tensor | None = None

    def batched(self, denoiser: Denoiser, given: Mapping[str, Any]) -> bool:
        """Whether a call is of both branches. Raises AccelerationError where it ought to be."""
        name = denoiser.family.denoiser
        if name not in BATCHED_GUIDANCE:
            return False
        if given[denoiser.family.latents].shape[0] % 2:
            raise AccelerationError(_UNGUIDED.format(f"{name} is called for one"))
        return True

    def half(self, denoiser: Denoiser, given: Mapping[str, Any]) -> dict[str, Any]:
        """What this process's half of a call is given, of what has a batch."""
        batch = given[denoiser.family.latents].shape[0]
        return {
            name: value.chunk(2)[self._ranks.branch]
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch
        }

    def whole(self, result: Any) -> Any:
        """Both halves of what a denoiser returns."""
        return _of(type(result), torch.cat(self._both(result[0])))

    def separate(self, denoiser: Denoiser, run: Run, call: Callable[[], Any]) -> Any:
        """One of the calls of a step, of which this process makes one, and the first step all."""
        if not self._calls:
            self._made = run.branch + 1
            return call()
        if run.branch >= self._calls:
            raise AccelerationError(self._changed(denoiser))
        own = run.branch == self._ranks.branch
        result = call() if own else None
        self._made = run.branch + 1
        if run.branch == 0:
            if result is None:
                assert denoiser.kind is not None
                size = (run.batch, *denoiser.shape)
                device = next(denoiser.inner.parameters()).device
                # What looks at it too early sees it.
                self._first = torch.full(size, math.nan, dtype=denoiser.dtype, device=device)
                return _of(denoiser.kind, self._first)
            self._own = result[0]
            return result
        mine = self._own if result is None else result[0]
        assert mine is not None
        first, second = self._both(mine)
        if self._first is not None:
            self._first.copy_(first)
        self._own = self._first = None
        if result is not None:
            return result
        assert denoiser.kind is not None
        return _of(denoiser.kind, second)

    def finish_step(self, denoiser: Denoiser, output: torch.Tensor, *, skipped: bool) -> None:
        """A step is done. Raises AccelerationError where its calls were not both branches."""
        if skipped or denoiser.family.denoiser in BATCHED_GUIDANCE:
            return
        name = denoiser.family.denoiser
        if not self._calls:
            if self._made != 2:
                raise AccelerationError(_UNGUIDED.format(f"{name} is called once a step"))
            self._calls = self._made
        elif self._made != self._calls:
            raise AccelerationError(self._changed(denoiser))
        elif not self._seen:
            self._check(name, output)
        self._made = 0

    def _check(self, name: str, output: torch.Tensor) -> None:
        """Raise AccelerationError, in both processes, where what was filled in came too late."""
        finite = output.isfinite().all().to(torch.int32)
        distributed.all_reduce(finite, distributed.ReduceOp.MIN, self._ranks.cfg_group)
        if not finite.item():
            raise AccelerationError(
                f"values that are no numbers: {name} gave them, or the pipeline looked at a "
                f"branch before both were there; leave parallel.cfg out"
            )
        self._seen = True

    def _both(self, mine: torch.Tensor) -> list[torch.Tensor]:
        mine = mine.contiguous()
        both = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(both, mine, self._ranks.cfg_group)
        return both

    def _changed(self, denoiser: Denoiser) -> str:
        return _UNGUIDED.format(
            f"not each step calls {denoiser.family.denoiser} {self._calls} times"
        )


def _of(kind: type, sample: torch.Tensor) -> Any:
    return (sample,) if kind is tuple else kind(sample=sample)
