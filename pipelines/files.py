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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import OutputError
from .request import Resolved, names_a_file

LATENTS_SUFFIX = ".latents.safetensors"
MOST_OF_A_NAME = 10**4  # files of one name that are numbered apart
_made: list[Path] = []  # by this process, for results; outermost first
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the files of a run go.

    `stem` is None where names are made from prompt and seed. `suffixes` are those of the files of
    one video, the media file's first. `made` lists folders that did not exist before, outermost
    first, so that a run which leaves nothing can take them away again.
    """

    folder: Path
    stem: str | None
    suffixes: tuple[str, ...]
    made: tuple[Path, ...] = ()

    def stem_for(self, resolved: Resolved) -> str:
        """The wished-for file name, without suffix, of one video."""
        return self.stem or f"{slug(resolved.prompt)}-s{resolved.seed}"

    def withdraw(self) -> None:
        """Remove the folders that were made for this run, where they are empty."""
        _remove_empty(self.made)


def withdraw_all() -> None:
    """Do so for all runs of this process: those that cannot any more, as it ends at once."""
    _remove_empty(_made)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def prepare(resolved: Resolved, *, with_latents: bool = True) -> Destination:
    """Make the output folder and prove that it can be written to, before any model is loaded.

    Raises `OutputError` if it cannot, or if `output` names a file that exists already, or one whose
    sidecar or latents do.
    """
    path = Path(os.path.expanduser(resolved.output))
    if str(path).startswith("~"):
        raise OutputError(f"{path.parts[0]} is nobody here: write ./{path} for a folder so named")
    single = names_a_file(resolved.output)
    folder = path.parent if single else path
    suffixes = (path.suffix if single else f".{resolved.format}", ".json")
    if with_latents:
        suffixes += (LATENTS_SUFFIX,)
    destination = Destination(folder, path.stem if single else None, suffixes)
    made: list[Path] = []
    try:
        for suffix in suffixes:
            # The longest name that may follow; the file system refuses one too long here.
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(folder / f"{destination.stem_for(resolved)}-{MOST_OF_A_NAME}{suffix}")
            if single and os.path.lexists(taken := path.with_suffix(suffix)):
                raise OutputError(
                    f"{taken} exists already and is never overwritten: choose another --output"
                )
        for part in [*reversed(folder.parents), folder]:
            if not part.exists():
                part.mkdir()
                made.append(part)
        handle, probe = tempfile.mkstemp(prefix=".kinora-", dir=folder)
        os.close(handle)
        os.unlink(probe)
    except (OSError, UnicodeEncodeError) as error:
        replace(destination, made=tuple(made)).withdraw()
        raise explain(error, path if single else folder) from error
    _made.extend(made)
    return replace(destination, made=tuple(made))


def free_disk_bytes(folder: Path) -> int:
    """Bytes that can still be written to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def check_new(path: Path) -> None:
    """Raise `OutputError` where `path` is there already, or its folder is not."""
    if os.path.lexists(path):
        raise OutputError(f"{path} is there already: name another file, or remove it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {path.absolute().parent}: make it first")


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


def taken(folder: Path, stem: str, suffixes: Iterable[str]) -> bool:
    """Whether any file of a set would fall on an existing one."""
    return any(os.path.lexists(folder / f"{stem}{suffix}") for suffix in suffixes)


def reserve(destination: Destination, stem: str) -> str:
    """A stem that is free for all files of a video."""
    number = 1
    name = stem
    while taken(destination.folder, name, destination.suffixes):
        number += 1
        name = f"{stem}-{number}"
    return name


def explain(error: OSError | UnicodeEncodeError, where: Path) -> OutputError:
    """The one line for a failed write."""
    if isinstance(error, UnicodeEncodeError):
        return OutputError(f"{str(where)!a} is no name for a file here ({error.reason})")
    if error.errno in FULL:
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
    sync_folder(folder)
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


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def slug(prompt: str) -> str:
    """The prompt as part of a file name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:50].rstrip("-") or "video"
