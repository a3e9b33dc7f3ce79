"""The desk: makes one request after the other, and stops one on demand.

It works in the main thread, which is where Ctrl-C arrives and ends the run that is being made; the
server has a thread of its own.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from ...pipelines import models
from ...pipelines.errors import Cancelled, KinoraError
from ...pipelines.generate import generate
from ...pipelines.request import Request
from ...pipelines.run import Output
from ...pipelines.saving import Kept
from ...pipelines.worker import Event

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has led to no `Run`, and why; `text` is one line.

    Of a request that was stopped it says which latents stay, if any do.
    """

    how: Literal["cancelled", "refused", "fault", "closed"]
    text: str = ""


class Job:
    """A request on its way. The desk puts into `news`, whoever submitted it takes out.

    What comes after a `Run` or an `Ended` means nothing. `finished` holds what is on disk so far,
    which stays there however the job ends.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.news: queue.SimpleQueue[Event | Ended] = queue.SimpleQueue()
        self.finished: list[Output] = []
        self.stop = threading.Event()

    async def wait(self, seconds: float) -> list[Event | Ended]:
        """What is new, waiting for it up to `seconds`; in order, perhaps nothing."""
        until = time.monotonic() + seconds
        while self.news.empty() and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        found: list[Event | Ended] = []
        while not self.news.empty():
            found.append(self.news.get())
        return found


class Desk:
    """Takes jobs from any thread; one thread makes them, keeping the model in between.

    `unfinished` gets the latents of a video that is being decoded when an exception ends the work.
    """

    def __init__(
        self, shelf: models.Shelf | None = None, unfinished: list[Kept] | None = None
    ) -> None:
        self._shelf = shelf or models.Shelf()
        self._unfinished = [] if unfinished is None else unfinished
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._current: Job | None = None

    def submit(self, request: Request) -> Job:
        """Put a request in the line."""
        job = Job(request)
        self._waiting.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ask for a job to end, in the line or at work; its last news say when it has."""
        job.stop.set()
        if self._current is not job:  # in the line, where it need not wait for its turn, or done
            job.news.put(Ended("cancelled"))

    def work(self, going_on: Callable[[], bool]) -> None:
        """Make jobs for as long as `going_on`, asked about once a second."""
        try:
            while going_on():
                try:
                    job = self._waiting.get(timeout=1)
                except queue.Empty:
                    continue
                self._make(job)
        finally:
            while not self._waiting.empty():
                self._waiting.get().news.put(Ended("closed"))

    def _make(self, job: Job) -> None:
        left: list[Kept] = []
        last: Ended | None = None
        self._current = job
        try:
            # Read after the line above: a cancel before it has told already that the job is over.
            last = Ended("cancelled") if job.stop.is_set() else self._run(job, left)
        except BaseException:
            last = Ended("closed", _remedies(left))
            self._unfinished += left
            raise
        finally:
            self._current = None
            if last is not None:
                job.news.put(last)

    def _run(self, job: Job, left: list[Kept]) -> Ended | None:
        """Make the job's videos. None once there is a `Run`, otherwise what ended it."""
        try:
            with closing(
                generate(
                    job.request,
                    shelf=self._shelf,
                    finished=job.finished,
                    unfinished=left,
                    stop=job.stop,
                )
            ) as events:
                for event in events:
                    job.news.put(event)
        except Cancelled:
            return Ended("cancelled", _remedies(left))
        except KinoraError as error:
            return Ended("refused", str(error))
        except Exception as error:
            return Ended("fault", fault(error))
        return None


def _remedies(left: list[Kept]) -> str:
    return "; ".join(it.remedy() for it in left)


def fault(error: Exception) -> str:
    """The one line for what should not happen; the traceback goes to stderr on demand."""
    if os.environ.get("KINORA_DEBUG"):
        traceback.print_exception(error)
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"a fault in Kinora: {message}; KINORA_DEBUG=1 shows where, please report it"
