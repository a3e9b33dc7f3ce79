"""How a worker makes one row: `Studio` does it by `generate`, tests put others in its place."""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from ..errors import Cancelled, KinoraError
from ..events import Notice, Progress
from ..files import Destination
from ..models import Shelf
from ..request import Request
from ..run import Run
from ..together import processes
from .replica import Leader, Place

Report = Callable[[Progress | Notice], None]
# After such an error every later call of the process fails too, other than for want of memory.
_BREAKS = re.compile(r"(?:(?:CUDA|HIP) error|Triton Error \[(?:CUDA|HIP)\]): (?!out of memory)")


class Maker(Protocol):
    """Lives in a worker. Two threads call `make`, so that one can write files meanwhile."""

    def make(
        self, request: Request, destination: Destination, stop: threading.Event, report: Report
    ) -> Run:
        """Make the one video of `request` into `destination`.

        Raises `Cancelled` within a step of `stop` being set, and what is wrong otherwise.
        """
        ...

    def recovers(self) -> bool:
        """Called after a failure: whether this process can go on."""
        ...


class Make(Protocol):
    """Starts a maker in each worker; goes there by its name, as a class or function of a module."""

    def __call__(self) -> Maker:
        """A new maker."""
        ...


class Fragile:
    """A maker whose process ends once its accelerator is broken.

    Rows that come after the one that broke it, or are beside it, are stopped: no fault of theirs.
    """

    def __init__(self, maker: Maker) -> None:
        self._maker = maker
        self._broken = False
        self._lock = threading.Lock()

    def make(
        self, request: Request, destination: Destination, stop: threading.Event, report: Report
    ) -> Run:
        """As the maker does."""
        if self._broken:
            raise Cancelled
        try:
            return self._maker.make(request, destination, stop, report)
        except Exception as error:
            with self._lock:
                if self._broken:
                    raise Cancelled from error
                self._broken = breaks(error)
            raise

    def recovers(self) -> bool:
        """Whether this process can go on."""
        self._broken = self._broken or not self._maker.recovers()
        return not self._broken


def breaks(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the accelerator answers this process no more.

    An illegal address or a failed assertion on a GPU is a `RuntimeError` of that message.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RuntimeError) and _BREAKS.match(str(cause)):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


class Studio:
    """Makes rows by `generate`; the model stays loaded from one to the next.

    With `previews`, progress comes with pictures now and then.
    """

    def __init__(self, *, previews: bool = False) -> None:
        self._shelf, self._previews = Shelf(), previews
        self._lock = threading.Lock()
        self._leader: Leader | None = None
        self._devices = set[str]()
        self._unfinished = 0
        """Rows that other processes make too, and may wait in."""

    def make(
        self, request: Request, destination: Destination, stop: threading.Event, report: Report
    ) -> Run:
        """Make the video; while its files are written the next row has the model."""
        from ..generate import generate

        leader = self._leading(request)
        self._devices.add(request.device)

        def share() -> None:
            if leader is not None:
                self._unfinished += 1
                leader.share(request)

        events = generate(
            request,
            shelf=self._shelf,
            destination=destination,
            stop=stop,
            share=share,
            previews=self._previews,
        )
        for event in events:
            if isinstance(event, Run):
                self._unfinished -= leader is not None
                return event
            report(event)
        raise RuntimeError("the run ended without a result")

    def _leading(self, request: Request) -> Leader | None:
        """What has other processes make `request` too; None where this one makes it alone."""
        assert isinstance(request.recipe, dict)
        place = Place.of_environment()
        if place is None or processes(request.recipe) == 1:
            return None
        with self._lock:
            if self._leader is None:
                self._leader = Leader(place, request.device)
            return self._leader

    def recovers(self) -> bool:
        """Free what the failed row held; False where the accelerator answers no more.

        Nor can it go on where others made the row too: they may wait for what does not come.
        """
        if self._unfinished:
            return False
        torch = sys.modules.get("torch")
        if torch is None:
            return True
        gc.collect()
        if not torch.cuda.is_initialized():
            return True
        try:
            for device in self._devices:  # this thread's own is the first GPU, whichever is in use
                torch.cuda.synchronize(device if device.startswith("cuda") else None)
            torch.cuda.empty_cache()
        except RuntimeError:  # such as an illegal address, after which every call fails
            return False
        return True


def with_previews() -> Maker:
    """A `Studio` that shows what it is at."""
    return Studio(previews=True)


def refusal(request: Request) -> str | None:
    """Why no run of this model and recipe can be; None where nothing speaks against it."""
    from ..planning import plan

    try:
        predicted = plan(request)
    except KinoraError as error:
        return str(error)
    return next((part.why for part in predicted.parts if part.verdict == "refused"), None)
