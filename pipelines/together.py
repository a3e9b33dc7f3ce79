"""This process among those that make one video together, as a recipe's `parallel` asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import files
from .errors import RequestError
from .files import LATENTS_SUFFIX, Destination
from .request import Resolved

HOW = "torchrun --nproc-per-node {} -m kinora.app generate …"


@dataclass(frozen=True, slots=True)
class Seat:
    """Number `rank` of those processes, from 0, which writes; `local` is that on its machine."""

    rank: int
    local: int

    @property
    def leads(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process where `asked` leaves it open."""
        import torch

        if asked not in ("auto", "cuda") or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.local % torch.cuda.device_count()}"


def processes(recipe: Mapping[str, Any]) -> int:
    """How many make one video together, by the table of a recipe."""
    if "parallel" not in recipe:
        return 1
    from ..accel.recipe import from_table

    asked = from_table({"parallel": recipe["parallel"]}).parallel
    return asked.processes if asked else 1


def check_alone(recipe: Mapping[str, Any]) -> None:
    """Raises `RequestError` where a recipe asks for several processes: a job has one."""
    count = processes(recipe)
    if count > 1:
        raise RequestError(
            f"parallel asks for {count} processes, and a job is made by one: start them as "
            f"`{HOW.format(count)}`, or leave parallel out"
        )


def seat(recipe: Mapping[str, Any]) -> Seat | None:
    """The seat of this process; None where it makes the video alone.

    Raises `RequestError` where others are running than the recipe asks for.
    """
    count = processes(recipe)
    if count == 1:
        return None
    rank, world = _place()
    if world != count:
        running = "this is one alone" if world == 1 else f"{world} are running"
        several = "; for several videos use kinora batch --engine torchrun" if world > count else ""
        raise RequestError(
            f"parallel asks for {count} processes, and {running}: start them as "
            f"`{HOW.format(count)}`{several}"
        )
    return Seat(rank, int(os.environ.get("LOCAL_RANK", rank)))


def _place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return (int(told[0]), int(told[1])) if all(it.isdigit() for it in told) else (0, 1)


@contextmanager
def destination(seat: Seat | None, resolved: Resolved) -> Generator[Destination, None, None]:
    """Where the files of a run go, see `files.prepare`; of one that does not lead, nowhere."""
    if seat is None or seat.leads:
        yield files.prepare(resolved)
        return
    with TemporaryDirectory(prefix="kinora-") as folder:
        suffixes = (f".{resolved.format}", ".json", LATENTS_SUFFIX)
        yield Destination(Path(folder), None, suffixes)
