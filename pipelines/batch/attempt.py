"""One attempt at a row in a worker: make it among drafts, move its files, say how it ended."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import Cancelled, GenerationError, KinoraError, MemoryLimitError, OutputError
from ..files import FULL, LATENTS_SUFFIX, Destination, explain
from ..run import Output
from .making import Maker, Report
from .rows import Row
from .store import publish, rescue

Ending = Literal["done", "retried", "failed", "stopped"]
_AGAIN = (GenerationError, MemoryLimitError)  # the others would end alike


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt at a row ended. `retried` is a failure that will be tried again.

    `seconds` are those of its stages, without the wait for the model where it is done, else all.
    `kind` is the class of the error; `blocked` says that no other row could end better, as the disk
    is full. `density` and `evaluated` are the shares of pairs of tokens and of steps that were
    computed; None where nothing was accelerated.
    """

    id: str
    line: int
    name: str
    status: Ending
    attempt: int
    seconds: float
    path: str | None = None
    latents: str | None = None
    latents_sha256: str | None = None
    frames_sha256: str | None = None
    stages_s: dict[str, float] = field(default_factory=dict[str, float])
    density: float | None = None
    evaluated: float | None = None
    device: str | None = None
    kind: str | None = None
    reason: str | None = None
    again: bool = False
    blocked: bool = False

    def retried(self) -> Ended:
        """The same failure of a row that will be tried again."""
        return replace(self, status="retried")

    def to_json(self) -> dict[str, Any]:
        """What of it goes into the status."""
        content = {name: it for name, it in asdict(self).items() if it is not None and it != {}}
        return {name: it for name, it in content.items() if name not in ("again", "blocked")}


def attempt(
    maker: Maker,
    row: Row,
    number: int,
    place: tuple[str | None, Path, Path],
    stop: threading.Event,
    report: Report,
) -> Ended:
    """Make `row`; `place` is a device (None: the row's), the folder of files and one for drafts."""
    device, folder, drafts = place
    began = time.perf_counter()
    staging = drafts / row.id
    where = {"device": device or row.request.device, "output": f"{folder}/"}
    request = row.request.request().model_copy(update=where)

    def ended(status: Ending, **fields: Any) -> Ended:
        seconds = round(time.perf_counter() - began, 3)
        return Ended(row.id, row.line, row.name, status, number, seconds, **fields)

    try:
        staging.mkdir()
        suffixes = (f".{row.request.format}", ".json", LATENTS_SUFFIX)
        run = maker.make(request, Destination(staging, row.name, suffixes), stop, report)
        output = run.outputs[0]
        staged = {suffixes[0]: output.path, ".json": output.sidecar}
        if output.latents is not None:
            staged[LATENTS_SUFFIX] = output.latents
        placed = publish(staged, folder, row.name)
        if output.latents is None:  # an earlier attempt may have failed while decoding
            (folder / f"{row.name}{LATENTS_SUFFIX}").unlink(missing_ok=True)
    except Cancelled:
        return ended("stopped", latents=rescue(staging, folder, row.name))
    except KinoraError as error:
        told, kept = _kept(error, folder, row.name)
        told = told.replace(str(staging), str(folder))
        # All rows are written to this one folder: what is wrong with it is not the row's fault.
        blocked = isinstance(error, OutputError)
        return ended("failed", kind=type(error).__name__, reason=told, latents=kept,
                     again=isinstance(error, _AGAIN), blocked=blocked)  # fmt: skip
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL:
            told = str(explain(error, folder))
            return ended("failed", kind="OutputError", reason=told, blocked=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return ended("failed", kind=type(error).__name__, reason=reason, again=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    done = ended(
        "done",
        path=placed[suffixes[0]].name,
        latents=placed[LATENTS_SUFFIX].name if LATENTS_SUFFIX in placed else None,
        latents_sha256=output.latents_sha256,
        frames_sha256=output.frames_sha256,
        stages_s={stage: round(s, 3) for stage, s in output.stages_s.items()},
        device=run.device,
        **_shares(output),
    )
    return replace(done, seconds=round(sum(output.stages_s.values()), 3))


def _kept(error: KinoraError, folder: Path, name: str) -> tuple[str, str | None]:
    """The error in words and, where latents were kept, the name to which they are moved.

    Latents that cannot be moved there are not left elsewhere: the row will be made again.
    """
    if error.latents is None or not error.latents.is_file():
        return str(error), None
    try:
        placed = publish({LATENTS_SUFFIX: error.latents}, folder, name)[LATENTS_SUFFIX]
    except OutputError:
        error.latents.unlink(missing_ok=True)
        return str(error.__cause__ or error), None
    return str(error).replace(str(error.latents), str(placed)), placed.name


def _shares(output: Output) -> dict[str, float | None]:
    told = output.receipt
    if told is None:
        return {}
    return {"density": told.density, "evaluated": told.evaluated}
