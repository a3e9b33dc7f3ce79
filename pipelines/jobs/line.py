"""The line at work: a thread that has one worker process make the jobs of a store, in turn."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Hashable
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal

from ..batch import store as batches
from ..batch.attempt import Ended
from ..batch.engines import Heard, Step
from ..batch.engines import Job as Work
from ..batch.engines.local import Local
from ..batch.making import Make
from ..batch.schedule import Turn
from ..batch.store import Drafts
from ..errors import Cancelled, KinoraError
from ..events import Notice, Progress
from .store import Job, Status, Store

_HOLD_S = 10.0  # between attempts where nothing can be made, as on a full disk
_ORPHAN_S = 0.2
_KILLED = "Kinora was ended while it was made"


class Line:
    """What the engine of batches takes its turns from; it has no end until it is closed.

    One job is made at a time, so that a crash has one cause. `progress`, `previews` with their
    steps, and `notices` are of jobs of this process, by id; `held` says why nothing is made where
    that is no job's fault.
    """

    def __init__(self, folder: Path, store: Store, make: Make) -> None:
        self._folder, self._store, self._make = batches.Store(folder), store, make
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = threading.Event()
        self._current: Job | None = None
        self.progress: dict[str, tuple[Progress, float]] = {}
        self.previews: dict[str, tuple[int, bytes]] = {}
        self.notices: dict[str, list[str]] = {}
        self.held: str | None = None
        self.thread = threading.Thread(target=self._work, name="kinora-jobs", daemon=True)

    def ring(self) -> None:
        """Have it look at the store at once."""
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Stop within a step; what is being made is `interrupted`, what waits stays queued."""
        self._closing.set()
        self.ring()
        if self.thread.ident is not None:
            self.thread.join()
        os.close(self._bell)

    @property
    def left(self) -> int:
        """Never none: more may come."""
        return 1

    def take(self, worker: Hashable, *, idle: bool = True) -> Turn | None:
        """The next job, for a worker that has none."""
        if not idle:
            return None
        job = self._current = self._store.take()
        return None if job is None else Turn(job.place, job.row, job.attempt, alone=True)

    def unwanted(self, turn: Turn) -> Literal["stop", "kill"] | None:
        """Whether its job was asked to stop, once or again."""
        job = self._store.get(turn.row.id)
        if job is None or not job.stopping:
            return None
        return "stop" if job.stopping == 1 else "kill"

    def failed(self, turn: Turn) -> bool:
        """Nothing is tried again unasked."""
        return False

    def lost(self, turn: Turn, *, suspected: bool) -> None:
        """What has become of it is settled by its `Ended`, or when the engine has ended."""

    def _check(self) -> None:
        if self._closing.is_set():
            raise Cancelled

    def _work(self) -> None:
        orphans, settle, why = True, "interrupted", _KILLED
        while not self._closing.is_set():
            try:
                if orphans:
                    self._await_orphans()
                    orphans = False
                self._settle(settle, why)
                with self._folder.drafting() as drafts:
                    self._store.note("drafts", drafts.folder.name)
                    self.held = None
                    self._run(drafts)
            except Cancelled:
                break
            except Exception as error:
                settle, why = "queued", _told(error)
                with suppress(KinoraError):
                    self._settle(settle, why)
                self.held = f"{why}; it is tried again in {_HOLD_S:.0f} s"
                self._closing.wait(_HOLD_S)
        with suppress(KinoraError):  # then the next start does it
            self._settle("interrupted", _KILLED)

    def _run(self, drafts: Drafts) -> None:
        work = Work(self, self._folder.path, drafts, self._make, (None,), None, self._check,
                    self._bell)  # fmt: skip
        with closing(Local().run(work)) as happening:
            for event in happening:
                if isinstance(event, Heard):
                    self._ended(event.ended, drafts)
                elif self._current is None:
                    continue
                elif isinstance(event, Step):
                    told = event.progress
                    self.progress[self._current.id] = told, time.monotonic()
                    if told.preview is not None:
                        self.previews[self._current.id] = told.step, told.preview
                elif isinstance(event, Notice):
                    self.notices.setdefault(self._current.id, []).append(event.text)

    def _ended(self, ended: Ended, drafts: Drafts) -> None:
        """Write down how the attempt at the current job has ended."""
        job = self._store.get(ended.id)
        if job is not None:
            status: Status = "done" if ended.status == "done" else "failed"
            kind, reason = ended.kind, ended.reason
            if ended.status == "stopped":
                status, reason = ("cancelled", None) if job.stopping else ("interrupted", _KILLED)
            elif kind == "WorkerCrash":
                self._rescue(job, drafts.folder)
                if job.stopping > 1:
                    status, kind, reason = "cancelled", None, None
            self._store.end(job.id, status, kind, reason)
        self._leave()

    def _leave(self) -> None:
        """Have no current job any more; how far it was is of no interest now."""
        if self._current is not None:
            self.progress.pop(self._current.id, None)
            self.previews.pop(self._current.id, None)
        self._current = None

    def _settle(self, status: str, why: str) -> None:
        """Have no job stand as running that nobody makes: one whose files are in place is done."""
        self._leave()
        for job in self._store.jobs(statuses=("running",)):
            suffix = f".{job.row.request.format}"
            if self._folder.has(job.row.name, suffix):
                self._store.end(job.id, "done")
                continue
            # A video without its sidecar is none.
            (self._folder.path / f"{job.row.name}{suffix}").unlink(missing_ok=True)
            self._rescue(job, self._folder.drafts)
            if job.stopping:
                self._store.end(job.id, "cancelled")
            elif status == "queued":
                self._store.put_back(job.id, why)
            else:
                self._store.end(job.id, "interrupted", None, why)

    def _rescue(self, job: Job, among: Path) -> None:
        """Keep the latents of an attempt whose process is gone."""
        for staging in among.rglob(job.id):
            batches.rescue(staging, self._folder.path, job.row.name)

    def _await_orphans(self) -> None:
        """Wait for a worker whose parent was killed: it ends soon, and may yet finish its job."""
        name = self._store.noted("drafts")
        if name is None:
            return
        drafts = Drafts(self._folder.drafts / name)
        while drafts.held():
            self.held = "the worker of an earlier start is ending"
            if self._closing.wait(_ORPHAN_S):
                raise Cancelled
        self.held = None


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, KinoraError) else repr(error)
