"""The desk: makes one request after the other in the main thread, and stops one on demand.

`generate` is stopped by an exception in the thread that waits for its events, which is how Ctrl-C
ends a run of the command line: at the next check of the worker, so within a step, and leaving
nothing behind. Only a signal reaches a thread that waits, and only the main thread takes signals;
therefore the main thread makes the videos and the server has a thread of its own.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from ...pipelines import models
from ...pipelines.errors import KinoraError
from ...pipelines.generate import generate
from ...pipelines.request import Request
from ...pipelines.worker import Event

_SIGNAL = signal.SIGUSR1
_KNOCKS, _KNOCK_S = 100, 0.005
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has led to no `Run`, and why; `text` is one line."""

    how: Literal["cancelled", "refused", "fault", "closed"]
    text: str = ""


class Job:
    """A request on its way. The desk puts into `news`, whoever submitted it takes out.

    What comes after a `Run` or an `Ended` means nothing.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.news: queue.SimpleQueue[Event | Ended] = queue.SimpleQueue()
        self.cancelled = False

    async def wait(self, seconds: float) -> list[Event | Ended]:
        """What is new, waiting for it up to `seconds`; in order, perhaps nothing."""
        until = time.monotonic() + seconds
        while self.news.empty() and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        found: list[Event | Ended] = []
        while not self.news.empty():
            found.append(self.news.get())
        return found


class _Cancel(BaseException):
    """Ends the run of the current job; not an `Exception`, so that nothing on the way keeps it."""


class Desk:
    """Takes jobs from any thread; the main thread makes them, keeping the model in between."""

    def __init__(self, shelf: models.Shelf | None = None) -> None:
        self._shelf = shelf or models.Shelf()
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._current: Job | None = None

    def submit(self, request: Request) -> Job:
        """Put a request in the line."""
        job = Job(request)
        self._waiting.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ask for a job to end, in the line or at work; its last news say when it has."""
        if job.cancelled:
            return
        job.cancelled = True
        if self._current is not job:  # in the line, where the desk will pass it over, or done
            job.news.put(Ended("cancelled"))
        for _ in range(_KNOCKS):
            if self._current is not job:
                return
            # One that comes just before the main thread begins to wait is taken only after that.
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
            time.sleep(_KNOCK_S)

    def work(self, going_on: Callable[[], bool]) -> None:
        """Make jobs for as long as `going_on`, asked about once a second; in the main thread."""
        signal.signal(_SIGNAL, self._interrupt)
        try:
            while going_on():
                try:
                    job = self._waiting.get(timeout=1)
                except queue.Empty:
                    continue
                self._make(job)
        finally:
            signal.signal(_SIGNAL, signal.SIG_IGN)  # a late knock must not end the process
            while not self._waiting.empty():
                self._waiting.get().news.put(Ended("closed"))

    def _interrupt(self, *_: object) -> None:
        """The signal's handler, in the main thread: once a job, and never outside of one."""
        if self._current is not None and self._current.cancelled:
            self._current = None
            raise _Cancel

    def _make(self, job: Job) -> None:
        last: Ended | None = Ended("closed")
        try:
            self._current = job
            # A cancel that came before the line above sent no signal.
            last = Ended("cancelled") if job.cancelled else self._run(job)
            self._current = None
        except _Cancel:
            last = Ended("cancelled")
        finally:
            self._current = None
            if last is not None:
                job.news.put(last)

    def _run(self, job: Job) -> Ended | None:
        """Make the job's videos. None once there is a `Run`, otherwise what ended it."""
        try:
            with closing(generate(job.request, shelf=self._shelf)) as events:
                for event in events:
                    job.news.put(event)
        except KinoraError as error:
            return Ended("refused", str(error))
        except Exception as error:
            return Ended("fault", fault(error))
        return None


def fault(error: Exception) -> str:
    """The one line for what should not happen; the traceback goes to stderr on demand."""
    if os.environ.get("KINORA_DEBUG"):
        traceback.print_exception(error)
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"a fault in Kinora: {message}; KINORA_DEBUG=1 shows where, please report it"
