"""Processes that make each row of a batch together: one takes the rows, the others follow it.

The one that leads has a worker as any other; what it starts to make it writes into a store, where
the workers of the others read it. They are members of one group of torch.distributed, a generation.
Whichever of them ends, so does the generation: processes that wait for each other's tensors cannot
go on otherwise. The worker of the first is started again then, as any worker is, and that begins
the next generation, for which the others start theirs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import Cancelled
from ..request import Request
from . import logs

PLACE = "KINORA_REPLICA"
"""The variable by which workers know their replica."""
_TICK_S = 0.2
_LONG = timedelta(days=30)
_GENERATION, _END = "generation", "end"


@dataclass(frozen=True, slots=True)
class Place:
    """Number `rank` of the `count` processes of a replica, whose store is at `host` and `port`."""

    host: str
    port: int
    rank: int
    count: int

    @classmethod
    def of_environment(cls) -> Place | None:
        """That of this process; None where it works alone."""
        text = os.environ.get(PLACE)
        return cls(**json.loads(text)) if text else None

    def announce(self) -> None:
        """Have the processes that this one starts know it."""
        os.environ[PLACE] = json.dumps(asdict(self))

    def store(self) -> Any:
        """The store, which lives in the process that hosts it."""
        return _store(self.host, self.port, hosts=False)


def _store(host: str, port: int, *, hosts: bool) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=hosts, wait_for_workers=False, timeout=_LONG)


def hosted(host: str) -> Any:
    """A store of this process, at a free `port` of the machine that others call `host`."""
    return _store(host, 0, hosts=True)


def _join(place: Place, store: Any, generation: int, device: str) -> None:
    import torch
    from torch import distributed

    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "cpu:gloo",
        store=distributed.PrefixStore(f"{generation}/group", store),
        rank=place.rank,
        world_size=place.count,
    )


class Leader:
    """In the worker that takes rows: has the others make what it makes."""

    def __init__(self, place: Place, device: str) -> None:
        self._store = place.store()
        self._generation = int(self._store.add(_GENERATION, 1))
        _join(place, self._store, self._generation, device)
        self._rows = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def share(self, request: Request) -> None:
        """A row begins, which the others are to make too."""
        self._store.set(f"{self._generation}/{self._rows}", request.model_dump_json())
        self._rows += 1

    def _watch(self) -> None:
        """End with the others: what they do not send is waited for in vain."""
        store, broken = self._store.clone(), f"{self._generation}/broken"
        while not store.check([broken]):
            time.sleep(_TICK_S)
        print(store.get(broken).decode(), file=sys.stderr, flush=True)
        os._exit(1)


def _follow(place: Place, generation: int, device: str, log: Path) -> None:
    """In the worker of another: make what the first makes, until it is ended."""
    import signal

    from .. import models
    from ..files import LATENTS_SUFFIX, Destination
    from ..generate import generate

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.write_to(log)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    store, shelf, row = place.store(), models.Shelf(), 0
    _join(place, store, generation, device)
    while True:
        request = Request.model_validate_json(store.get(f"{generation}/{row}"))
        row += 1
        request = request.model_copy(update={"device": device})
        with TemporaryDirectory(prefix="kinora-") as folder:
            suffixes = (f".{request.format}", ".json", LATENTS_SUFFIX)
            destination = Destination(Path(folder), None, suffixes)
            for _ in generate(request, shelf=shelf, destination=destination):
                pass


def _end_with(parent: int) -> None:
    """End once the parent process has."""
    while os.getppid() == parent:
        time.sleep(_TICK_S)
    os._exit(1)


def follow(place: Place, device: str, check: Callable[[], None]) -> None:
    """Start a worker for each generation, until the first process says that all is made.

    Raises `Cancelled` when `check` does.
    """
    store, current = place.store(), 0
    context = multiprocessing.get_context("spawn")
    process: Any = None
    with TemporaryDirectory(prefix="kinora-") as folder:
        log = Path(folder) / "log"
        try:
            while not store.check([_END]):
                check()
                newest = int(store.add(_GENERATION, 0))
                if newest > current:
                    _kill(process)
                    current = newest
                    log.unlink(missing_ok=True)
                    process = context.Process(target=_follow, args=(place, current, device, log))
                    process.start()
                elif process is not None and not process.is_alive():
                    store.set(f"{current}/broken", f"process {place.rank} of {place.count}, which "
                              f"shares its videos, ended{logs.last(log)}")  # fmt: skip
                    process = None
                time.sleep(_TICK_S)
        except (Cancelled, KeyboardInterrupt):
            raise
        except RuntimeError:  # the store is gone, and the process that hosted it
            raise Cancelled from None
        finally:
            _kill(process)


def end(store: Any) -> None:
    """Have the others end."""
    store.set(_END, "")


def _kill(process: Any) -> None:
    if process is not None:
        process.kill()
        process.join()
