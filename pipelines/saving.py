"""Puts a finished clip on disk: media file with its record inside, sidecar, kept latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import frames as frame_ops
from .errors import OutputError
from .events import Stage
from .files import LATENTS_SUFFIX, Destination, publish, reserve, write_all
from .latents import Latents, to_bytes
from .media import encode
from .request import Resolved
from .run import Output, StageClock
from .sidecar import Record, repeats

if TYPE_CHECKING:
    from .media import Frames


@dataclass(frozen=True, slots=True)
class Kept:
    """Latents on disk, and the stem that was chosen for the video's files with them."""

    path: Path
    stem: str
    sha256: str

    def discard(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def remedy(self) -> str:
        """The end of an error message: where the work is and how to finish it."""
        return f"its latents are kept: finish with `kinora decode {self.path}`"


def keep_latents(destination: Destination, latents: Latents, digest: str) -> Kept:
    """Write the latents beside the future video; if that fails, in the system's temporary folder.

    Raises `OutputError` saying where they are, or that they could not be kept anywhere.
    """
    stem = reserve(destination, destination.stem_for(latents.record.request))
    data = to_bytes(latents)
    try:
        path = publish(destination.folder, stem, {LATENTS_SUFFIX: data})[LATENTS_SUFFIX]
    except OutputError as error:
        raise _rescued(error, data, stem) from error
    return Kept(path, path.name.removesuffix(LATENTS_SUFFIX), digest)


def _rescued(error: OutputError, data: bytes, stem: str) -> OutputError:
    """The same failure, with the latents saved in the temporary folder if it takes them."""
    import os
    import tempfile

    try:
        handle, name = tempfile.mkstemp(prefix=f"{stem}-", suffix=LATENTS_SUFFIX)
    except OSError:
        return OutputError(f"{error}; the latents could not be kept")
    rescued = Path(name)
    try:
        write_all(handle, data)
    except OSError:
        rescued.unlink(missing_ok=True)
        return OutputError(f"{error}; the latents could not be kept")
    finally:
        os.close(handle)
    return OutputError(
        f"{error}; the latents are in {rescued}: finish with `kinora decode {rescued} --output …`",
        latents=rescued,
    )


def save(
    destination: Destination,
    record: Record,
    frames: Frames,
    clock: StageClock,
    *,
    stem: str,
    kept: Path | None,
    original: Record | None = None,
    earlier: Mapping[Stage, float] = {},
) -> Output:
    """Write media file and sidecar. Raises `OutputError`; then neither is there.

    `record` needs no hashes of frames and no times yet. `kept` are latents that stay, `earlier` the
    seconds that other runs spent on this video.
    """
    digest = frame_ops.sha256(frames)
    clock.switch("save")
    request, suffix = record.request, destination.suffixes[0]
    spent: dict[Stage, float] = {
        stage: round(earlier.get(stage, 0.0) + s, 3)
        for stage, s in clock.peek().items()
        if stage != "save"
    }
    embedded = record.model_copy(update={"frames_sha256": digest}).timed(spent)
    media = encode(frames, request.format, request.fps, embedded.to_text())
    saving_s = round(clock.peek()["save"], 3)
    spent["save"] = saving_s
    sidecar = embedded.timed(spent)
    contents = {suffix: media, ".json": sidecar.to_text(indent=2).encode() + b"\n"}
    placed = publish(destination.folder, stem, contents)
    return Output(
        path=placed[suffix],
        sidecar=placed[".json"],
        latents=kept,
        seed=request.seed,
        stages_s=clock.lap(),
        latents_sha256=record.latents_sha256,
        frames_sha256=digest,
        receipt=sidecar.receipt,
        identical=_identical(original, request, digest),
    )


def _identical(original: Record | None, request: Resolved, digest: str) -> bool | None:
    if original is None or original.frames_sha256 is None or not repeats(original, request):
        return None
    return original.frames_sha256 == digest
