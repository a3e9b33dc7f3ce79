"""What one attempt tells and leaves where its files cannot be moved to the folder of the batch."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines.batch.attempt import Ended, attempt
from kinora.pipelines.batch.manifest import Entry
from kinora.pipelines.batch.rows import Reader
from kinora.pipelines.errors import GenerationError, KinoraError, OutputError
from kinora.pipelines.files import LATENTS_SUFFIX, Destination


class Fails:
    """Keeps latents in `elsewhere`, or among the drafts, and then fails as they tell."""

    def __init__(self, error: type[KinoraError], elsewhere: Path | None = None) -> None:
        self.error, self.elsewhere = error, elsewhere
        self.kept = Path()

    def make(self, request: Any, destination: Destination, stop: Any, report: Any) -> Any:
        self.kept = (self.elsewhere or destination.folder) / f"{destination.stem}{LATENTS_SUFFIX}"
        self.kept.write_bytes(b"latents")
        wrong = self.error(f"{destination.folder} was wrong")
        raise self.error(f"{wrong}; see {self.kept}", latents=self.kept) from wrong

    def recovers(self) -> bool:
        return True


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Of a batch, of drafts, and another."""
    found = tmp_path / "out", tmp_path / "out" / ".drafts", tmp_path / "elsewhere"
    for it in found:
        it.mkdir()
    return found


def made(maker: Fails, folder: Path, drafts: Path) -> Ended:
    row = next(Reader({}).rows(Entry(3, {"prompt": "a red circle"})))
    return attempt(maker, row, 1, ("cpu", folder, drafts), threading.Event(), lambda _: None)


def test_latents_are_moved_to_the_folder_and_told(folders: tuple[Path, Path, Path]) -> None:
    folder, drafts, elsewhere = folders
    for maker in (Fails(GenerationError), Fails(OutputError, elsewhere)):
        ended = made(maker, folder, drafts)
        assert ended.latents is not None and (folder / ended.latents).read_bytes() == b"latents"
        assert ended.reason == f"{folder} was wrong; see {folder / ended.latents}"
        assert not maker.kept.exists()


def test_latents_that_cannot_be_moved_there_are_not_left_elsewhere(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drafts, elsewhere = folders

    def replace(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "replace", replace)
    maker = Fails(OutputError, elsewhere)
    ended = made(maker, folder, drafts)
    assert ended.blocked and ended.latents is None
    assert ended.reason == f"{folder} was wrong", "the row will be made again, with room"
    assert not list(elsewhere.iterdir()) and not list(drafts.iterdir())
