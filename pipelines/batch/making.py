"""How a worker makes one row: `Studio` does it by `generate`, tests put others in its place."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from ..errors import KinoraError
from ..events import Notice, Progress
from ..files import Destination
from ..models import Shelf
from ..request import Request
from ..run import Run

Report = Callable[[Progress | Notice], None]


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


class Studio:
    """Makes rows by `generate`; the model stays loaded from one to the next."""

    def __init__(self) -> None:
        self._shelf = Shelf()

    def make(
        self, request: Request, destination: Destination, stop: threading.Event, report: Report
    ) -> Run:
        """Make the video; while its files are written the next row has the model."""
        from ..generate import generate

        for event in generate(request, shelf=self._shelf, destination=destination, stop=stop):
            if isinstance(event, Run):
                return event
            report(event)
        raise RuntimeError("the run ended without a result")

    def recovers(self) -> bool:
        """Free what the failed row held; False where the accelerator answers no more."""
        torch = sys.modules.get("torch")
        if torch is None:
            return True
        gc.collect()
        if not torch.cuda.is_initialized():
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:  # such as an illegal address, after which every call fails
            return False
        return True


def refusal(request: Request) -> str | None:
    """Why no run of this model and recipe can be; None where nothing speaks against it."""
    from ..planning import plan

    try:
        predicted = plan(request)
    except KinoraError as error:
        return str(error)
    return next((part.why for part in predicted.parts if part.verdict == "refused"), None)
