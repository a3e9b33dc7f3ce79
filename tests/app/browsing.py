"""`kinora ui` in a browser, for tests: what it has on disk, and what a tab shows."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PATIENCE_S = 30
LISTS = ("model", "recipe", "recipe-1", "recipe-2", "format", "device")


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


class Page:
    """One tab with the page in it."""

    def __init__(self, driver: Any, server: Server) -> None:
        self.driver = driver
        driver.get(server.address)
        # Its first prediction is there: the page is alive.
        self.until(lambda: "tokens" in self.text("prediction"))

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
            shown = "the page shows: " + self.driver.find_element(By.TAG_NAME, "body").text
            assert time.monotonic() < end, shown
            time.sleep(0.05)

    def find(self, selector: str) -> Any:
        """The first element there."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, name: str) -> str:
        """The text of a part."""
        return self.find(f"#k-{name}").text

    def phase(self) -> str:
        """What the page says of the run."""
        return self.find("#k-status [data-phase]").get_attribute("data-phase")

    def fill(self, **fields: object) -> None:
        """Type values into fields."""
        for name, value in fields.items():
            field = self.find(f"#k-{name} input, #k-{name} textarea")
            field.click()
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(Keys.DELETE, str(value), Keys.ENTER if name in LISTS else Keys.TAB)

    def choose(self, name: str, value: str) -> None:
        """Pick an entry of a list."""
        field = self.find(f"#k-{name} input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.ENTER)

    def open_advanced(self) -> None:
        """Show the fields that are not for every day."""
        self.find("#k-advanced > button").click()
        self.until(lambda: self.find("#k-strict input").is_displayed())

    def open_builder(self) -> None:
        """Show every method and option."""
        self.find("#k-builder > button").click()
        self.until(lambda: self.find("#k-attention-method input").is_displayed())

    def press(self, name: str) -> None:
        """Press a button once it can be pressed."""
        self.until(lambda: self.find(f"#k-{name}").is_enabled())
        self.find(f"#k-{name}").click()

    def tab(self, name: str) -> None:
        """Open a tab."""
        self.find(f"#k-tabs button[data-tab-id={name}]").click()

    def jobs(self, status: str) -> list[Any]:
        """The jobs that are listed as that."""
        return self.driver.find_elements(By.CSS_SELECTOR, f"#k-jobs li[data-status={status}]")

    def drop(self, path: Path) -> None:
        """Give a file to restore from."""
        self.find("#k-dropped input[type=file]").send_keys(str(path))

    def value(self, name: str) -> str:
        """What stands in a field."""
        return self.find(f"#k-{name} input, #k-{name} textarea").get_attribute("value")

    def generate(self, *phases: str) -> None:
        """Press Generate, and wait for what comes of it."""
        self.press("generate")
        self.until(lambda: self.phase() in phases)

    def hosts(self) -> set[str | None]:
        """Whom the pages have asked for something since the last call."""
        messages = [
            json.loads(it["message"])["message"] for it in self.driver.get_log("performance")
        ]
        sent = [it["params"] for it in messages if it["method"] == "Network.requestWillBeSent"]
        # Other documents are the browser's own; `data:` and `blob:` ask nobody.
        sent = [it["request"]["url"] for it in sent if it["documentURL"].startswith("http")]
        return {urlsplit(url).hostname for url in sent if not url.startswith(("data:", "blob:"))}
