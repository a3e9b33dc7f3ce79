"""`prepare` and `run`: from a manifest to a folder of videos, whatever happens on the way."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ManifestError, OutputError, RequestError
from ..events import Notice
from ..files import explain
from ..request import Request
from ..together import processes
from ..worker import Port, stream
from . import engines, table
from .attempt import Ended
from .engines import Heard, Job, Step
from .making import Make, Studio, refusal
from .manifest import Refused
from .report import Standing, Summary
from .rows import Group
from .schedule import Pace, Schedule
from .store import Store
from .table import Table

MAX_WORKERS = 1024
_MOST_NOTICES = 20


@dataclass(frozen=True, slots=True)
class Options:
    """What a batch is asked for.

    `defaults` are fields of a request for what rows leave out. `shard` i of n takes every n-th row.
    `keep_going` runs what can run where some rows cannot. `workers` None is one for each GPU, or
    one on the CPU. `address` is that of a cluster of Ray.
    """

    manifest: Path
    output: Path
    defaults: Mapping[str, Any]
    seeds: tuple[int, ...] = ()
    shard: tuple[int, int] = (1, 1)
    retries: int = 1
    keep_going: bool = False
    engine: str = "local"
    device: str = "auto"
    workers: int | None = None
    address: str | None = None
    seat: tuple[int, int] = (0, 1)
    """Number of this process among how many that make each row together; the engine's to say."""

    @property
    def follows(self) -> bool:
        """Whether another process takes the rows, and tells how they ended."""
        return self.seat[0] > 0


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that could begin: its rows, and which of this shard are left.

    `pending` are indices into the table in the order in which they will be made.
    """

    options: Options
    table: Table
    store: Store
    rows: int
    pending: list[int]
    refused: tuple[Refused, ...]

    @property
    def before(self) -> int:
        """Rows that are done already."""
        return self.rows - len(self.pending)

    def groups(self) -> list[tuple[Group, int]]:
        """What is left by group, in the order in which it will be made, with numbers of rows."""
        counts = Counter(self.table.group_of[i] for i in self.pending)
        return [(self.table.groups[group], count) for group, count in counts.items()]

    def check(self) -> None:
        """Raises `ManifestError` if a row cannot run and the others are not to go on."""
        if not self.refused or self.options.keep_going:
            return
        first, others = self.refused[0], sum(it.rows for it in self.refused) - 1
        told = f"{self.options.manifest}, line {first.line}: {first.why}"
        if others:
            told += f"; {others:,} more {'row' if others == 1 else 'rows'} cannot run either"
        raise ManifestError(f"{told}; nothing was started: --keep-going runs the others")


Refusal = Callable[[Request], str | None]


def prepare(options: Options, refuses: Refusal = refusal) -> Batch:
    """Read the manifest, and the folder for what is done; nothing is written.

    `refuses` says of a request why no worker could make any like it. Raises `KinoraError`; rows
    that cannot run are told by `Batch.check`.
    """
    engine = engines.find(options.engine)
    shard, shards = options.shard
    if not 1 <= shard <= shards:
        raise RequestError(f"shards of {shards} are 1/{shards} to {shards}/{shards}, not {shard}")
    if not 0 <= options.retries <= 1000:
        raise RequestError(f"--retries must be 0 to 1000, not {options.retries}")
    if options.address is not None and options.engine != "ray":
        raise RequestError(f"--address is of --engine ray, and the engine is {options.engine}")
    if options.workers is not None and not 1 <= options.workers <= MAX_WORKERS:
        raise RequestError(f"--workers must be 1 to {MAX_WORKERS}, not {options.workers}")
    rows = table.build(options.manifest, options.defaults, options.seeds)
    options = engine.adapt(options, _processes(rows))
    shard, shards = options.shard
    store = Store(options.output)
    store.check(options.manifest, rows)
    mine = rows.order()[shard - 1 :: shards]
    done = store.done()
    pending = [i for i in mine if rows.ids[i] not in done]
    refused = list(rows.refused)
    hopeless = _hopeless(rows, pending, refuses, refused)
    if hopeless:
        pending = [i for i in pending if rows.group_of[i] not in hopeless]
        mine = [i for i in mine if rows.group_of[i] not in hopeless or rows.ids[i] in done]
    if options.follows:
        mine, pending = [], []
    return Batch(options, rows, store, len(mine), pending, tuple(refused))


def _processes(rows: Table) -> int:
    """How many make a row together. Raises `RequestError` where rows ask for different numbers."""
    asked = {processes(json.loads(it.recipe)) for it in rows.groups} or {1}
    if len(asked) > 1:
        told = " and ".join(str(it) for it in sorted(asked))
        raise RequestError(
            f"rows ask for {told} processes a video (parallel): make a batch of each number"
        )
    return asked.pop()


def _hopeless(
    rows: Table, pending: list[int], refuses: Refusal, refused: list[Refused]
) -> set[int]:
    """The groups of which no row can be made; their rows are added to those `refused`."""
    firsts: dict[int, int] = {}
    counts: dict[int, int] = {}
    for i in pending:
        group = rows.group_of[i]
        firsts.setdefault(group, i)
        counts[group] = counts.get(group, 0) + 1
    found = set[int]()
    for group, first in firsts.items():
        row = rows.row(first)
        why = refuses(row.request.request())
        if why is not None:
            found.add(group)
            refused.append(Refused(row.line, why, counts[group]))
    return found


def run(
    batch: Batch, *, make: Make = Studio, stop: threading.Event | None = None
) -> Generator[Standing | Ended | Notice | Summary, None, None]:
    """Make what is left; yields how it stands, each attempt that ended, and last a `Summary`.

    Closing the generator, or setting `stop`, ends it within a step; what is done stays done, and
    preparing and running it again goes on from there. Raises `KinoraError` where nothing can start.
    """
    batch.check()

    def job(port: Port[Standing | Ended]) -> Summary:
        return _run(batch, make, port)

    return stream(job, stop)


def _run(batch: Batch, make: Make, port: Port[Standing | Ended]) -> Summary:
    options, store = batch.options, batch.store
    refused = sum(it.rows for it in batch.refused)
    summary = Summary(batch.rows, batch.before, refused)
    for it in batch.refused[:_MOST_NOTICES]:
        port.notice(f"line {it.line} is left out: {it.why}")
    store.claim(options.manifest, batch.table)
    if batch.pending or options.seat[1] > 1:
        _make(batch, make, port, summary)
    summary.others_complete = engines.find(options.engine).agree(summary.complete)
    return summary


def _make(batch: Batch, make: Make, port: Port[Standing | Ended], summary: Summary) -> None:
    options, store = batch.options, batch.store
    engine = engines.find(options.engine)
    where, threads = engine.places(options, len(batch.pending) or 1)
    summary.workers = len(where)
    schedule = Schedule(batch.table, batch.pending, options.retries)
    told = _Told(batch, summary, Pace(schedule.total_work), schedule, port)
    with store.drafting() as drafts:
        job = Job(schedule, options.output.absolute(), drafts, make, where, threads, port.check,
                  seat=options.seat)  # fmt: skip
        happening = engine.run(job)
        try:
            for event in happening:
                told.hear(event)
        except OutputError as error:
            summary.blocked = str(error)
        finally:
            happening.close()
            summary.elapsed_s = told.pace.elapsed_s


@dataclass
class _Told:
    """Turns what an engine says into what the caller is told, and into lines of the status."""

    batch: Batch
    summary: Summary
    pace: Pace
    schedule: Schedule
    port: Port[Standing | Ended]

    def __post_init__(self) -> None:
        self._notices = set[str]()
        self._doing: dict[int, str] = {}

    def hear(self, event: Step | Heard | Notice | None) -> None:
        """Raises `OutputError` where the status cannot be written."""
        if isinstance(event, Notice):
            self._notice(event.text)
        elif isinstance(event, Step):
            self.pace.under_way[event.index] = event.share * self.schedule.work_of(event.index)
            self._doing[event.worker] = event.told
        elif isinstance(event, Heard):
            self._ended(event)
        else:
            self.port.emit(self._standing())

    def _ended(self, heard: Heard) -> None:
        index, ended = heard.index, heard.ended
        self.pace.under_way.pop(index, None)
        if ended.status in ("done", "failed"):
            self.pace.ended += self.schedule.work_of(index)
        rows = self.batch.table
        self.summary.add(ended, rows.groups[rows.group_of[index]])
        if ended.status != "stopped":
            try:
                self.batch.store.append(ended.to_json())
            except OSError as error:
                raise explain(error, self.batch.store.path) from None
        self.port.emit(ended)

    def _standing(self) -> Standing:
        it = self.summary
        doing = tuple(self._doing[worker] for worker in sorted(self._doing))
        pace = self.pace
        return Standing(it.rows, it.before + it.done, it.failed, it.left, pace.elapsed_s,
                        pace.eta_s, doing)  # fmt: skip

    def _notice(self, text: str) -> None:
        if text not in self._notices and len(self._notices) <= _MOST_NOTICES:
            self._notices.add(text)
            more = len(self._notices) > _MOST_NOTICES
            self.port.notice("there are further notices, of rows alone" if more else text)


def shard_of(text: str) -> tuple[int, int]:
    """`i/n` as numbers, counted from 1. Raises `RequestError`."""
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*", text)
    shard, shards = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= shard <= shards:
        allowed = f"1/{shards} to {shards}/{shards}" if shards else "such as 1/8 to 8/8"
        raise RequestError(f"--shard must be {allowed}, not {text!r:.40}: shards count from 1")
    return shard, shards
