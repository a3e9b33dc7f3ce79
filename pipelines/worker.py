"""Runs a job in a thread of its own and yields what it reports; closing the generator stops it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import Cancelled
from .events import Notice, Progress
from .run import Run

Event = Progress | Notice | Run
THREAD = "kinora-run"
_E = TypeVar("_E")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Finished:
    result: Any


class Port(Generic[_E]):
    """The job's side: it reports through `emit` and gives up where `check` raises."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.queue: queue.SimpleQueue[_E | Notice | _Finished | _Failed] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._stop = stop or self._closed

    def emit(self, event: _E | Notice) -> None:
        """Report to the consumer."""
        self.queue.put(event)

    def notice(self, text: str) -> None:
        """Report a `Notice`."""
        self.emit(Notice(" ".join(text.split())))

    def close(self) -> None:
        """Ask the job to end at its next `check`."""
        self._closed.set()

    def check(self) -> None:
        """Raises `Cancelled` if nobody wants the result any more."""
        if self._closed.is_set() or self._stop.is_set():
            raise Cancelled


Channel = Port[Progress]
"""That of a run."""


def stream(
    job: Callable[[Port[_E]], _R], stop: threading.Event | None = None
) -> Generator[_E | Notice | _R, None, None]:
    """Yield the job's events; the last is its result. Raises what the job raises.

    Closing the generator, or an exception in the consumer's thread while it waits here (Ctrl-C),
    stops the job at its next check and waits until it has cleaned up. `stop`, which any thread may
    set, does the same to a consumer that goes on waiting, and raises `Cancelled` there.
    """
    channel = Port[_E](stop)

    def work() -> None:
        try:
            channel.queue.put(_Finished(job(channel)))
        except BaseException as error:
            channel.queue.put(_Failed(error))

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    try:
        thread.start()
        while True:
            event = channel.queue.get()
            if isinstance(event, _Failed):
                raise event.error
            if isinstance(event, _Finished):
                yield event.result
                return
            yield event
    finally:
        channel.close()
        if thread.ident is not None:
            thread.join()


def running() -> bool:
    """Whether a job is still at work: a second Ctrl-C ends the wait for it."""
    return any(thread.name == THREAD for thread in threading.enumerate())
