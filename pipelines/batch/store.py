"""The folder of a batch: which rows are done, what happened to the others, where drafts lie.

    DIR/NAME.mp4 …          a row's video and, put there last, its sidecar NAME.json
    DIR/rows.jsonl          the rows of the manifest, with nothing left open
    DIR/status.jsonl        a line for each attempt that ended, appended
    DIR/.kinora-batch/      drafts of the runs that are at work; others' are swept

A row is done when its video and its sidecar are there and not empty: both are complete and flushed
before they get their names. That is all that is looked at, so ten thousand rows take no second.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..errors import OutputError
from ..files import LATENTS_SUFFIX, explain, sync_folder
from .table import Table, read_header, read_rows

ROWS = "rows.jsonl"
STATUS = "status.jsonl"
_DRAFTS = ".kinora-batch"
_ID = re.compile(r"-([0-9a-f]{16})$")


@dataclass(frozen=True, slots=True)
class Store:
    """One such folder, which need not exist yet."""

    path: Path

    @property
    def drafts(self) -> Path:
        """Where drafts lie."""
        return self.path / _DRAFTS

    def check(self, manifest: Path, table: Table) -> None:
        """Raises `OutputError` if the folder is not that of this manifest.

        It is if it was made for the file of that path, whatever rows that has now, or if it has
        a row in common with the table; and if it is empty or not there.
        """
        try:
            names = [it for it in os.listdir(self.path) if not it.startswith(".")]
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain(error, self.path) from None
        if not names:
            return
        head = self.header()
        if head is None:
            raise OutputError(
                f"{self.path} holds files that are of no batch, such as {min(names)}: choose "
                f"another --output"
            )
        if head["manifest"] == str(manifest.absolute()):
            return
        wanted = {table.id(i) for i in range(len(table))}
        if not any(row["id"] in wanted for row in self.rows()):
            raise OutputError(
                f"{self.path} belongs to another manifest, {head['manifest']}, and has no row in "
                f"common with {manifest}: choose another --output, or add the rows to that manifest"
            )

    def claim(self, manifest: Path, table: Table) -> None:
        """Make the folder, and write down the rows. Raises `OutputError`."""
        draft = self.path / f".{ROWS}-{secrets.token_hex(6)}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                with draft.open("xb") as file:
                    table.write(file, {"manifest": str(manifest.absolute())})
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, self.path / ROWS)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, self.path) from None

    def header(self) -> dict[str, Any] | None:
        """The header of the rows; None where this is no batch's folder."""
        try:
            with (self.path / ROWS).open("rb") as file:
                return read_header(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise OutputError(f"{self.path / ROWS} cannot be read ({error.strerror})") from None

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows as plain values. Raises `OutputError` where the file was cut off."""
        with (self.path / ROWS).open("rb") as file:
            file.readline()
            try:
                yield from read_rows(file)
            except ValueError:
                raise OutputError(
                    f"{self.path / ROWS} is damaged: the command that made the batch writes it anew"
                ) from None

    def done(self) -> set[int]:
        """The ids, as numbers, of the rows that are done; also of rows of an earlier manifest."""
        media, sidecars = set[str](), set[str]()
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path) as entries:
            for entry in entries:
                stem, _, suffix = entry.name.rpartition(".")
                if suffix not in ("safetensors", "jsonl") and _number(stem) is not None:
                    with suppress(FileNotFoundError):  # one moves files in while this one looks
                        if entry.stat().st_size:
                            (sidecars if suffix == "json" else media).add(stem)
        return {cast("int", _number(stem)) for stem in media & sidecars}

    def has(self, name: str, suffix: str) -> bool:
        """Whether one row is done."""
        files = (self.path / f"{name}{suffix}", self.path / f"{name}.json")
        with suppress(FileNotFoundError):
            return all(file.stat().st_size for file in files)
        return False

    def append(self, content: Mapping[str, Any]) -> None:
        """Add a line to the status, in one write; a line torn by an earlier crash is ended first.

        Raises `OSError`; then no part of the line is left.
        """
        line = json.dumps(content).encode() + b"\n"
        descriptor = os.open(self.path / STATUS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # Other shards append too, on a network's disk maybe, where O_APPEND is not enough.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = b"\n" + line
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, end)
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path / STATUS))
        finally:
            os.close(descriptor)

    def statuses(self) -> Iterator[dict[str, Any]]:
        """The lines of the status in order; torn ones are left out."""
        with suppress(FileNotFoundError), (self.path / STATUS).open("rb") as file:
            for line in file:
                with suppress(ValueError):
                    found = json.loads(line)
                    if isinstance(found, dict) and {"id", "status"} <= set(found):
                        yield cast("dict[str, Any]", found)

    @contextmanager
    def drafting(self) -> Generator[Drafts, None, None]:
        """A folder for drafts, gone afterwards; those of runs that have ended are swept.

        Raises `OutputError`.
        """
        self.sweep()
        host = "".join(it if it.isalnum() else "-" for it in socket.gethostname())[:40]
        name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        drafts = Drafts(self.drafts / name)
        try:
            drafts.make()
        except OSError as error:
            raise explain(error, self.path) from None
        try:
            yield drafts
        finally:
            drafts.release()
            self.sweep()

    def sweep(self) -> None:
        """Remove the drafts of runs that were killed."""
        with suppress(FileNotFoundError):
            for path in self.drafts.iterdir():
                Drafts(path.with_suffix("")).sweep()
            with suppress(OSError):  # others are at work
                self.drafts.rmdir()


@dataclass
class Drafts:
    """A folder that lives as long as one of the processes that `hold` it, parent and workers.

    What tells is a lock on a file beside the folder, which goes with the last process however it
    ends. The file is there, and locked, before the folder is, and is removed after it.
    """

    folder: Path
    _held: list[int] = field(default_factory=list[int])

    @property
    def lock(self) -> Path:
        """The file whose lock tells."""
        return self.folder.with_suffix(".lock")

    def make(self) -> None:
        """Make it, and hold it. Raises `OSError`."""
        for _ in range(100):  # another run may sweep between two lines of this
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._take(os.O_CREAT)
                self.folder.mkdir()
                return
        raise FileNotFoundError(errno.ENOENT, "it is removed again and again", str(self.folder))

    def hold(self) -> None:
        """Hold it too. Raises `FileNotFoundError` where it is gone."""
        self._take(0)

    def _take(self, create: int) -> None:
        descriptor = os.open(self.lock, os.O_RDWR | create, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_ino != os.stat(self.lock).st_ino:
                raise FileNotFoundError(errno.ENOENT, "it was swept", str(self.lock))
        except BaseException:
            os.close(descriptor)
            raise
        self._held.append(descriptor)

    def release(self) -> None:
        """Hold it no more."""
        while self._held:
            os.close(self._held.pop())

    def held(self) -> bool:
        """Whether a process holds it."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError:
            return True
        finally:
            os.close(descriptor)

    def sweep(self) -> None:
        """Remove it where no process holds it."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR)
        except FileNotFoundError:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.lock.unlink(missing_ok=True)
        except OSError:
            pass  # somebody is at work
        finally:
            os.close(descriptor)

    def own(self, name: str) -> Path:
        """A new folder in it for one worker."""
        folder = self.folder / f"{name}-{secrets.token_hex(4)}"
        folder.mkdir()
        return folder


def publish(staged: Mapping[str, Path], folder: Path, name: str) -> dict[str, Path]:
    """Move the files of one row (suffix → path) to their names, the sidecar last.

    What has the name already is of the same row, made before: it is replaced. Returns suffix → new
    path. Raises `OutputError`.
    """
    placed = {suffix: folder / f"{name}{suffix}" for suffix in staged}
    try:
        for suffix in sorted(staged, key=lambda it: it == ".json"):
            os.replace(staged[suffix], placed[suffix])
        sync_folder(folder)
    except OSError as error:
        raise explain(error, folder) from None
    return placed


def rescue(staging: Path, folder: Path, name: str) -> str | None:
    """Move the latents that an unfinished attempt has left, if any, to their name, and tell it."""
    left = staging / f"{name}{LATENTS_SUFFIX}"
    if not left.is_file():
        return None
    try:
        return publish({LATENTS_SUFFIX: left}, folder, name)[LATENTS_SUFFIX].name
    except OutputError:
        return None


def _number(stem: str) -> int | None:
    """The id at the end of a row's name."""
    match = _ID.search(stem)
    return None if match is None else int(match[1], 16)
