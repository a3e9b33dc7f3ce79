"""What runs in a worker process of the `local` engine. Imports torch only to make rows."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...events import Notice, Progress
from .. import logs
from ..attempt import Ended, attempt
from ..making import Fragile, Make, Maker
from ..rows import Row
from ..store import Drafts, Store
from .held import LANES

_GRACE_S = 10.0  # for a step to end, once nobody waits for it any more
_TELL_S = 0.5
STOP, END = "stop", "end"


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a worker works."""

    make: Make
    device: str | None
    threads: int | None
    folder: Path
    drafts: Path
    own: Path
    log: Path


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has started."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One attempt at a row, as asked of a worker."""

    index: int
    row: Row
    attempt: int


@dataclass(frozen=True, slots=True)
class Stop:
    """That attempt is to end within a step."""

    index: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of that attempt; without `healthy` the worker ends itself now."""

    index: int
    ended: Ended
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Told:
    """Progress of it."""

    index: int
    progress: Progress


def work(connection: Connection, desk: Desk) -> None:
    """Make the rows that come through `connection`, until `END` or until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    logs.write_to(desk.log)
    if desk.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(desk.threads))
    drafts = Drafts(desk.drafts)
    drafts.hold()
    if not _Worker(connection, desk).run():
        drafts.release()
        Store(desk.folder).sweep()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is on disk and told; taking torch apart takes seconds


class _Worker:
    def __init__(self, connection: Connection, desk: Desk) -> None:
        self._connection, self._desk = connection, desk
        self._sending = threading.Lock()
        self._stops: dict[int, threading.Event] = {}
        self._maker: Maker | None = None

    def run(self) -> bool:
        """Until nobody asks any more; whether there is still somebody who could."""
        with ThreadPoolExecutor(LANES) as lanes:
            try:
                self._maker = Fragile(self._desk.make())
                self._send(Ready())
                while (asked := self._connection.recv()) != END:
                    if asked == STOP:
                        self._stop_all()
                    elif isinstance(asked, Stop):
                        if asked.index in self._stops:  # else it has ended meanwhile
                            self._stops[asked.index].set()
                    else:
                        self._stops[asked.index] = threading.Event()
                        lanes.submit(self._make, asked)
                return True
            except (EOFError, OSError):
                self._orphaned()
        return False

    def _make(self, asked: Asked) -> None:
        assert self._maker is not None
        desk, last_s, stage = self._desk, 0.0, ""
        logs.shorten()

        def report(event: Progress | Notice) -> None:
            nonlocal last_s, stage
            if isinstance(event, Notice):
                self._send(event)
            elif event.stage != stage or event.preview or time.monotonic() - last_s > _TELL_S:
                last_s, stage = time.monotonic(), event.stage
                self._send(Told(asked.index, event))

        place = (desk.device, desk.folder, desk.own)
        stop = self._stops[asked.index]
        ended = attempt(self._maker, asked.row, asked.attempt, place, stop, report)
        del self._stops[asked.index]
        healthy = ended.status != "failed" or self._maker.recovers()
        self._send(Answer(asked.index, ended, healthy))
        if not healthy:
            os._exit(1)  # drafts are left: another row may be among them

    def _send(self, message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:  # the other side is gone: the reading thread sees it too
            self._stop_all()

    def _stop_all(self) -> None:
        for stop in list(self._stops.values()):
            stop.set()

    def _orphaned(self) -> None:
        """The parent is gone: end within a step or the grace, whichever is first."""
        self._stop_all()

        def end() -> None:
            time.sleep(_GRACE_S)
            os._exit(1)  # drafts are swept by the next run

        threading.Thread(target=end, daemon=True).start()
