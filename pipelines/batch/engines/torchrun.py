"""The ranks that torchrun starts share the rows of a batch: each makes its part as `local` does.

Where recipes ask for several processes a video, so many ranks in a row make a part together, see
`replica`. Ranks talk at the start, where that is so, and at the end: torchrun stops all as soon as
one fails, so none says that rows failed before the others have made theirs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from .. import replica
from ..replica import Place
from .engine import Job
from .local import Event, Local

if TYPE_CHECKING:
    from ..run import Options

_HOW = "torchrun --nproc-per-node gpu -m kinora.app batch MANIFEST --engine torchrun"
_WAIT = timedelta(days=30)


_stores: list[Any] = []


def engine() -> Torchrun:
    """The engine."""
    return Torchrun()


class Torchrun(Local):
    """One of several such processes."""

    def adapt(self, options: Options, processes: int = 1) -> Options:
        """The part of this rank, on its device. Raises `RequestError` outside of torchrun."""
        rank, ranks, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if options.workers not in (None, 1):
            raise RequestError(
                f"--workers is {options.workers}: with --engine torchrun each rank is one worker, "
                f"leave it out"
            )
        if ranks % processes:
            raise RequestError(
                f"parallel asks for {processes} processes a video, and {ranks} are running: start "
                f"a multiple of {processes}"
            )
        shard, shards = options.shard
        parts = ranks // processes
        part = ((shard - 1) * parts + rank // processes + 1, shards * parts)
        device = options.device
        if device in ("auto", "cuda"):
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            device = f"cuda:{local % count}" if count else device
        seat = (rank % processes, processes)
        return replace(options, shard=part, device=device, workers=1, seat=seat)

    def run(self, job: Job) -> Generator[Event, None, None]:
        """Yields what happens; see `Engine`."""
        rank, count = job.seat
        if count == 1:
            yield from super().run(job)
            return
        store = None if rank else replica.hosted(_host())
        place = _introduced(rank, count, store)
        if store is None:
            (device,) = job.devices
            assert device is not None  # from `places`
            replica.follow(place, device, job.check)
            return
        place.announce()
        try:
            yield from super().run(job)
        finally:
            replica.end(store)
            _stores.append(store)  # the others look at it until they end

    def agree(self, complete: bool) -> bool:
        """Whether all ranks are; waits for them."""
        import torch
        from torch import distributed

        _start()
        try:
            incomplete = torch.tensor([not complete], dtype=torch.int64)
            distributed.all_reduce(incomplete)
        finally:
            distributed.destroy_process_group()
        return not incomplete.item()


def _start() -> None:
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_WAIT)


def _host() -> str:
    """What the ranks of a replica call this machine."""
    return "localhost" if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else socket.gethostname()


def _introduced(rank: int, count: int, store: Any) -> Place:
    """The place of this rank in its replica, whose first rank has the `store`."""
    from torch import distributed

    _start()
    own = None if store is None else (_host(), store.port)
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, own)
    host, port = told[distributed.get_rank() - rank]
    return Place(host, port, rank, count)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise RequestError(
            f"--engine torchrun finds no {name} in the environment: start it as `{_HOW}`"
        )
    return int(text)
