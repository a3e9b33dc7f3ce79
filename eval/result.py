"""What a metric says of a clip, and what may be summed up over clips.

A result is `ok`, `partial`, `skipped` or `failed`, and anything but `ok` has its reason. A total is
None unless all its members are there: a mean over those that happen to be is another number, and
has another name (`partial_mean`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from .paired import mean_interval

Status: TypeAlias = Literal["ok", "partial", "skipped", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)


@dataclass(frozen=True, slots=True)
class Result:
    """One metric of one clip.

    `score` is set where `status` is ok, and may be where it is partial. `applies` is False where
    the metric asks nothing of this clip, as the place of a single object: no total misses it.
    `notes` are what a reader of an `ok` score must know. `details` are plain values for the report.
    """

    status: Status
    score: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    applies: bool = True
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"{self.status!r} is no status: {', '.join(STATUSES)}")
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score of {self.score} is none: say failed, and why")
        if (self.status == "ok") != (not self.reason):
            raise ValueError(f"{self.status} with reason {self.reason!r}: all but ok have one")
        scored = self.score is not None
        if self.status != "partial" and scored != (self.status == "ok"):
            raise ValueError(f"{self.status} with a score of {self.score}")

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not set is left out, but for the score."""
        told: dict[str, Any] = {"status": self.status, "score": self.score}
        told |= {"reason": self.reason} if self.reason else {}
        told |= {"notes": list(self.notes)} if self.notes else {}
        if not self.applies:
            told["applies"] = False
        return told | ({"details": dict(self.details)} if self.details else {})

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Result:
        """The inverse. Raises `ValueError` or `TypeError` for anything else."""
        given: dict[str, Any] = {**told, "notes": tuple(told.get("notes", ()))}
        return cls(**given)


def ok(score: float, *notes: str, **details: Any) -> Result:
    """A score, with what must be said of it."""
    return Result("ok", float(score), notes=notes, details=details)


def skipped(reason: str, *, applies: bool = True) -> Result:
    """The metric cannot be taken of this clip, and nothing went wrong."""
    return Result("skipped", reason=reason, applies=applies)


def failed(reason: str) -> Result:
    """Something that should have worked did not."""
    return Result("failed", reason=reason)


@dataclass(frozen=True, slots=True)
class Total:
    """A metric over clips: `mean` with its 95 % bootstrap interval where every clip has a score.

    Otherwise these are None, `partial_mean` is that of the `n` clips of `asked` that have one, and
    `reason` says what the others lack. `notes` are those of the results, each once.
    """

    status: Status
    n: int
    asked: int
    mean: float | None
    low: float | None
    high: float | None
    partial_mean: float | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"notes": list(self.notes)}


def total(results: Sequence[Result], seed: int = 0) -> Total:
    """One metric over all clips of which it asks something."""
    members = [it for it in results if it.applies]
    notes = tuple(dict.fromkeys(note for it in results for note in it.notes))
    if not members:
        why = results[0].reason if results else "there are no clips"
        return Total("skipped", 0, 0, None, None, None, None, why, notes)
    kept = [it.score for it in members if it.status == "ok" and it.score is not None]
    n, asked = len(kept), len(members)
    if n == asked:
        low, high = mean_interval(kept, seed)
        return Total("ok", n, asked, math.fsum(kept) / n, low, high, notes=notes)
    others = [it for it in members if it.status != "ok"]
    why = f"{len(others)} of {asked} have none; {others[0].reason}"
    partial_mean = math.fsum(kept) / n if n else None
    status: Status = "partial" if n else others[0].status
    return Total(status, n, asked, None, None, None, partial_mean, why, notes)
