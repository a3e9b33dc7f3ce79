"""The components of the page and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from ...pipelines import cards
from ...pipelines.request import DEFAULT_MODEL, EXAMPLE_PROMPT, Request
from . import form, view
from .acting import acting
from .builder import Builder
from .builder import lay_out as lay_out_builder
from .drawing import Drawing
from .fields import explained, listed, number
from .history import Fields
from .image_field import ImageField

RESTORED = (".mp4", ".webm", ".gif", ".png", ".json")
"""Endings of the files that settings are restored from."""


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
    """The components that something is done with; `fields` by the names of a `Request`."""

    fields: dict[str, Component]
    builder: Builder
    prediction: gr.HTML
    generate: gr.Button
    cancel: gr.Button
    status: gr.HTML
    result: gr.HTML
    dropped: gr.File
    drawing: Drawing
    image: ImageField
    words: gr.HTML

    def inputs(self) -> list[Component]:
        """Everything that a request is made from."""
        return [*self.fields.values(), *self.builder.inputs()]

    def request(self, values: Mapping[Component, Any], output: str) -> Request:
        """What the fields ask for. Raises `KinoraError`."""
        fields = {name: values[it] for name, it in self.fields.items()}
        return form.request_of(fields, self.builder.chosen(values), output)


def lay_out(page: Fields) -> Panel:
    """Make the components of the tab Generate of `page`, inside a `gr.Blocks`."""
    with gr.Row(elem_id="k-desk"):
        with gr.Column(elem_id="k-ask"):
            prompt = gr.Textbox(
                EXAMPLE_PROMPT, label="Prompt", lines=2, max_lines=8, elem_id="k-prompt"
            )
            words = gr.HTML(form.words(cards.find(DEFAULT_MODEL)), elem_id="k-words")
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id="k-generate", scale=2)
                cancel = gr.Button("Cancel", interactive=False, elem_id="k-cancel", min_width=90)
        with gr.Column(elem_id="k-fields"):
            fields = _model_fields()
            image = ImageField(cards.find(DEFAULT_MODEL))
            builder = lay_out_builder()
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
            drawing = Drawing(page)
    fields = {"prompt": prompt, **fields, "image": image.id, "recipe": builder.recipe, **advanced}
    return Panel(
        fields, builder, prediction, generate, cancel, status, result, dropped, drawing,
        image, words,
    )  # fmt: skip


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
