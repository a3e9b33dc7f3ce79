"""Clips on disk: where they are, what is known of them, and which reference belongs to which.

A clip is a media file, or a folder of png files that are numbered frames. What is known of it
comes from the record that Kinora writes beside and inside a video; a video of any other origin is
known by its name alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.errors import KinoraError, SidecarError, nearest
from ..pipelines.files import LATENTS_SUFFIX
from ..pipelines.media import read_frames
from ..pipelines.sidecar import Record, read

if TYPE_CHECKING:
    from .fidelity import Frames

SUFFIXES = (".mp4", ".webm", ".gif", ".png", ".mov", ".mkv", ".avi")
_SAYS_NOTHING = re.compile("can not handle the given uri|error occurred while initializing plugin")
"""What the library says of most broken files."""
_NUMBERED = re.compile(r"(.*?)(\d+)\.png", re.IGNORECASE)


class EvalError(KinoraError):
    """What is asked of an evaluation cannot be done."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One video. `record` is Kinora's of it; `prompt` may come from a file of prompts instead."""

    path: Path
    record: Record | None = None
    prompt: str | None = None

    @property
    def lossless(self) -> bool:
        """Whether its frames are those that were made: png. Anything else was encoded with loss."""
        return self.path.is_dir() or self.path.suffix.lower() == ".png"

    @property
    def form(self) -> str:
        """How its frames are kept, in a word."""
        return "png" if self.lossless else self.path.suffix.lower().removeprefix(".")

    @property
    def identity(self) -> tuple[str, int] | None:
        """Prompt and seed, where its record tells them."""
        return None if self.record is None else (self.record.request.prompt, self.seed or 0)

    @property
    def seed(self) -> int | None:
        """Of its record."""
        return None if self.record is None else self.record.request.seed

    @property
    def latents(self) -> Path | None:
        """The latents that it was decoded from, where they were kept."""
        path = self.path.with_name(f"{self.path.stem}{LATENTS_SUFFIX}")
        return path if path.is_file() else None

    def frames(self) -> Frames:
        """Its frames `[F, height, width, 3]`.

        Raises `EvalError` in one line where it cannot be read, holds none, or not those that its
        record tells of.
        """
        if self.path.is_dir():
            return _folder_frames(self.path)
        return self.whole(_file_frames(self.path))

    def whole(self, frames: Frames) -> Frames:
        """`frames` that were decoded, if they are as many as its record tells, else `EvalError`."""
        # Of these a part may decode; gif and png may hold equal frames once.
        asked = len(frames) if self.record is None else self.record.request.frames
        if self.form in ("mp4", "webm") and len(frames) != asked:
            told = f"{len(frames)} frames, its record tells of {asked}"
            raise EvalError(f"{self.path} is not whole: {told}; make it again")
        return frames

    def sha256(self) -> str:
        """Of its bytes. Raises `EvalError` where it cannot be read."""
        digest = hashlib.sha256()
        for file in frame_files(self.path) if self.path.is_dir() else [self.path]:
            digest.update(sha256_of(file).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A path that is no clip, and why."""

    path: Path
    reason: str


def sha256_of(path: Path) -> str:
    """Of a file's bytes. Raises `EvalError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EvalError(f"{path} cannot be read ({error.strerror or error})") from None


def find(paths: Iterable[Path]) -> tuple[list[Clip], list[Rejected]]:
    """The clips that `paths` name: videos, sidecars of videos, or folders of either.

    A folder of numbered png frames is one clip; of any other folder the media files and the folders
    of frames right in it are taken, and what is neither is passed over.
    """
    clips: dict[Path, Clip] = {}
    rejected: list[Rejected] = []
    for path in paths:
        try:
            found = _found(path)
        except OSError as error:
            found = Rejected(path, f"{path} cannot be read ({error.strerror or error})")
        if isinstance(found, Rejected):
            rejected.append(found)
            continue
        for one in found:
            clips.setdefault(one.resolve(), Clip(one))
    return [_known(clip) for clip in clips.values()], rejected


def _found(path: Path) -> list[Path] | Rejected:
    if path.is_dir():
        if frame_files(path):
            return [path]
        inside = sorted(path.iterdir())
        found = [it for it in inside if it.suffix.lower() in SUFFIXES and _is_given(it)]
        found += [it for it in inside if it.is_dir() and frame_files(it)]
        return found or Rejected(path, f"{path} holds no video: {', '.join(SUFFIXES)}, or frames")
    if not path.exists():
        return Rejected(path, f"there is no video or folder {path}{_hint(path)}")
    if path.suffix.lower() in SUFFIXES:
        return [path]
    if path.suffix.lower() == ".json":
        try:
            video = path.with_suffix(f".{read(path).request.format}")
        except SidecarError as error:
            return Rejected(path, str(error))
        return [video] if video.is_file() else Rejected(path, f"the video of {path} is gone")
    return Rejected(path, f"{path} is no video: give {', '.join(SUFFIXES)}, or a folder of them")


def _is_given(path: Path) -> bool:
    """Whether it is a file, or a link to one that is gone, which must not go unsaid."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _hint(path: Path) -> str:
    names = [it.name for it in path.parent.iterdir()] if path.parent.is_dir() else []
    close = nearest(path.name, names, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def frame_files(folder: Path) -> list[Path]:
    """The frames in a folder, in order; none unless all its png files are numbered alike.

    Files that Kinora made may end in numbers too: they are animated, or carry their record, or have
    it beside them.
    """
    parts = [(it, _NUMBERED.fullmatch(it.name)) for it in folder.glob("*.[pP][nN][gG]")]
    matches = [(it, match) for it, match in parts if match]
    if not parts or len(matches) < len(parts) or len({match[1] for _, match in matches}) > 1:
        return []
    if any(it.with_suffix(".json").exists() for it, _ in matches):
        return []
    if not _is_a_frame(matches[0][0]):
        return []
    return [it for it, _ in sorted(matches, key=lambda pair: int(pair[1][2]))]


def _is_a_frame(path: Path) -> bool:
    """Whether a png file is neither animated nor marked as made by Kinora."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"acTL" or file.read(min(length, 7)).startswith(b"kinora\0"):
                return False
            file.seek(length - min(length, 7) + 4, 1)
    return True


def _known(clip: Clip) -> Clip:
    """The same with its record, if it has a readable one."""
    if clip.path.is_dir():
        return clip
    for source in (clip.path.with_suffix(".json"), clip.path):
        try:
            record = read(source)
        except SidecarError:
            continue
        return replace(clip, record=record, prompt=record.request.prompt)
    return clip


def _file_frames(path: Path) -> Frames:
    try:
        frames = read_frames(path)
    except Exception as error:  # whatever a decoder says of a broken file
        told = " ".join(str(error).split())[:160] or type(error).__name__
        if _SAYS_NOTHING.search(told):
            empty = path.is_file() and not path.stat().st_size
            told = "it is empty" if empty else "it is damaged, cut short, or something else"
        raise EvalError(f"{path} cannot be read as a video ({told})") from None
    if not frames.size:
        raise EvalError(f"{path} has no frames")
    return frames


def _folder_frames(folder: Path) -> Frames:
    import numpy as np

    frames = [_file_frames(it) for it in frame_files(folder)]
    if not frames:
        raise EvalError(f"{folder} has no frames")
    sizes = {it.shape[1:3] for it in frames}
    if len(sizes) > 1:
        told = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
        raise EvalError(f"{folder} has frames of several sizes: {told}")
    return np.concatenate(frames)


class References:
    """Clips to compare with, found by prompt and seed, else by name."""

    def __init__(self, folder: Path, clips: Sequence[Clip] | None = None) -> None:
        """All clips in `folder`, or those `clips` of it. Raises `EvalError` if it holds none."""
        self.folder = folder
        self._by_identity: dict[tuple[str, int], list[Clip]] = {}
        self._by_name: dict[str, list[Clip]] = {}
        self.clips = tuple(self._all() if clips is None else clips)
        for clip in self.clips:
            self._by_name.setdefault(clip.path.stem, []).append(clip)
            if clip.identity is not None:
                self._by_identity.setdefault(clip.identity, []).append(clip)

    def _all(self) -> list[Clip]:
        folder = self.folder
        try:
            there = folder.is_dir()
        except OSError as error:
            why = error.strerror or error
            raise EvalError(f"--reference {folder} cannot be read ({why})") from None
        if not there:
            raise EvalError(f"--reference {folder} is no folder: give the one of the dense videos")
        clips, rejected = find([folder])
        if frame_files(folder):
            raise EvalError(
                f"--reference {folder} holds one clip's frames: give the folder that it is in"
            )
        if rejected:
            raise EvalError(f"--reference {rejected[0].reason}")
        return clips

    def of(self, clip: Clip) -> Clip:
        """The reference of `clip`. Raises `EvalError` where there is none, or no single one."""
        named = self._by_name.get(clip.path.stem, [])
        if clip.identity is None:
            return self._single(clip, named, "its name")
        same = self._by_identity.get(clip.identity, [])
        if len(same) > 1:  # videos of several recipes in a folder: the name decides
            same = [it for it in same if it in named] or same
        unknown = [it for it in named if it.identity is None]
        return self._single(clip, same or unknown, "its prompt and seed, nor of its name")

    def _single(self, clip: Clip, found: Sequence[Clip], what: str) -> Clip:
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(it.path.name for it in found[:3])
            raise EvalError(f"{len(found)} references in {self.folder} fit {clip.path}: {names}")
        raise EvalError(f"{self.folder} has no reference for {clip.path}: none of {what}")


def with_prompts(clips: Sequence[Clip], file: Path) -> tuple[list[Clip], list[str]]:
    """The clips with the prompts of `file`, and names in it that no clip has.

    Raises `EvalError` where the file is no map from file names to prompts, or names none of them.
    """
    prompts = _prompts(file)
    given = [replace(clip, prompt=prompts.get(clip.path.name)) for clip in clips]
    names = {clip.path.name for clip in clips}
    if clips and not names & set(prompts):
        raise EvalError(
            f"{file} has prompts for {len(prompts)} files, such as {next(iter(prompts), '')!r}, "
            f"and none for {clips[0].path.name!r}: name the videos in it"
        )
    return given, sorted(set(prompts) - names)


def _prompts(file: Path) -> Mapping[str, str]:
    try:
        content: Any = json.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise EvalError(f"{file} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise EvalError(f"{file} is no JSON ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(it, str) for it in content.values()):
        raise EvalError(f'{file} must be a JSON object such as {{"name.mp4": "a red circle"}}')
    return content
