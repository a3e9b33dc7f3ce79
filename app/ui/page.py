"""The page at work: what its fields and buttons do."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import gradio as gr
from gradio.components import Component

from ...accel import recipe as recipes
from ...accel.recipe import Recipe
from ...pipelines import cards, planning
from ...pipelines.errors import KinoraError
from ...pipelines.request import DEFAULT_MODEL, DENSE, EXAMPLE_PROMPT
from . import controls, form, view
from .desk import Desk, Job, fault
from .layout import lay_out
from .view import View

CSS = Path(__file__).with_name("page.css")
ICON = Path(__file__).with_name("kinora.svg")
# That a page was closed is noticed when something is sent to it.
_TICK_S = 1.0

Values = dict[Component, Any]
Update = dict[Any, Any]


def theme() -> gr.themes.Base:
    """Gradio's plain theme with the fonts of the system: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="md",
    ).set(
        block_padding="0px",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        input_border_width="1px",
        input_background_fill="*background_fill_primary",
        input_background_fill_dark="*background_fill_secondary",
        button_large_text_size="*text_md",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )


class Page:
    """One page for all who open it; each has one run at most, and they are made in turn."""

    def __init__(self, desk: Desk, output: str) -> None:
        self._desk = desk
        self._output = output
        self._jobs: dict[str | None, Job] = {}
        with gr.Blocks(title="Kinora", analytics_enabled=False) as self.blocks:
            self._panel = lay_out()
            self._wire()

    def _wire(self) -> None:
        panel = self._panel
        # Nothing is called from elsewhere, and the page tells its progress itself.
        own: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # Past gradio's queue: it loses a run that begins just when another answer ends its stream.
        brief: dict[str, Any] = {**own, "queue": False}
        inputs, prompt = set(panel.inputs()), panel.fields["prompt"]
        model, recipe = panel.fields["model"], panel.fields["recipe"]
        buttons = [panel.generate, panel.cancel]
        # The desk makes the runs in turn; here they wait without holding up anything else.
        gr.on(
            [panel.generate.click, cast("Any", prompt).submit], self.generate, inputs,
            [panel.status, panel.result, *buttons], concurrency_limit=None, **own,
        ).then(self.ready, None, buttons, **brief)  # fmt: skip
        panel.cancel.click(self.cancel, None, panel.cancel, **brief)
        described = [model, *(panel.fields[name] for name in form.BY_CARD)]
        cast("Any", model).input(self.describe, model, described, **brief)
        changed = [recipe, *panel.groups.values(), *panel.all_options()]
        cast("Any", recipe).input(self.preset, recipe, changed, **brief)
        edits = [cast("Any", it).change for it in panel.inputs() if it is not prompt]
        gr.on(
            [self.blocks.load, *edits], self.predict, inputs, panel.prediction,
            trigger_mode="always_last", **brief,
        )  # fmt: skip

    async def generate(self, values: Values, asker: gr.Request) -> AsyncGenerator[Update, None]:
        """Make the video, showing how far it is. Closing the page closes this: the run ends."""
        try:
            request = self._panel.request(values, self._output)
        except Exception as error:
            yield self._draw(view.failed(_told(error)))
            return
        job = self._jobs[asker.session_hash] = self._desk.submit(request)
        shown = View("waiting", request=request)
        try:
            while shown.busy:
                yield self._draw(replace(shown, stopping=job.stop.is_set()))
                for event in await job.wait(_TICK_S):
                    shown = view.after(shown, event, time.monotonic())
                shown = replace(shown, outputs=tuple(job.finished))
            yield self._draw(shown)
        finally:
            self._desk.cancel(job)
            if self._jobs.get(asker.session_hash) is job:
                del self._jobs[asker.session_hash]

    def ready(self) -> Update:
        """Offer the next run."""
        return {
            self._panel.generate: gr.Button(interactive=True),
            self._panel.cancel: gr.Button(interactive=False),
        }

    def cancel(self, asker: gr.Request) -> Update:
        """Ask for the run of this page to end; `generate` shows when it has."""
        job = self._jobs.get(asker.session_hash)
        if job is not None:
            self._desk.cancel(job)
        return {self._panel.cancel: gr.Button(interactive=False)}

    def describe(self, model: str | None) -> Update:
        """Fill in the model's own defaults and tell what it takes."""
        panel = self._panel
        try:
            card = cards.find(model or DEFAULT_MODEL)
        except Exception:
            return {panel.fields["model"]: gr.Dropdown(info="")}  # the prediction says why
        values, steps = form.defaults(card), form.steps(card)
        told = {
            panel.fields[name]: gr.Number(value, step=steps.get(name, 1))
            for name, value in values.items()
        }
        return {panel.fields["model"]: gr.Dropdown(info=form.about(card)), **told}

    def preset(self, name: str | None) -> Update:
        """Set the controls to the recipe's values, and show those that it has."""
        panel = self._panel
        try:
            recipe = recipes.find(name or DENSE)
        except KinoraError:
            recipe = Recipe()  # the prediction says why
        method, values = controls.method_of(recipe), controls.values(recipe)
        update: Update = {panel.fields["recipe"]: gr.Dropdown(info=recipe.title)}
        for key, group in panel.groups.items():
            here = key in ("", method)
            update[group] = gr.Column(visible=here)
            if here:
                update |= {it: values[path] for path, it in panel.options[key].items()}
        return update

    def predict(self, values: Values) -> str:
        """What the run would do, in words."""
        try:
            request = self._panel.request(values, self._output)
            # Whether there is a prompt yet changes nothing.
            return view.prediction(
                planning.plan(request.model_copy(update={"prompt": EXAMPLE_PROMPT}))
            )
        except Exception as error:
            return view.refused(_told(error))

    def _draw(self, shown: View) -> Update:
        panel = self._panel
        return {
            panel.status: view.status(shown, time.monotonic()),
            panel.result: view.result(shown),
            panel.generate: gr.Button(interactive=False),
            panel.cancel: gr.Button(interactive=shown.busy and not shown.stopping),
        }


def _told(error: Exception) -> str:
    """An exception as one line."""
    return str(error) if isinstance(error, KinoraError) else fault(error)
