"""A stand-in for models: makes small files from a request, and fails as its prompt says.

    sleep SECONDS       takes that long, looking out for a stop
    shown               its steps come with previews
    boom, nan, disk     raises: a bug, no finite numbers, a full disk
    memory              raises: the accelerator has no more
    sticky              raises what breaks its accelerator: so does every later row of the process
    segv, kill          its process crashes
    flaky               fails at the first attempt, `sticky once` too

Workers import this module by its plain name, from the folder that `standin` puts on their path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from kinora.pipelines.batch.making import Report, Studio
from kinora.pipelines.errors import Cancelled, GenerationError
from kinora.pipelines.events import Progress
from kinora.pipelines.files import LATENTS_SUFFIX, Destination, publish
from kinora.pipelines.request import Request
from kinora.pipelines.run import Output, Run


class StandIn:
    """Has one model, as it were: two threads take turns."""

    def __init__(self) -> None:
        self._model = threading.Lock()
        self._broken = False

    def make(
        self, request: Request, destination: Destination, stop: threading.Event, report: Report
    ) -> Run:
        words = request.prompt.split()
        with self._model:
            if "sleep" in words:
                shown = b"a picture" if "shown" in words else None
                self._sleep(float(words[words.index("sleep") + 1]), shown, stop, report)
            self._fail(words, Path(request.output), destination)
        content = f"{request.prompt} {request.seed} {request.steps}".encode()
        digest = hashlib.sha256(content).hexdigest()
        media = destination.suffixes[0]
        record = b'{"sha256": "%s"}' % digest.encode()
        name = destination.stem or "video"
        placed = publish(destination.folder, name, {media: content, ".json": record})
        output = Output(placed[media], placed[".json"], None, request.seed, {"denoise": 0.25},
                        digest, digest)  # fmt: skip
        resolved = request.model_dump()
        return Run(resolved, (output,), {"denoise": 0.25}, "stand-in", {})  # type: ignore[arg-type]

    def recovers(self) -> bool:
        return True

    def _sleep(
        self, seconds: float, shown: bytes | None, stop: threading.Event, report: Report
    ) -> None:
        for step in range(10):
            report(Progress("denoise", step, 10, 0.0, None, 1, 1, preview=shown))
            if stop.wait(seconds / 10):
                raise Cancelled

    def _fail(self, words: list[str], folder: Path, destination: Destination) -> None:
        if self._broken or ("sticky" in words and not _flaked(words, "once", folder)):
            self._broken = True
            raised = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile …")
            raise GenerationError(f"stand-in failed while denoising: {raised}") from raised
        if "memory" in words:
            raised = RuntimeError("CUDA error: out of memory")
            raise GenerationError(f"stand-in failed while denoising: {raised}") from raised
        if "boom" in words:
            raise ZeroDivisionError("by\nzero")
        if "nan" in words:
            kept = destination.folder / f"{destination.stem}{LATENTS_SUFFIX}"
            kept.write_bytes(b"latents")
            raise GenerationError(f"decoding gave NaN; `kinora decode {kept}`", latents=kept)
        if "disk" in words and not (folder.parent / "freed").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        if "segv" in words:
            print("a last word", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        if "kill" in words:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if "flaky" in words and not _flaked(words, "flaky", folder):
            raise GenerationError("flaked")


def _flaked(words: list[str], word: str, folder: Path) -> bool:
    """Whether a row with that word has been here already."""
    mark = folder.parent / "flaked"
    flaked = mark.exists()
    if word in words:
        mark.touch()
    return flaked and word in words


class Dumb(StandIn):
    """Ends before it has started."""

    def __init__(self) -> None:
        sys.exit("no licence")


class Cramped(Studio):
    """Makes real videos on a disk that is full, as it were: of files no longer than 3000 bytes."""

    def __init__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        super().__init__()
