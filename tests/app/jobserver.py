"""A server of jobs that the stand-in of `tests/batch` makes, and a plain client of it."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from kinora.app.ui import api, server
from kinora.app.ui.guard import Access, Guard
from kinora.pipelines.jobs import Jobs

BATCH = str(Path(__file__).parents[1] / "batch")


def stand_in() -> Any:
    """The stand-in's class, which workers import by the same name."""
    if BATCH not in sys.path:
        sys.path.insert(0, BATCH)
    return importlib.import_module("standin").StandIn


def until(condition: Callable[[], object]) -> None:
    """Wait for something, a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def complaint(self) -> str:
        """The one line of an error."""
        message = self.json["error"]["message"]
        assert isinstance(message, str) and "\n" not in message and "Traceback" not in message
        return message


@dataclass(frozen=True)
class Served:
    """Jobs behind an address."""

    jobs: Jobs
    address: str

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> Answer:
        """Ask once; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            f"{self.address}{path}", data, {**kind, **named}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())


@contextmanager
def serving(
    folder: Path, token: str | None = None, make: Any = None
) -> Generator[Served, None, None]:
    """Serve the jobs of a folder, without the page."""
    with closing(Jobs(folder, make=make or stand_in())) as jobs, server.listening(0) as listener:
        jobs.start()
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        api.add(app, jobs)
        with server.served(Guard(app, Access(token)), listener):
            yield Served(jobs, f"http://127.0.0.1:{listener.getsockname()[1]}")


@contextmanager
def whole(folder: Path, scratch: Path, token: str | None = None) -> Generator[Served, None, None]:
    """Serve the page and the jobs, as `kinora ui` does."""
    loops: list[asyncio.AbstractEventLoop] = []
    new = asyncio.new_event_loop

    def made() -> asyncio.AbstractEventLoop:
        loops.append(new())
        return loops[-1]

    patch = pytest.MonkeyPatch()
    patch.setattr(asyncio, "new_event_loop", made)  # gradio leaves one open
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        patch.setenv(name, "")  # it is set to something else, and is to be restored
    try:
        with closing(Jobs(folder, make=stand_in())) as jobs, server.listening(0) as listener:
            jobs.start()
            with server.served(server.application(jobs, Access(token), scratch), listener):
                yield Served(jobs, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        patch.undo()
        for it in loops:
            it.close()
