"""How long a run would take, by one that was made here before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .events import Stage
from .planning import Plan
from .request import Resolved
from .sidecar import Record

_ALIKE = ("model", "width", "height", "frames", "device", "dtype")
_AFTER: tuple[Stage, ...] = ("text", "decode", "save")


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a video, at least and at most, without the load of the model.

    `by` is the record that they are told by; `same` says that it has the same recipe.
    """

    least_s: float
    most_s: float
    by: Record
    same: bool


def timed(plan: Plan, records: Iterable[Record]) -> Timed | None:
    """The time of what is planned, by the first of `records` that says anything of it, or None.

    One with the same model, size, length, device and precision does, if it has the same recipe, or
    was made dense and the speed-up of this one is known. Its time for a step is taken.
    """
    request = plan.request
    dense: Record | None = None
    for record in records:
        before = record.request
        if not _alike(request, before) or not record.stages_s.get("denoise"):
            continue
        if before.accelerated() == request.accelerated():
            return _scaled(request, record, (1.0, 1.0), same=True)
        if dense is None and not before.accelerated():
            dense = record
    if dense is None or plan.speedup is None:
        return None
    return _scaled(request, dense, plan.speedup, same=False)


def _alike(one: Resolved, other: Resolved) -> bool:
    twice = [it.guidance > 1 for it in (one, other)]
    return twice[0] == twice[1] and all(getattr(one, it) == getattr(other, it) for it in _ALIKE)


def _scaled(
    request: Resolved, record: Record, speedup: tuple[float, float], *, same: bool
) -> Timed:
    times = record.stages_s
    after_s = sum(times.get(stage, 0.0) for stage in _AFTER)
    denoise_s = times["denoise"] * request.steps / record.request.steps
    slow, fast = speedup
    return Timed(after_s + denoise_s / fast, after_s + denoise_s / slow, record, same)
