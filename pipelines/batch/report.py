"""What is told of a batch: how it stands while it runs, a summary at its end, its status later."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .attempt import Ended
from .rows import Group
from .store import Store

MOST_FAILURES = 20
"""How many are told one by one."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a batch stands. `workers` says what each does now."""

    rows: int
    done: int
    failed: int
    left: int
    elapsed_s: float
    eta_s: float | None
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that failed for good or, without a `name`, could not be tried."""

    line: int
    reason: str
    name: str | None = None

    def __str__(self) -> str:
        row = "" if self.name is None else f", {self.name}"
        return f"line {self.line}{row}: {self.reason}"


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1


@dataclass
class Summary:
    """What a run of a batch did. It does not grow with the rows.

    Of `rows` in all, `before` were done when it began; `left` are neither done nor failed. Times by
    stage are summed over rows, over all workers. `densities` and `evaluated` are means over rows,
    by group in words. `blocked` says why no row could be written any more, `others_complete`
    whether the other processes that share the batch have made all of theirs.
    """

    rows: int
    before: int
    refused: int
    workers: int = 0
    done: int = 0
    failed: int = 0
    retried: int = 0
    elapsed_s: float = 0.0
    stages_s: dict[str, float] = field(default_factory=dict[str, float])
    failures: list[Failure] = field(default_factory=list[Failure])
    kinds: Counter[str] = field(default_factory=Counter[str])
    blocked: str | None = None
    others_complete: bool = True
    _shares: dict[str, dict[str, _Mean]] = field(default_factory=dict[str, "dict[str, _Mean]"])

    @property
    def left(self) -> int:
        """Rows that are neither done nor failed nor refused."""
        return self.rows - self.before - self.done - self.failed

    @property
    def complete(self) -> bool:
        """Whether every row is done, also those of other processes that share the batch."""
        return not (self.left or self.failed or self.refused) and self.others_complete

    @property
    def rows_per_hour(self) -> float:
        """Rows that were done, by wall time."""
        return 3600 * self.done / self.elapsed_s if self.elapsed_s else 0.0

    def add(self, ended: Ended, group: Group) -> None:
        """Count an attempt that ended."""
        if ended.status == "retried":
            self.retried += 1
        elif ended.status == "failed":
            self.failed += 1
            self.kinds[ended.kind or "unknown"] += 1
            if len(self.failures) < MOST_FAILURES:
                self.failures.append(Failure(ended.line, ended.reason or "unknown", ended.name))
        elif ended.status == "done":
            self.done += 1
            for stage, seconds in ended.stages_s.items():
                self.stages_s[stage] = self.stages_s.get(stage, 0.0) + seconds
            for what in ("density", "evaluated"):
                value = getattr(ended, what)
                if value is not None:
                    by_group = self._shares.setdefault(what, {})
                    by_group.setdefault(words(group), _Mean()).add(value)

    def shares(self, what: str) -> dict[str, float]:
        """Means of `density` or `evaluated` by group."""
        return {name: it.total / it.count for name, it in self._shares.get(what, {}).items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            **{name: getattr(self, name) for name in (
                "rows", "before", "done", "failed", "refused", "left", "retried", "workers",
                "blocked")},
            "elapsed_s": round(self.elapsed_s, 3),
            "rows_per_hour": round(self.rows_per_hour, 1),
            "stages_s": {stage: round(s, 3) for stage, s in self.stages_s.items()},
            "densities": {name: round(it, 4) for name, it in self.shares("density").items()},
            "evaluated": {name: round(it, 4) for name, it in self.shares("evaluated").items()},
            "kinds": dict(self.kinds),
            "failures": [asdict(it) for it in self.failures],
        }  # fmt: skip


def words(group: Group) -> str:
    """A group in words."""
    size = f"{group.width}x{group.height}, {group.frames} frames, {group.steps} steps"
    told = f"{group.model}, {size}"
    if group.dtype != "auto":
        told += f", {group.dtype}"
    if group.recipe == "{}":
        return told
    from ...accel.recipe import from_table  # it needs torch

    return f"{told}, {from_table(json.loads(group.recipe)).words()}"


@dataclass(frozen=True, slots=True)
class Status:
    """How the folder of a batch stands: of its rows, how many are done, failed and left.

    `failed` were tried and are tried again by the next run; `refused` cannot be. `others` are
    videos of rows that the manifest has no more.
    """

    path: Path
    manifest: str
    rows: int
    done: int
    failed: int
    left: int
    refused: int
    others: int
    failures: tuple[Failure, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {**asdict(self), "path": str(self.path)}


def status(path: Path) -> Status:
    """Read how `path` stands. Raises `OutputError` if it is no batch's folder."""
    store = Store(path)
    head = store.header()
    if head is None:
        raise OutputError(f"{path} is no folder of a batch: it has no readable rows.jsonl")
    done = store.done()
    failed: dict[str, Mapping[str, Any]] = {}
    for line in store.statuses():
        if line["status"] == "failed":
            failed[line["id"]] = line
        else:
            failed.pop(line["id"], None)
    rows, finished, failures = 0, 0, list[Failure]()
    for row in store.rows():
        rows += 1
        if int(row["id"], 16) in done:
            finished += 1
        elif row["id"] in failed:
            failures.append(Failure(row["line"], str(failed[row["id"]].get("reason")), row["name"]))
    refused = [Failure(it["line"], it["why"]) for it in head["refused"]]
    return Status(
        path=path,
        manifest=head["manifest"],
        rows=rows,
        done=finished,
        failed=len(failures),
        left=rows - finished - len(failures),
        refused=sum(it["rows"] for it in head["refused"]),
        others=len(done) - finished,
        failures=(*refused, *failures),
    )
