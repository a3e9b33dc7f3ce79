"""Workers of a Ray cluster: an actor for each GPU, which loads the model once and takes rows.

A row and how it ended are all that passes between machines; videos go from the actors to the folder
of the batch, which all machines must share. Actors that die are started anew, elsewhere if need be,
by the rules of `turns`. Plain actors, not those of Ray Data: which row comes next, whether a row is
tried again, and with no other beside it, is for the schedule to say, as with every engine.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import Cancelled, GenerationError, OutputError, RequestError
from ...events import Notice, Progress
from ..attempt import Ended, attempt
from ..making import Fragile, Maker
from ..rows import Row
from ..store import Drafts
from .engine import Job, Places, Step
from .held import LANES, Held
from .local import Event, Local
from .process import Desk

if TYPE_CHECKING:
    from ..run import Options

INSTALL = 'pip install --editable ".[ray]"'
_TICK_S = 0.2
_ASK_S = 1.0
_STARTS = 3
_LATE_S = 60.0
_CLOSE_S = 10.0
_END_S = 600.0  # for steps to end, and files to be written


def engine() -> Ray:
    """The engine."""
    return Ray()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise RequestError(
            f"--engine ray needs ray, which is not installed: `{INSTALL}` in the clone brings it"
        ) from None


class Ray(Local):
    """Actors of a cluster, or of one that is started on this machine."""

    def adapt(self, options: Options, processes: int = 1) -> Options:
        """All that is asked for, in a folder of one name everywhere. Raises `RequestError`."""
        _ray()
        if options.device not in ("auto", "cpu", "cuda"):
            raise RequestError(
                f"--device is {options.device}: with --engine ray it can be auto, cuda or cpu, and "
                f"Ray says which"
            )
        return replace(super().adapt(options, processes), output=options.output.absolute())

    def places(self, options: Options, rows: int) -> Places:
        """A worker for each GPU of the cluster. Raises `RequestError`."""
        ray = _ray()
        _connect(ray, options.address)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        if options.device == "cuda" and not gpus:
            raise RequestError("there is no GPU in this cluster of Ray: leave --device out")
        cuda = gpus > 0 and options.device != "cpu"
        most = gpus if cuda else int(there.get("CPU", 1))
        if options.workers is not None and options.workers > most:
            raise RequestError(
                f"--workers is {options.workers}, and this cluster of Ray has {most} "
                f"{'GPUs' if cuda else 'CPUs'}"
            )
        count = min(options.workers or (gpus if cuda else 1), rows)
        return ("cuda:0" if cuda else "cpu",) * count, None

    def run(self, job: Job) -> Generator[Event, None, None]:
        """Yields what happens; see `Engine`."""
        ray = _ray()
        pool = [_Replica(job, number, ray) for number in range(len(job.devices))]
        try:
            for it in pool:
                it.start()
            while True:
                job.check()
                for it in pool:
                    it.feed()
                if not job.schedule.left and not any(len(it.turns) for it in pool):
                    break
                yield from _listen(ray, pool)
                for it in pool:
                    yield from it.late()
                yield None
        except (Cancelled, OutputError):
            yield from _end(ray, pool)
            raise
        finally:
            closing = [it.actor.close.remote() for it in pool if it.actor is not None]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
            for it in pool:
                it.kill()


def _connect(ray: Any, address: str | None) -> None:
    """Raises `RequestError` where there is no cluster at `address`."""
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        quiet |= {"include_dashboard": False}
    try:
        with _own_sigterm():
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(
            f"there is no cluster of Ray at {address or 'this machine'}: {reason}"
        ) from None


@contextmanager
def _own_sigterm() -> Generator[None, None, None]:
    """Keep what the process does at SIGTERM.

    The handler that Ray installs prints a trace of the stack, and aborts the process three seconds
    later, whatever other handlers do. By Python's interface to C, as `signal.signal` is for the
    main thread alone.
    """
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    put.argtypes, put.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = get(signal.SIGTERM)
    try:
        yield
    finally:
        put(signal.SIGTERM, before)


def _listen(ray: Any, pool: list[_Replica]) -> Generator[Event, None, None]:
    """What any of them has to say, soon."""
    waited = {ref: it for it in pool for ref in it.waited()}
    if not waited:
        time.sleep(_TICK_S)
        return
    ready, _ = ray.wait(list(waited), num_returns=1, timeout=_TICK_S)
    for ref in ready:
        yield from waited[ref].hear(ref)


def _end(ray: Any, pool: list[_Replica]) -> Generator[Event, None, None]:
    """Tell all to end, and hear what they say until they have, which may take a step."""
    for it in pool:
        it.stop()
    end = time.monotonic() + _END_S
    while any(len(it.turns) for it in pool) and time.monotonic() < end:
        with suppress(OutputError):  # it is why they end
            yield from _listen(ray, pool)


@dataclass(eq=False)
class _Replica:
    """One actor, and those that follow it."""

    job: Job
    number: int
    ray: Any
    actor: Any = None
    ready: bool = False
    ending: bool = False
    starts: int = 0
    late_s: float = math.inf
    asked_s: float = 0.0

    def __post_init__(self) -> None:
        self.turns = Held(self.job, self.number)
        self._refs: dict[Any, str | int] = {}
        """What is waited for: `ready`, `told`, or the number of a row."""
        self._gpus = 0

    def start(self) -> None:
        """Start an actor."""
        job, device = self.job, self.job.devices[self.number]
        assert device is not None  # from `places`
        gpus = self._gpus = int(device.startswith("cuda"))
        kind = self.ray.remote(
            num_gpus=gpus, num_cpus=1, max_restarts=0, max_concurrency=LANES + 2
        )(Actor)
        drafts = job.drafts.folder
        desk = Desk(job.make, device, None, job.folder, drafts, drafts, drafts)
        self.actor = kind.remote(desk, self.number)
        self._refs = {self.actor.ready.remote(): "ready"}
        self.ready, self.starts = False, self.starts + 1
        self.late_s = time.monotonic() + _LATE_S

    def late(self) -> Generator[Event, None, None]:
        """Say once of an actor that it does not start: others may have what it needs."""
        if not self.ready and time.monotonic() > self.late_s:
            self.late_s = math.inf
            yield Notice(
                f"worker {self.number} has not started for {_LATE_S:.0f} s: Ray starts it once a "
                f"{'GPU' if self._gpus else 'CPU'} is free, which "
                f"`ray status` tells"
            )

    def waited(self) -> list[Any]:
        """What of it is to come; asks how far it is now and then."""
        now = time.monotonic()
        if self.ready and now - self.asked_s > _ASK_S and "told" not in self._refs.values():
            self._refs[self.actor.told.remote()] = "told"
            self.asked_s = now
        return list(self._refs)

    def feed(self) -> None:
        """Ask it for as many rows as it can have at a time."""
        while self.ready and (turn := self.turns.take()) is not None:
            row = turn.row.to_json()
            self._refs[self.actor.make.remote(turn.index, row, turn.attempt)] = turn.index

    def hear(self, ref: Any) -> Generator[Event, None, None]:
        """What came, or the end of the actor."""
        what = self._refs.pop(ref)
        try:
            value = self.ray.get(ref)
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.RayTaskError) as error:
            yield from self._ended(_why(error))
            return
        if what == "ready":
            self.ready, self.starts = True, 0
        elif what == "told":
            for index, progress in value[0]:
                yield Step(index, self.number, progress)
            yield from (Notice(text) for text in value[1])
        else:
            ended, healthy = value
            yield self.turns.heard(int(what), ended)
            if not healthy:
                yield from self._ended("its accelerator answers no more", ill=True)

    def _ended(self, why: str, *, ill: bool = False) -> Generator[Event, None, None]:
        why = f"the worker ended: {why}"
        self.kill()
        if not self.ready and self.starts >= _STARTS:
            raise GenerationError(f"worker {self.number} does not start: {why}")
        yield from self.turns.lost(why, ill=ill, ending=self.ending)
        if self.job.schedule.left and not self.ending:
            yield Notice(f"worker {self.number} is started again: {why}")
            self.start()

    def stop(self) -> None:
        """Have it stop within a step."""
        self.ending = True
        if self.actor is not None:
            self.actor.stop.remote()

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        if self.actor is not None:
            self.ray.kill(self.actor)
        self.actor, self.ready, self._refs = None, False, {}


def _why(error: Exception) -> str:
    lines = [it.strip() for it in str(error).splitlines() if it.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]


class Actor:
    """What runs in an actor; `LANES` threads make rows, another answers."""

    def __init__(self, desk: Desk, number: int) -> None:
        self._desk, self._stop = desk, threading.Event()
        self._drafts = Drafts(desk.drafts)
        try:
            self._drafts.hold()
            self._own = self._drafts.own(f"worker-{number}")
        except OSError as error:
            raise OutputError(
                f"{desk.folder} is not there on every machine of the cluster ({error.strerror}): "
                f"choose an --output on a disk that they share"
            ) from None
        self._maker: Maker = Fragile(desk.make())
        self._telling = threading.Lock()
        self._told: dict[int, Progress] = {}
        self._notices: list[str] = []

    def ready(self) -> None:
        """It has started."""

    def make(self, index: int, row: dict[str, Any], number: int) -> tuple[Ended, bool]:
        """One attempt at a row; and whether this process can go on."""

        def report(event: Progress | Notice) -> None:
            with self._telling:
                if isinstance(event, Notice):
                    self._notices.append(event.text)
                    return
                self._told[index] = event

        place = (self._desk.device, self._desk.folder, self._own)
        ended = attempt(self._maker, Row.from_json(row), number, place, self._stop, report)
        with self._telling:
            self._told.pop(index, None)
        return ended, ended.status != "failed" or self._maker.recovers()

    def told(self) -> tuple[list[tuple[int, Progress]], list[str]]:
        """How far its rows are, and notices since it was asked last."""
        with self._telling:
            notices, self._notices = self._notices, []
            return list(self._told.items()), notices

    def stop(self) -> None:
        """Stop what is being made, within a step."""
        self._stop.set()

    def close(self) -> None:
        """Hold the drafts no more, so that they can be swept."""
        shutil.rmtree(self._own, ignore_errors=True)
        self._drafts.release()
