"""Runs a job in a thread of its own and yields what it reports; closing the generator stops it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

from .errors import Cancelled
from .events import Notice, Progress
from .run import Run

Event = Progress | Notice | Run
THREAD = "kinora-run"


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Channel:
    """The job's side: it reports through `emit` and gives up where `check` raises."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.queue: queue.SimpleQueue[Event | _Failed] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._stop = stop or self._closed

    def emit(self, event: Event) -> None:
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


def stream(
    job: Callable[[Channel], Run], stop: threading.Event | None = None
) -> Generator[Event, None, None]:
    """Yield the job's events; the last is its `Run`. Raises what the job raises.

    Closing the generator, or an exception in the consumer's thread while it waits here (Ctrl-C),
    stops the job at its next check and waits until it has cleaned up. `stop`, which any thread may
    set, does the same to a consumer that goes on waiting, and raises `Cancelled` there.
    """
    channel = Channel(stop)

    def work() -> None:
        try:
            channel.emit(job(channel))
        except BaseException as error:
            channel.queue.put(_Failed(error))

    thread = threading.Thread(target=work, name=THREAD, daemon=True)
    try:
        thread.start()
        while True:
            event = channel.queue.get()
            if isinstance(event, _Failed):
                raise event.error
            yield event
            if isinstance(event, Run):
                return
    finally:
        channel.close()
        if thread.ident is not None:
            thread.join()


def running() -> bool:
    """Whether a job is still at work: a second Ctrl-C ends the wait for it."""
    return any(thread.name == THREAD for thread in threading.enumerate())
