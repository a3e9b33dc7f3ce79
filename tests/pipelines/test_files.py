"""Writing: all files of a set or none, never over an existing one, nothing left on failure."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from threading import Barrier, Thread

import pytest

from kinora.pipelines import files, sidecar
from kinora.pipelines.errors import OutputError

SET = {".mp4": b"video", ".json": b"record"}


def test_a_set_moves_on_together(tmp_path: Path) -> None:
    (tmp_path / "clip.json").write_text("mine")
    placed = files.publish(tmp_path, "clip", SET)
    assert {suffix: path.name for suffix, path in placed.items()} == {
        ".mp4": "clip-2.mp4",
        ".json": "clip-2.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"clip.json", "clip-2.mp4", "clip-2.json"}
    assert (tmp_path / "clip.json").read_text() == "mine"


def test_many_writers_at_once_get_names_of_their_own(tmp_path: Path) -> None:
    count = 8
    barrier = Barrier(count)
    sets: list[dict[str, Path]] = []

    def write(index: int) -> None:
        barrier.wait()
        data = str(index).encode()
        sets.append(files.publish(tmp_path, "clip", {".mp4": data, ".json": data}))

    threads = [Thread(target=write, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({placed[".mp4"] for placed in sets}) == count
    for placed in sets:
        assert placed[".mp4"].stem == placed[".json"].stem
        assert placed[".mp4"].read_bytes() == placed[".json"].read_bytes()
    assert len(list(tmp_path.iterdir())) == 2 * count


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for expected in ("clip", "clip-2"):
        placed = files.publish(tmp_path, "clip", SET)
        assert placed[".mp4"].stem == expected and placed[".json"].read_bytes() == b"record"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "not writable")]
)
def test_a_failure_anywhere_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    real: dict[str, Callable[..., object]] = {
        "write": os.write,
        "fsync": os.fsync,
        "link": os.link,
    }
    for call, good_calls in itertools.product(real, (0, 1)):
        made = itertools.count()

        def failing(
            *args: object, call: str = call, good: int = good_calls, made: Iterator[int] = made
        ) -> object:
            if next(made) >= good:
                raise OSError(number, os.strerror(number))
            return real[call](*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, failing)
            with pytest.raises(OutputError, match=told):
                files.publish(tmp_path, "clip", SET)
        assert list(tmp_path.iterdir()) == [], (call, good_calls)


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def short(handle: int, data: memoryview) -> int:
        return write(handle, data[:3])

    monkeypatch.setattr(os, "write", short)
    data = bytes(range(100))
    placed = files.publish(tmp_path, "clip", {".bin": data})
    assert placed[".bin"].read_bytes() == data


def test_explained_errors_are_one_line(tmp_path: Path) -> None:
    told = str(files.explain(OSError(errno.EROFS, "Read-only file system"), tmp_path))
    assert "\n" not in told and "Read-only" in told and "--output" in told


def test_a_package_that_is_run_from_its_folder_has_no_version(monkeypatch: pytest.MonkeyPatch):
    """A run must not fail at its end because nothing says which version it was."""

    def version(package: str) -> str:
        if package == "kinora":
            raise metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    sidecar.versions.cache_clear()
    try:
        found = sidecar.versions()
    finally:
        sidecar.versions.cache_clear()
    assert found["kinora"] == "not installed" and found["torch"] == "1"
