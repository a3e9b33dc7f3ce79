"""The fields of the page, each made from the option that the command line has for the same.

What a recipe consists of is not here: see `controls`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr
from gradio.components import Component

from ...pipelines.request import DEVICES, DTYPES, FORMATS, Request
from .. import arguments
from ..arguments import Spelled, spelled


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of a `Request` is called here, and what it is called with `--`.

    `choices` are offered in a list; `free` says that something else may be typed there.
    """

    label: str
    option: Any
    choices: tuple[str, ...] = ()
    free: bool = False

    @property
    def title(self) -> str:
        """The label without its unit and its explanation."""
        return re.split(r",| \(", self.label)[0]


FIELDS: dict[str, Field] = {
    "model": Field("Model, or the path of a diffusers folder", arguments.Model),
    "width": Field("Width (px)", arguments.Size),
    "height": Field("Height (px)", arguments.Size),
    "frames": Field("Frames", arguments.Frames),
    "steps": Field("Steps", arguments.Steps),
    "guidance": Field("Guidance", arguments.Guidance),
    "seed": Field("Seed", arguments.Seed),
    "image": Field("Image", arguments.Image),
    "recipe": Field("Recipe, or the path of a TOML file", arguments.RecipeName),
    "negative_prompt": Field("Negative prompt", arguments.NegativePrompt),
    "num_videos": Field("Videos", arguments.NumVideos),
    "fps": Field("FPS", arguments.Fps),
    "format": Field("Format", arguments.Media, FORMATS),
    "device": Field("Device", arguments.Device, DEVICES, free=True),
    "dtype": Field("Dtype", arguments.Dtype, DTYPES),
    "keep_latents": Field("Keep latents", arguments.KeepLatents),
    "strict": Field("Strict", arguments.Strict),
    "force": Field("Force", arguments.Force),
}
"""By the names that a `Request` has for them."""


def listed(name: str, value: str, choices: list[str], info: str) -> gr.Dropdown:
    """A list with room for a path, and a line about what is chosen."""
    return gr.Dropdown(
        choices, value=value, label=FIELDS[name].label, info=info, allow_custom_value=True,
        elem_id=f"k-{name}",
    )  # fmt: skip


def number(name: str, value: float, step: float = 1, info: str = "") -> gr.Number:
    """A number; emptied, it shows what the default is."""
    # No precision, which would round what was typed: what is no whole number is refused.
    return gr.Number(
        value, label=FIELDS[name].label, info=info, step=step,
        placeholder=spelled_as(name).default, min_width=90, elem_id=f"k-{name}",
    )  # fmt: skip


def explained(name: str, value: Any = None) -> Component:
    """The control of a field, with the help that the command line has for it.

    Without a `value` it stands at the default of `Request`.
    """
    field, default = FIELDS[name], Request.model_fields[name].default
    shared: dict[str, Any] = {
        "label": field.label, "info": spelled_as(name).help, "elem_id": f"k-{name}"
    }  # fmt: skip
    if field.choices:
        # The default has an entry of its own where it is none of the choices.
        unset = [] if default in field.choices else [(spelled_as(name).default, "")]
        return gr.Dropdown(
            [*unset, *((it, it) for it in field.choices)], value=default or "",
            allow_custom_value=field.free, min_width=90, **shared,
        )  # fmt: skip
    if bool in _kinds(name):
        return gr.Checkbox(default, **shared)
    if str in _kinds(name):
        return gr.Textbox(default, placeholder=spelled_as(name).default, **shared)
    return number(name, default if value is None else value, info=spelled_as(name).help)


def spelled_as(name: str) -> Spelled:
    """How the command line spells and explains a field."""
    return spelled(FIELDS[name].option, name)


def _kinds(name: str) -> tuple[Any, ...]:
    annotation = Request.model_fields[name].annotation
    return get_args(annotation) or (annotation,)


def _names() -> Mapping[str, str]:
    """What texts for the command line and for Python call fields → their titles here."""
    titles: dict[str, list[str]] = {}
    for name, field in FIELDS.items():
        titles.setdefault(spelled_as(name).flag, []).append(field.title)
        if "_" in name:  # the others are words that say the same
            titles[name] = [field.title]
    return {name: " and ".join(each) for name, each in titles.items()}


_NAMES = _names()
# What stands between backticks is a command or a file's content, and stays so.
_NAME = re.compile(
    rf"`[^`]*`|(?<![\w/.-])(?:{'|'.join(sorted(_NAMES, key=len, reverse=True))})(?![\w/-])"
)


def in_titles(text: str) -> str:
    """`text` with the titles of fields in place of `--size` and the like."""
    return _NAME.sub(lambda found: _NAMES.get(found[0], found[0]), text)


def known(chosen: str | None, names: Sequence[str]) -> str:
    """What is chosen in a filter, all where that is there no more."""
    return chosen if chosen and chosen in names else ""


def filtering(names: Sequence[str], chosen: str | None) -> gr.Dropdown:
    """The choices of a filter, all of which is none.

    What is chosen is set where it is there no more alone: there may be another choice by now.
    """
    choices = [("all", ""), *((it, it) for it in names)]
    there = known(chosen, names) == (chosen or "")
    return gr.Dropdown(choices) if there else gr.Dropdown(choices, value="")
