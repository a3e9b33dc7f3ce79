"""The command line as a fixture: arguments in, exit status and both streams out."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kinora.app.cli import main

sys.path.insert(0, str(Path(__file__).parent))  # for modules that tests share

from browsing import SMALL, Page, Server, serving


@dataclass(frozen=True)
class Called:
    """What one call of `kinora` did."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        """The machine-readable last line."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def complaint(self) -> str:
        """The one line on stderr that begins with `kinora:`."""
        lines = [line for line in self.err.splitlines() if line.startswith("kinora: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Cli = Callable[..., Called]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Call `kinora ARGS` in this process, in an empty working folder."""
    monkeypatch.setattr("sys.warnoptions", ["error"])  # keep pytest's own warning filters
    monkeypatch.setenv("COLUMNS", "200")
    workdir = tmp_path / "work"
    workdir.mkdir()
    monkeypatch.chdir(workdir)

    def call(*args: object) -> Called:
        capfd.readouterr()
        status = main([str(arg) for arg in args])
        streams = capfd.readouterr()
        return Called(status, streams.out, streams.err)

    return call


@pytest.fixture
def closed_loops(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Gradio makes an event loop for each page, and leaves it open."""
    loops: list[asyncio.AbstractEventLoop] = []
    new = asyncio.new_event_loop

    def made() -> asyncio.AbstractEventLoop:
        loops.append(new())
        return loops[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", made)
    yield
    for it in loops:
        it.close()


@pytest.fixture
def served(tmp_path: Path) -> Generator[Any, None, None]:
    """Jobs of an empty folder over HTTP, a `jobserver.Served`."""
    from jobserver import serving

    with serving(tmp_path / "out") as served:
        yield served


@pytest.fixture
def client(served: Any) -> Generator[Any, None, None]:
    """OpenAI's client of it."""
    openai = importlib.import_module("openai")
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def server(
    chromium: Any, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Server, None, None]:
    """The command with an empty folder."""
    with serving(tmp_path_factory.mktemp("ui") / "made") as server:
        yield server


@pytest.fixture
def page(server: Server, chromium: Any, wan_folder: Path) -> Generator[Page, None, None]:
    """A fresh page, set to a small run of the tiny Wan pipeline."""
    page = Page(chromium, server)
    page.fill(model=wan_folder)
    page.until(lambda: page.value("steps") == "50")
    page.fill(**SMALL)
    yield page
    assert not page.faults
    page.tab.close()
