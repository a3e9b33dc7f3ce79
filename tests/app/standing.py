"""The tab Generate without a browser, for tests: its fields, and what the page says of them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kinora.app.ui.gallery import Gallery
from kinora.app.ui.page import Page
from kinora.pipelines.jobs import Jobs
from kinora.pipelines.request import Request


@contextmanager
def opened(folder: Path) -> Generator[Page, None, None]:
    """The page over an empty folder; nothing is made."""
    with closing(Jobs(folder)) as jobs:

        async def made() -> Page:
            return Page(jobs, Gallery(jobs.folder))

        yield asyncio.run(made())  # gradio makes loops of its own where none runs, and leaves them


class Standing:
    """What the components of a page hold, as a browser would send it."""

    def __init__(self, page: Page) -> None:
        self.page, self.panel = page, page._panel  # pyright: ignore[reportPrivateUsage]
        self.builder = self.panel.builder
        self.values = {it: getattr(it, "value", None) for it in self.panel.inputs()}

    def put(self, update: dict[Any, Any]) -> None:
        """Take up what a handler returns."""
        for it, value in update.items():
            told = value.get("value") if isinstance(value, dict) else getattr(value, "value", value)
            if it in self.values and told is not None:
                self.values[it] = told

    def preset(self, name: str) -> dict[Any, Any]:
        """Choose a recipe; what its handler returns."""
        self.values[self.builder.recipe] = name
        update = self.page.preset(name)
        self.put(update)
        return update

    def choose(self, path: str, name: str) -> None:
        """Choose a method or policy."""
        self.values[self.builder.selectors[path]] = name
        self.put(self.builder.selected(path, name))

    def set(self, group: str, path: str, value: Any) -> None:
        """Change an option."""
        self.values[self.builder.options[group][path]] = value

    def request(self) -> Request:
        """What is asked for."""
        return self.page.request(self.values)

    def predicted(self) -> dict[Any, Any]:
        """What the page shows of it."""
        return self.page.predict(self.values)
