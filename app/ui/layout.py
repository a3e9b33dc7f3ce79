"""The components of the page and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from ...accel import recipe as recipes
from ...accel.methods import METHODS
from ...accel.options import Option
from ...pipelines import cards
from ...pipelines.request import DEFAULT_MODEL, DENSE, EXAMPLE_PROMPT, Request
from . import controls, form, view
from .fields import explained, listed, number

RESTORED = (".mp4", ".webm", ".gif", ".png", ".json")
"""Endings of the files that settings are restored from."""
_ACTING = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]');
  if (button) trigger('click', {act: button.dataset.act, id: button.dataset.id});
});
"""


@dataclass(frozen=True)
class History:
    """The components of the tabs Jobs and Gallery; `opened` is the video that is looked at."""

    jobs_tab: gr.Tab
    jobs: gr.HTML
    gallery_tab: gr.Tab
    model: gr.Dropdown
    recipe: gr.Dropdown
    opened: gr.HTML
    gallery: gr.HTML


@dataclass(frozen=True)
class Panel:
    """The components that something is done with.

    `options` are by method, and under "" those of a recipe as a whole; each by what `--set` calls
    it. `groups` hold them, by the same names.
    """

    fields: dict[str, Component]
    options: dict[str, dict[str, Component]]
    groups: dict[str, gr.Column]
    prediction: gr.HTML
    generate: gr.Button
    cancel: gr.Button
    status: gr.HTML
    result: gr.HTML
    dropped: gr.File

    def inputs(self) -> list[Component]:
        """Everything that a request is made from."""
        return [*self.fields.values(), *self.all_options()]

    def all_options(self) -> list[Component]:
        """The controls of all methods."""
        return [it for each in self.options.values() for it in each.values()]

    def request(self, values: Mapping[Component, Any], output: str) -> Request:
        """What the fields ask for. Raises `KinoraError`."""
        fields = {name: values[it] for name, it in self.fields.items()}
        options = {
            method: {path: values[it] for path, it in each.items()}
            for method, each in self.options.items()
        }
        return form.request_of(fields, options, output)


def lay_out() -> Panel:
    """Make the components of the tab Generate, inside a `gr.Blocks`."""
    with gr.Row(elem_id="k-desk"):
        with gr.Column(elem_id="k-ask"):
            prompt = gr.Textbox(
                EXAMPLE_PROMPT, label="Prompt", lines=2, max_lines=8, elem_id="k-prompt"
            )
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id="k-generate", scale=2)
                cancel = gr.Button("Cancel", interactive=False, elem_id="k-cancel", min_width=90)
        with gr.Column(elem_id="k-fields"):
            fields = _model_fields()
            recipe, options, groups = _recipe_fields()
            advanced = _advanced_fields()
            with gr.Accordion("Restore settings from a file", open=False, elem_id="k-restore"):
                dropped = gr.File(
                    label="A video by Kinora, or its sidecar", file_types=list(RESTORED),
                    elem_id="k-dropped", height=120,
                )  # fmt: skip
        with gr.Column(elem_id="k-result"):
            status = gr.HTML(view.status(()), elem_id="k-status")
            result = gr.HTML(view.EMPTY, elem_id="k-output")
            prediction = gr.HTML(elem_id="k-prediction")
    fields = {"prompt": prompt, **fields, "recipe": recipe, **advanced}
    return Panel(fields, options, groups, prediction, generate, cancel, status, result, dropped)


def acting(name: str, content: str = "") -> gr.HTML:
    """HTML whose buttons with `data-act` trigger a click that says which and of what."""
    return gr.HTML(content, elem_id=name, js_on_load=_ACTING)


def lay_out_history() -> History:
    """Make the components of the tabs Jobs and Gallery."""
    with gr.Tab("Jobs", id="jobs", elem_id="k-jobs-tab") as jobs_tab:
        jobs = acting("k-jobs")
    with gr.Tab("Gallery", id="gallery", elem_id="k-gallery-tab") as gallery_tab:
        with gr.Row(elem_id="k-filters"):
            model = gr.Dropdown([("all", "")], value="", label="Model", elem_id="k-of-model")
            recipe = gr.Dropdown([("all", "")], value="", label="Recipe", elem_id="k-of-recipe")
        opened = acting("k-opened")
        gallery = acting("k-gallery")
    return History(jobs_tab, jobs, gallery_tab, model, recipe, opened, gallery)


def _model_fields() -> dict[str, Component]:
    card = cards.find(DEFAULT_MODEL)
    value, step = {"seed": 0, **form.defaults(card)}, form.steps(card)
    model = listed("model", card.name, cards.names(), form.about(card))
    fields: dict[str, Component] = {"model": model}
    for row in _EVERY_DAY:
        with gr.Row():
            fields |= {name: number(name, value[name], step.get(name, 1)) for name in row}
    return fields


def _advanced_fields() -> dict[str, Component]:
    fields: dict[str, Component] = {}
    value = form.defaults(cards.find(DEFAULT_MODEL))
    with gr.Accordion("Advanced", open=False, elem_id="k-advanced"):
        for row in _ADVANCED:
            with gr.Row():
                fields |= {name: explained(name, value.get(name)) for name in row}
    return fields


_EVERY_DAY = (("width", "height", "frames"), ("steps", "guidance", "seed"))
_ADVANCED = (
    ("negative_prompt",),
    ("num_videos", "fps"),
    ("format",),
    ("device", "dtype"),
    ("keep_latents",),
    ("strict",),
    ("force",),
)


def _recipe_fields() -> tuple[gr.Dropdown, dict[str, dict[str, Component]], dict[str, gr.Column]]:
    first = recipes.find(DENSE)
    recipe = listed("recipe", DENSE, recipes.names(), first.title)
    known: dict[str, dict[str, Option]] = {"": controls.recipe_options()}
    known |= {name: controls.method_options(name) for name in METHODS}
    options: dict[str, dict[str, Component]] = {}
    groups: dict[str, gr.Column] = {}
    for method, each in known.items():
        # As the recipe that is chosen at first has it.
        with gr.Column(visible=method == "", elem_classes="k-options") as groups[method]:
            options[method] = {path: controls.control(it, it.default) for path, it in each.items()}
    return recipe, options, groups
