"""A process for each GPU of this machine, or several on its CPU; no tensors pass between them.

Each process is told rows through a pipe of its own, so that one that is killed blocks no other. A
process that ends by itself is started again. If it had one row, that attempt has failed; of two,
each is made again with no other beside it, so that a row which brings its process down takes no
other with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Cancelled, GenerationError, OutputError, RequestError
from ...events import Notice
from ...files import explain
from .. import logs
from .engine import Heard, Job, Places, Step
from .held import Held
from .process import END, STOP, Answer, Asked, Desk, Ready, Stop, Told, work

if TYPE_CHECKING:
    from ..run import Options

_TICK_S = 0.2
_STARTS, _KILLED_STARTS = 3, 20
"""How often a process may end before it has started at all: by itself, and by a signal."""

Event = Step | Heard | Notice | None
"""What an engine says."""


def engine() -> Local:
    """The engine."""
    return Local()


class Local:
    """Processes on this machine."""

    def adapt(self, options: Options, processes: int = 1) -> Options:
        """All that is asked for. Raises `RequestError` where that needs other processes."""
        if processes > 1:
            raise RequestError(
                f"parallel asks for {processes} processes a video: use torchrun --nproc-per-node "
                f"{processes} -m kinora.app batch … --engine torchrun, or leave [parallel] out"
            )
        return options

    def places(self, options: Options, rows: int) -> Places:
        """Devices of this machine. Raises `RequestError` for one that is not here."""
        return devices(options.device, options.workers, rows)

    def agree(self, complete: bool) -> bool:
        """There are no others."""
        return complete

    def run(self, job: Job) -> Generator[Event, None, None]:
        """Yields what happens; see `Engine`."""
        _start_tracker()
        pool = [_Worker(job, number) for number in range(len(job.devices))]
        try:
            for worker in pool:
                worker.start()
            while True:
                job.check()
                for worker in pool:
                    worker.drop()
                    worker.feed()
                if not job.schedule.left and not any(len(worker.turns) for worker in pool):
                    break
                yield from _listen(pool, job.bell)
                yield None
            yield from _end(pool, END)
        except (Cancelled, OutputError):
            yield from _end(pool, STOP, END)
            raise
        finally:
            for worker in pool:
                worker.kill()


def devices(device: str, workers: int | None, rows: int) -> Places:
    """The device of each worker, and the CPU threads of each (None: as torch has them).

    Raises `RequestError` for a device that is not here.
    """
    found = _devices(device)
    count = min(workers or len(found), rows)
    where = tuple(found[number % len(found)] for number in range(count))
    if count == 1 or found != ["cpu"]:
        return where, None
    return where, max(1, len(os.sched_getaffinity(0)) // count)


def _devices(device: str) -> list[str]:
    if device == "cpu":
        return ["cpu"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = [f"cuda:{number}" for number in range(count)]
    if torch.backends.mps.is_available():
        known.append("mps")
    if device == "auto":
        return known or ["cpu"]
    if device == "cuda" and count:
        return known[:count]
    if device in known:
        return [device]
    raise RequestError(
        f"there is no device {device} here: choose from {', '.join(['cpu', *known])}"
    )


def _start_tracker() -> None:
    """Start what counts the semaphores of processes, without its remark at the end.

    A library's progress bars have one in each worker; those of workers that were killed are said to
    have leaked.
    """
    before = os.environ.get("PYTHONWARNINGS")
    ours = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ours if before is None else f"{before},{ours}"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _listen(pool: list[_Worker], bell: int | None = None) -> Generator[Event, None, None]:
    """What any of them has to say, soon; nothing where the bell rings."""
    heard = {it: worker for worker in pool for it in worker.ears()}
    bells = [] if bell is None else [bell]
    rung = wait([*heard, *bells], _TICK_S)
    if bell is not None and bell in rung:
        os.eventfd_read(bell)
    for worker in dict.fromkeys(heard[it] for it in rung if it in heard):
        yield from worker.hear()


def _end(pool: list[_Worker], *last: str) -> Generator[Event, None, None]:
    """Tell all to end, and hear what they say until they have, which may take a step."""
    for worker in pool:
        worker.ending = True
        for message in last:
            worker.tell(message)
    while any(worker.ears() for worker in pool):
        with suppress(OutputError):  # it is why they end
            yield from _listen(pool)


@dataclass(eq=False)
class _Worker:
    """One process, and those that follow it."""

    job: Job
    number: int
    process: Any = None
    connection: Connection | None = None
    log: Path = Path()
    ready: bool = False
    starts: int = 0
    ill: bool = False
    ending: bool = False

    def __post_init__(self) -> None:
        self.turns = Held(self.job, self.number)
        self.dropped = set[int]()

    def start(self) -> None:
        """Start a process."""
        job = self.job
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
        try:
            own = job.drafts.own(f"worker-{self.number}")
        except OSError as error:
            raise explain(error, job.folder) from None
        self.log = job.drafts.folder / f"{own.name}.log"
        device = job.devices[self.number]
        desk = Desk(job.make, device, job.threads, job.folder, job.drafts.folder, own, self.log)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, desk), name=f"kinora-batch-{self.number}"
        )
        self.process.start()
        theirs.close()  # or its end would go unnoticed here
        self.ready, self.ill = False, False
        self.starts += 1

    def ears(self) -> list[Any]:
        """What to wait for."""
        return [] if self.connection is None else [self.connection, self.process.sentinel]

    def feed(self) -> None:
        """Ask it for as many rows as it can have at a time."""
        while self.ready and not self.ill and (turn := self.turns.take()) is not None:
            self.tell(Asked(turn.index, turn.row, turn.attempt))

    def drop(self) -> None:
        """Have it stop what nobody wants any more."""
        for turn in self.turns:
            index = turn.index
            how = self.job.schedule.unwanted(turn)
            if how == "kill":
                self.process.kill()  # its end is noticed elsewhere
            elif how == "stop" and index not in self.dropped:
                self.dropped.add(index)
                self.tell(Stop(index))

    def tell(self, message: object) -> None:
        """Send it something; that it has ended is noticed elsewhere."""
        if self.connection is not None:
            with suppress(OSError):
                self.connection.send(message)

    def hear(self) -> Generator[Event, None, None]:
        """What it has to say, and its end."""
        assert self.connection is not None
        gone = not self.process.is_alive()  # asked first: what it said before is in the pipe
        try:
            while self.connection.poll():
                yield from self._answer(self.connection.recv())
        except (EOFError, OSError):
            gone = True
        if gone:
            yield from self._ended()

    def _answer(self, message: Any) -> Generator[Event, None, None]:
        if isinstance(message, Ready):
            self.ready, self.starts = True, 0
        elif isinstance(message, Told):
            yield Step(message.index, self.number, message.progress)
        elif isinstance(message, Answer):
            self.ill = self.ill or not message.healthy  # the other row may yet end well
            self.dropped.discard(message.index)
            yield self.turns.heard(message.index, message.ended)
        else:
            yield message

    def _ended(self) -> Generator[Event, None, None]:
        """It has ended: whose fault was it? Starts the next one."""
        self.process.join()
        status = self.process.exitcode
        why = "its accelerator answers no more" if self.ill else _why(status, self.log)
        self._close()
        self.dropped.clear()
        if not self.ready and self.starts >= (_STARTS if status >= 0 else _KILLED_STARTS):
            raise GenerationError(f"worker {self.number} does not start: {why}")
        yield from self.turns.lost(why, ill=self.ill, ending=self.ending)
        if self.job.schedule.left and not self.ending:
            yield Notice(f"worker {self.number} is started again: {why}")
            self.start()

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._close()

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _why(status: int, log: Path) -> str:
    """How a process ended, in words, with the last that it had to say."""
    if status >= 0:
        told = f"the worker process ended with exit status {status}"
    else:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        told = f"the worker process was ended by {name}"
        if name == "SIGKILL":
            told += ", as by a system that is out of memory"
    return told + logs.last(log)
