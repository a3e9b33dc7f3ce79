"""The tabs Jobs and Gallery at work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import gradio as gr
from gradio.components import Component

from ...pipelines.errors import KinoraError
from ...pipelines.jobs import Jobs
from ...pipelines.request import Request
from ...pipelines.sidecar import Record
from . import gallery as galleries
from . import view, wire
from .acting import said
from .fields import filtering, known
from .gallery import Gallery
from .seen import Seen

if TYPE_CHECKING:
    from . import layout

Values = dict[Component, Any]
Update = dict[Any, Any]

# Nothing is called from elsewhere, and the page tells its progress itself.
OWN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Past gradio's queue: it loses a run that begins just when another answer ends its stream.
BRIEF: dict[str, Any] = {**OWN, "queue": False}
# What happens while an answer is awaited is asked afterwards, once; or gradio drops it. For events
# without data: afterwards those of the first are sent again.
LAST: dict[str, Any] = {**BRIEF, "trigger_mode": "always_last"}
_SHOWN = 100
_EVERY_S = 1.0


class Fields(Protocol):
    """The fields of Generate, for the other tabs."""

    def restore(self, record: Record) -> Update:
        """Set all fields as a record has them. Raises `KinoraError`."""
        ...

    def restoring(self) -> list[Any]:
        """The components that it changes."""
        ...

    def settle(self, event: Any) -> None:
        """Predict anew once a handler has set them; `event` is what connecting it returned."""
        ...

    def request(self, values: Values) -> Request:
        """What the fields ask for. Raises `KinoraError`."""
        ...

    def check(self, request: Request) -> None:
        """Raises `RequestError` where it names what only this machine may name."""
        ...

    def see(self, ids: Iterable[str]) -> list[Seen]:
        """Jobs as they stand, without those that were removed."""
        ...

    def told(self, error: Exception) -> str:
        """An exception as one line."""
        ...


class History:
    """What was asked for, and what there is."""

    def __init__(self, page: Fields, jobs: Jobs, gallery: Gallery, parts: layout.History) -> None:
        self._page, self._jobs, self._gallery, self._parts = page, jobs, gallery, parts

    def wire(self, elsewhere: list[gr.Tab], tabs: gr.Tabs) -> None:
        """Connect the components; `elsewhere` are the tabs beside these, of `tabs`."""
        parts = self._parts
        self._tabs = tabs
        clock = gr.Timer(_EVERY_S, active=False)
        gallery = [parts.model, parts.recipe, parts.gallery]
        clock.tick(self.listing, None, parts.jobs, **BRIEF)
        parts.jobs_tab.select(lambda: (gr.Timer(active=True), self.listing()), None,
                              [clock, parts.jobs], **BRIEF)  # fmt: skip
        for tab in (*elsewhere, parts.gallery_tab):
            tab.select(lambda: gr.Timer(active=False), None, clock, **BRIEF)
        filters = [parts.model, parts.recipe]
        parts.gallery_tab.select(self.browse, filters, gallery, **BRIEF)
        gr.on([parts.model.input, parts.recipe.input], self.browse, filters, gallery, **LAST)
        parts.jobs.click(self.act, None, [parts.jobs, parts.opened, tabs], **BRIEF)
        parts.gallery.click(self.open, None, parts.opened, **BRIEF)
        restored = [parts.opened, *self._page.restoring()]
        self._page.settle(parts.opened.click(self.use, None, restored, **BRIEF))

    def listing(self) -> str:
        """What is being made, then the newest jobs."""
        running, newest = self._jobs.running(), self._jobs.jobs(limit=_SHOWN + 1)
        ids = dict.fromkeys(job.id for job in (*running, *newest[:_SHOWN]))
        return view.listing(self._page.see(ids), more=len(newest) > _SHOWN)

    def browse(self, model: str | None, recipe: str | None) -> Update:
        """The videos of a model and a recipe, and what else there is to choose."""
        parts, items = self._parts, self._gallery.items()
        models, recipes = galleries.models_of(items), galleries.recipes_of(items)
        return {
            parts.model: filtering(models, model),
            parts.recipe: filtering(recipes, recipe),
            parts.gallery: galleries.grid(items, known(model, models), known(recipe, recipes)),
        }

    def act(self, event: gr.EventData) -> Update:
        """Do what a button of a job says."""
        update: Update = {}
        job = wire.find(self._jobs, said(event, "id"))
        if job is not None:
            match said(event, "act"):
                case "cancel":
                    self._jobs.cancel(job.id)
                case "retry":
                    self._jobs.retry(job.id)
                case "remove":
                    self._jobs.remove(job.id)
                case "open" if item := self._gallery.of(self._jobs.media(job)):
                    update[self._parts.opened] = galleries.opened(item)
                    update[self._tabs] = gr.Tabs(selected="gallery")
                case _:
                    pass
        return {**update, self._parts.jobs: self.listing()}

    def open(self, event: gr.EventData) -> str:
        """Look at one video."""
        item = self._gallery.find(said(event, "id"))
        return "" if item is None else galleries.opened(item)

    def use(self, event: gr.EventData) -> Update:
        """Restore the settings of the video that is looked at, or look at it no more."""
        item = self._gallery.find(said(event, "id"))
        if item is None or said(event, "act") == "close":
            return {self._parts.opened: ""}
        try:
            return self._page.restore(item.record)
        except KinoraError as error:
            told = view.failed(self._page.told(error))
            return {self._parts.opened: galleries.opened(item) + told}
