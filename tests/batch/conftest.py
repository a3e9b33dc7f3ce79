"""Fixtures for batches, which are made by the stand-in of `standin.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

# Workers get this too, and import `standin` by it.
sys.path.insert(0, str(Path(__file__).parent))

from desks import Desk
from placing import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty one."""
    return Place(tmp_path, tmp_path / "prompts.txt", tmp_path / "out")


@pytest.fixture
def desk(tmp_path: Path) -> Generator[Desk, None, None]:
    """The jobs of an empty folder."""
    desk = Desk(tmp_path / "out")
    yield desk
    while desk.opened:
        desk.close()


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file with this name and content, and return its path."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make
