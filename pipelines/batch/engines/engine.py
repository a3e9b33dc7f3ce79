"""What an engine is, and which there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...errors import RequestError, nearest
from ...events import Notice, Progress
from ..attempt import Ended
from ..making import Make
from ..schedule import Turns
from ..store import Drafts

if TYPE_CHECKING:
    from ..run import Options


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine is given: rows, where to work, and how.

    A worker for each of `devices` (None: as the rows say), of `threads` CPU threads (None: as torch
    has them). Makers are started by `make` in the workers; `check` raises `Cancelled` once all
    is to stop. `bell`, an event counter (`os.eventfd`), has the schedule asked at once.
    """

    schedule: Turns
    folder: Path
    drafts: Drafts
    make: Make
    devices: tuple[str | None, ...]
    threads: int | None
    check: Callable[[], None]
    bell: int | None = None
    seat: tuple[int, int] = (0, 1)
    """See `Options`."""


Places = tuple[tuple[str | None, ...], int | None]
"""The device of each worker, and the CPU threads of each, as in a `Job`."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far a row has come, and in which worker."""

    index: int
    worker: int
    progress: Progress

    @property
    def share(self) -> float:
        """From 0 to 1, of its denoising."""
        it = self.progress
        if it.stage in ("decode", "save"):
            return 1.0
        return it.step / it.steps if it.steps else 0.0

    @property
    def told(self) -> str:
        """Where it stands, in words."""
        it = self.progress
        return f"{it.doing} step {it.step}/{it.steps}" if it.steps else it.doing


@dataclass(frozen=True, slots=True)
class Heard:
    """An attempt that has ended, and the place of its row in the table.

    The schedule knows of it already: a status `retried` is a row that will come again.
    """

    index: int
    ended: Ended


class Engine(Protocol):
    """Makes what a schedule has left."""

    def adapt(self, options: Options, processes: int = 1) -> Options:
        """What this process does of what is asked for, where several share it.

        Args:
            processes: that make one row together.
        """
        ...

    def places(self, options: Options, rows: int) -> Places:
        """Where its workers are to be, for so many rows."""
        ...

    def run(self, job: Job) -> Generator[Step | Heard | Notice | None, None, None]:
        """Yields what happens, and None now and then while nothing does.

        Raises `Cancelled` when `job.check` does, `OutputError` where no row can be written any
        more. However it ends, no worker is left and nothing among the drafts.
        """
        ...

    def agree(self, complete: bool) -> bool:
        """Whether all processes that share the batch are complete, this one being so or not."""
        ...


ENGINES = ("local", "torchrun", "ray")
"""Names of all."""


def find(name: str) -> Engine:
    """The engine called so. Raises `RequestError`."""
    if name not in ENGINES:
        close = nearest(name, ENGINES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise RequestError(f"--engine must be {', '.join(ENGINES)}, not {name!r}{hint}")
    return importlib.import_module(f".{name}", __package__).engine()
