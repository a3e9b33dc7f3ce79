"""`kinora ui` in a browser, for tests: what it has on disk, and what a tab shows."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

PATIENCE_S = 60
FOREVER = {"width": 128, "height": 128, "frames": 33, "steps": 1000}
SMALL = {"width": 32, "height": 32, "frames": 5, "steps": 2}
LISTS = ("model", "recipe", "recipe-1", "recipe-2", "format", "device")
# What a browser does with a file that is let go over the page.
_DROP = """
([selector, name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  const fire = kind => document.querySelector(selector).dispatchEvent(
    new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
  ['dragenter', 'dragover', 'drop'].forEach(fire);
}
"""


@dataclass(frozen=True)
class Server:
    """`kinora ui` at work."""

    process: subprocess.Popen[str]
    address: str
    output: Path

    def files(self) -> list[str]:
        """What it has made, and what it may have left behind; without the ids in the names."""
        names = (path.name for path in self.output.iterdir() if not path.name.startswith("."))
        return sorted(re.sub("-[0-9a-f]{16}(?=\\.)", "", name) for name in names)

    def path(self, name: str) -> Path:
        """The one file that `files` calls so."""
        stem, _, suffix = name.partition(".")
        (path,) = self.output.glob(f"{stem}-????????????????.{suffix}")
        return path


@contextmanager
def serving(output: Path, env: Mapping[str, str] | None = None) -> Generator[Server, None, None]:
    """The command, on a free port; ended by Ctrl-C."""
    command = [sys.executable, "-m", "kinora.app", "ui", "--port", "0", "--output", str(output)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        try:
            assert first.startswith("http://127.0.0.1:"), first or process.stderr.read()
            yield Server(process, first.split()[0], output)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            said = process.stderr.read().splitlines()
            assert said[-1:] == ["stopped"], said
        finally:
            process.kill()


class Page:
    """One tab with the page in it."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.tab = browser.new_page(**{"viewport": {"width": 1280, "height": 1400}, **options})
        self.asked: set[str | None] = set()
        """Whom the page has asked for something."""
        self.faults: list[str] = []
        """Errors of its scripts, and what its content policy forbade."""
        self.tab.on("request", self._asks)
        self.tab.on("pageerror", lambda it: self.faults.append(str(it)))
        self.tab.on("console", lambda it: self._says(it.type, it.text))
        self.tab.goto(server.address)
        # Its first prediction is there: the page is alive.
        self.until(lambda: "tokens" in self.text("prediction"))

    def _asks(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.asked.add(urlsplit(request.url).hostname)

    def _says(self, kind: str, text: str) -> None:
        if kind == "error":
            self.faults.append(text)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something; what it looks at may be drawn anew meanwhile."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                if condition():
                    return
            except Exception:
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end, f"the page shows: {self.tab.inner_text('body')}"
            self.tab.wait_for_timeout(50)

    def find(self, selector: str) -> Any:
        """The first element there."""
        return self.tab.locator(selector).first

    def count(self, selector: str) -> int:
        """How many there are."""
        return self.tab.locator(selector).count()

    def text(self, name: str) -> str:
        """The text of a part."""
        return self.tab.inner_text(f"#k-{name}", timeout=2000).strip()

    def phase(self, name: str = "status") -> str:
        """What the page says of the run."""
        return self.tab.get_attribute(f"#k-{name} [data-phase]", "data-phase", timeout=2000)

    def fill(self, **fields: object) -> None:
        """Type values into fields."""
        for name, value in fields.items():
            if name in LISTS:
                self.choose(name, str(value))
                continue
            field = self.find(f"#k-{name} input, #k-{name} textarea")
            field.fill(str(value))
            field.press("Tab")

    def choose(self, name: str, value: str) -> None:
        """Type an entry of a list, or something else where that is allowed."""
        field = self.find(f"#k-{name} input")
        field.click()
        for key in ("Control+a", "Delete"):
            field.press(key)
        field.press_sequentially(value)
        field.press("Enter")

    def open_advanced(self) -> None:
        """Show the fields that are not for every day."""
        self.find("#k-advanced > button").click()
        self.until(lambda: self.find("#k-strict input").is_visible())

    def open_builder(self) -> None:
        """Show every method and option."""
        self.find("#k-builder > button").click()
        self.until(lambda: self.find("#k-attention-method input").is_visible())

    def press(self, name: str) -> None:
        """Press a button once it can be pressed."""
        self.find(f"#k-{name}").click(timeout=1000 * PATIENCE_S)

    def show(self, name: str) -> None:
        """Open a tab."""
        self.find(f"#k-tabs button[data-tab-id={name}]").click()

    def jobs(self, status: str) -> int:
        """How many jobs are listed as that."""
        return self.count(f"#k-jobs li[data-status={status}]")

    def act(self, status: str, act: str) -> None:
        """Press a button of the first job that is listed as that."""
        self.find(f"#k-jobs li[data-status={status}] [data-act={act}]").click()

    def drop(self, path: Path, name: str = "dropped") -> None:
        """Let go a file over a field: the one that settings are restored from, or another."""
        self.tab.evaluate(_DROP, [f"#k-{name} button", path.name, list(path.read_bytes())])

    def value(self, name: str) -> str:
        """What stands in a field."""
        return self.find(f"#k-{name} input, #k-{name} textarea").input_value()

    @contextmanager
    def unanswered(self) -> Generator[list[Any], None, None]:
        """For the length of the body, all that the page asks waits; what that is."""
        held: list[Any] = []
        every, waits = "**/gradio_api/**", True
        self.tab.route(every, lambda it: held.append(it) if waits else it.continue_())
        yield held
        waits = False
        for it in held:
            it.continue_()
        self.tab.unroute(every)

    def generate(self, *phases: str) -> None:
        """Press Generate, and wait for what comes of it."""
        self.press("generate")
        self.until(lambda: self.phase() in phases)


def worker_ids(server: Server) -> list[int]:
    """The processes that make its videos."""
    children = psutil.Process(server.process.pid).children()
    return [it.pid for it in children if "spawn_main" in " ".join(it.cmdline())]
