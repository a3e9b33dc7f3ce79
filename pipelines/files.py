"""Writing results: under a temporary name, flushed to disk, then linked into place.

Nothing is ever overwritten: if a name is taken, the whole set (video, sidecar, latents) moves on to
the next number. A failed or cancelled write leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import OutputError
from .request import Format, Resolved, names_a_file

LATENTS_SUFFIX = ".latents.safetensors"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the files of a run go.

    `stem` is None where names are made from prompt and seed. `made` lists folders that did not
    exist before, outermost first, so that a run which leaves nothing can take them away again.
    """

    folder: Path
    stem: str | None
    format: Format
    made: tuple[Path, ...]

    def stem_for(self, resolved: Resolved) -> str:
        """The wished-for file name, without suffix, of one video."""
        return self.stem or f"{_slug(resolved.prompt)}-s{resolved.seed}"

    def withdraw(self) -> None:
        """Remove the folders that were made for this run, where they are empty."""
        for folder in reversed(self.made):
            try:
                folder.rmdir()
            except OSError:
                return


def prepare(resolved: Resolved) -> Destination:
    """Make the output folder and prove that it can be written to, before any model is loaded.

    Raises `OutputError` if it cannot, or if `output` names a file that exists already.
    """
    path = Path(resolved.output).expanduser()
    single = names_a_file(resolved.output)
    folder = path.parent if single else path
    if single and path.exists():
        raise OutputError(f"{path} exists already and is never overwritten: choose another name")
    made: list[Path] = []
    try:
        for part in [*reversed(folder.parents), folder]:
            if not part.exists():
                part.mkdir()
                made.append(part)
        handle, probe = tempfile.mkstemp(prefix=".kinora-", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        Destination(folder, None, resolved.format, tuple(made)).withdraw()
        raise explain(error, folder) from error
    return Destination(folder, path.stem if single else None, resolved.format, tuple(made))


def free_disk_bytes(folder: Path) -> int:
    """Bytes that can still be written to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def publish(folder: Path, stem: str, contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Write `contents` (suffix → bytes) under one common, unused stem; all of them or none.

    Returns suffix → path. Raises `OutputError` if the disk is full or the folder not writable.
    """
    drafts: dict[str, Path] = {}
    try:
        for suffix, data in contents.items():
            drafts[suffix] = _draft(folder, data)
        number = 1
        while True:
            name = stem if number == 1 else f"{stem}-{number}"
            placed = None if taken(folder, name, contents) else _place(folder, name, drafts)
            if placed is not None:
                return placed
            number += 1
    except OSError as error:
        raise explain(error, folder) from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def taken(folder: Path, stem: str, suffixes: Mapping[str, bytes]) -> bool:
    """Whether any file of a set would fall on an existing one."""
    return any((folder / f"{stem}{suffix}").exists() for suffix in suffixes)


def reserve(destination: Destination, stem: str) -> str:
    """A stem that is free for video, sidecar and latents alike."""
    wanted = {f".{destination.format}": b"", ".json": b"", LATENTS_SUFFIX: b""}
    number = 1
    name = stem
    while taken(destination.folder, name, wanted):
        number += 1
        name = f"{stem}-{number}"
    return name


def explain(error: OSError, where: Path) -> OutputError:
    """The one line for a failed write."""
    if error.errno in _FULL:
        return OutputError(f"the disk is full: {where} cannot be written; free space and try again")
    reason = error.strerror or str(error)
    return OutputError(f"{where} is not writable ({reason}): choose another --output")


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte and flush it to the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _draft(folder: Path, data: bytes) -> Path:
    """`data` in a complete, flushed file of a temporary name."""
    draft = folder / f".kinora-{secrets.token_hex(6)}.part"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, data)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return draft


def _place(folder: Path, stem: str, drafts: Mapping[str, Path]) -> dict[str, Path] | None:
    """Give the drafts their names; None, and nothing placed, if another process was first."""
    placed: dict[str, Path] = {}
    try:
        for suffix, draft in drafts.items():
            target = folder / f"{stem}{suffix}"
            _link(draft, target)
            placed[suffix] = target
    except FileExistsError:
        for target in placed.values():
            target.unlink()
        return None
    except BaseException:
        for target in placed.values():
            target.unlink()
        raise
    _sync_folder(folder)
    return placed


def _link(draft: Path, target: Path) -> None:
    try:
        os.link(draft, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: claim the name, then move the draft onto the claim.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(draft, target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:50].rstrip("-") or "video"
