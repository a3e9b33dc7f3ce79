"""The acceleration of a run: presets with their figures, and under them every option there is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from ...accel import recipe as recipes
from ...accel.errors import RecipeError
from ...accel.facts import facts
from ...accel.presets import MEASURED
from ...accel.recipe import Recipe
from ...pipelines.choices import Refused
from ...pipelines.request import DENSE, Request
from . import controls, spelling
from .acting import acting
from .fields import listed
from .view import worded

_TITLES = {"attention.method": "Attention method", "steps.policy": "Step policy"}
_PARTS = {
    "attention": "Any method: when, and in how many bits",
    "parallel": "Several processes, for the command line: here one makes a video",
    "": "The whole",
}
_NOT_HERE = " (not here)"
"""Ends the name of a choice that cannot run; page.css greys it."""


@dataclass(frozen=True)
class Builder:
    """Its components.

    `options` are by group, then by what `--set` calls them; `columns` hold them, by group.
    `selectors` are by what `--set` calls the choice; `about` says of each what is chosen. `why`
    lists the choices that cannot run, or says what is wrong with those that are made.
    """

    recipe: gr.Dropdown
    line: gr.HTML
    presets: gr.HTML
    selectors: dict[str, gr.Dropdown]
    about: dict[str, gr.HTML]
    options: dict[str, dict[str, Component]]
    columns: dict[str, gr.Column]
    why: gr.HTML
    toml: gr.Textbox
    command: gr.Textbox

    def inputs(self) -> list[Component]:
        """All that a recipe is made from beside its name."""
        return [*self.selectors.values(), *self.all_options().values()]

    def all_options(self) -> dict[tuple[str, str], Component]:
        """The controls of all groups, by group and by what `--set` calls them."""
        return {
            (group, path): it for group, each in self.options.items() for path, it in each.items()
        }

    def changed(self) -> list[Any]:
        """What `shown` changes."""
        about = self.about.values()
        return [
            self.recipe,
            self.line,
            self.presets,
            *self.inputs(),
            *self.columns.values(),
            *about,
        ]

    def chosen(self, values: Mapping[Component, Any]) -> controls.Values:
        """What its controls say, by what `--set` calls it; of groups that do not count, nothing."""
        found: controls.Values = {path: values[it] for path, it in self.selectors.items()}
        for group in controls.active(found):
            found |= {path: values[it] for path, it in self.options[group].items()}
        return found

    def shown(self, name: str, recipe: Recipe) -> dict[Any, Any]:
        """All of it as the recipe of that name has it; the name's own field is left alone."""
        found = controls.values(recipe)
        return {**self.named(name, found), **self._standing(found)}

    def named(self, name: str, chosen: Mapping[str, Any]) -> dict[Any, Any]:
        """What the recipe of that name is called, and its preset pressed, while it is as chosen."""
        try:
            recipe = recipes.find(name)
        except RecipeError:  # the prediction says why
            return {self.line: "", self.presets: presets("")}
        same = controls.settings(recipe, chosen) == ()
        told = recipe.title if same else f"{Path(name).stem}, changed"
        # Not as the field's info: an update of it on its way would undo a choice made meanwhile.
        return {self.line: _line(told), self.presets: presets(name if same else "")}

    def selected(self, path: str, name: str | None) -> dict[Any, Any]:
        """The controls once a method or policy is chosen: all at its defaults."""
        found = controls.defaults(path, name or "") or {path: name or ""}
        update = self._standing(found)
        part = controls.selectors()[path].key
        own = {group for group in self.columns if group.partition(".")[0] == part}
        kept = [self.columns[it] for it in own] + [self.about[path]]
        kept += [it for (group, _), it in self.all_options().items() if group in own]
        return {it: value for it, value in update.items() if it in kept}

    def _standing(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        update: dict[Any, Any] = {}
        active = controls.active(values)
        for group, column in self.columns.items():
            update[column] = gr.update(visible=group in active)
            if group in active:
                update |= {it: values[path] for path, it in self.options[group].items()
                           if path in values}  # fmt: skip
        for path, selector in self.selectors.items():
            if path in values:
                update[selector] = values[path]
                update[self.about[path]] = about(path, values[path])
        return update

    def told(self, request: Request, refused: Refused) -> dict[Any, Any]:
        """The recipe as a file and as a command, and the choices that cannot run greyed.

        A request without a prompt is refused wherever it is asked for: it has no command.
        """
        words = ["kinora", *spelling.arguments(request)] if request.prompt.strip() else []
        return {
            self.toml: spelling.toml(request),
            self.command: " ".join(map(_quoted, words)),
            self.why: reasons(refused),
            **self._greyed(refused),
        }

    def untold(self, why: str) -> dict[Any, Any]:
        """Nothing to copy: what stood there would ask for something else than the fields do."""
        return {self.toml: "", self.command: "", self.why: why}

    def greyed(self) -> list[Any]:
        """What `told` and `untold` change."""
        lists = [it for (_, path), it in self.all_options().items() if path in _LISTS]
        own = [self.toml, self.command, self.why]
        return [*own, *self.selectors.values(), *lists]

    def _greyed(self, refused: Refused) -> dict[Any, Any]:
        update: dict[Any, Any] = {}
        for path, selector in self.selectors.items():
            update[selector] = gr.update(choices=_selectable(path, refused.get(path, {})))
        for (group, path), it in self.all_options().items():
            if path in _LISTS:
                option = controls.groups()[group][path]
                choices = [_labelled(name, refused.get(path, {})) for name in option.choices]
                update[it] = gr.update(choices=choices)
        return update


_TURNING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_LISTS = ("dense_kernel", "attention.qk", "attention.pv")


def lay_out() -> Builder:
    """Make the components, as the dense recipe has them."""
    first = recipes.find(DENSE)
    shown = acting("k-presets", presets(DENSE))
    recipe = listed("recipe", DENSE, recipes.names(), "")
    line = gr.HTML(_line(first.title), elem_id="k-recipe-line")
    with gr.Accordion("Every method and option", open=False, elem_id="k-builder"):
        selectors: dict[str, gr.Dropdown] = {}
        abouts: dict[str, gr.HTML] = {}
        options: dict[str, dict[str, Component]] = {}
        columns: dict[str, gr.Column] = {}
        standing = controls.values(first)
        active = controls.active(standing)
        for group, known in controls.groups().items():
            key, _, name = group.partition(".")
            path = next((it for it, part in controls.selectors().items() if part.key == key), None)
            if path is not None and path not in selectors:
                selectors[path] = gr.Dropdown(
                    _selectable(path, {}), value="", label=_TITLES[path],
                    allow_custom_value=True, elem_id=f"k-{path.replace('.', '-')}",
                )  # fmt: skip
                abouts[path] = gr.HTML(about(path, ""))
            columns[group] = gr.Column(
                visible=group in active, elem_classes="k-options",
                elem_id=f"k-options-{(group or 'recipe').replace('.', '-')}",
            )  # fmt: skip
            with columns[group]:
                if not name and group in _PARTS:
                    gr.HTML(f'<b class="k-part">{_PARTS[group]}</b>')
                options[group] = {
                    path: controls.control(it, standing[path] if group in active else it.default)
                    for path, it in known.items()
                }
        why = gr.HTML(elem_id="k-why")
        toml = gr.Textbox(
            label="As a file", lines=3, max_lines=12, interactive=False, buttons=["copy"],
            elem_id="k-toml",
        )  # fmt: skip
    command = gr.Textbox(
        label="As a command line", lines=1, max_lines=4, interactive=False, buttons=["copy"],
        elem_id="k-command",
    )  # fmt: skip
    return Builder(recipe, line, shown, selectors, abouts, options, columns, why, toml, command)


def _quoted(word: str) -> str:
    """A word for a shell; characters that would turn what is shown after them are escaped."""
    if not _TURNING.search(word):
        return shlex.quote(word)
    word = word.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + _TURNING.sub(lambda it: f"\\u{ord(it[0]):04x}", word) + "'"


def _line(told: str) -> str:
    return f'<p class="k-facts">{escape(told)}</p>'


def presets(chosen: str) -> str:
    """The presets to choose from, with what each was measured to do."""
    cards = "".join(_preset(name, chosen) for name in MEASURED)
    told = MEASURED.get(chosen)
    note = "" if told is None or not told.where else f"{chosen}: {told.speed_words}."
    return (
        f'<div class="k-presets" role="group" aria-label="Presets">{cards}</div>'
        f'<p class="k-facts">{escape(note.replace("`", ""))}</p>'
    )


def _preset(name: str, chosen: str) -> str:
    told = MEASURED[name]
    pressed = "true" if name == chosen else "false"
    return (
        f'<button data-act="preset" data-id="{name}" aria-pressed="{pressed}"><b>{name}</b> '
        f"<span>{escape(told.speed)}</span>"
        f"<small>cost in quality: {escape(told.cost)}</small></button>"
    )


def about(path: str, name: str | None) -> str:
    """The rule of a method or policy, and when to choose it; nothing where none is chosen."""
    part = controls.selectors()[path]
    if not name or name not in part.known:
        return ""
    found = facts(part.known[name])
    told = f"{found.short} Choose it where {found.use_when}".replace("`", "")
    return f'<p class="k-facts">{escape(told)}</p>'


def reasons(refused: Refused) -> str:
    """Why choices cannot be, each reason once."""
    lines: list[str] = []
    for path, each in refused.items():
        by_reason: dict[str, list[str]] = {}
        for name, why in each.items():
            by_reason.setdefault(why, []).append(name)
        what = path.rpartition(".")[2].replace("_", " ")
        lines += [f"{what} {', '.join(names)}: {why}" for why, names in by_reason.items()]
    if not lines:
        return ""
    items = "".join(f"<li>{worded(line)}</li>" for line in lines)
    return (
        '<details class="k-remark"><summary>What cannot run here, and why</summary>'
        f"<ul>{items}</ul></details>"
    )


def _selectable(path: str, refused: Mapping[str, str]) -> list[tuple[str, str]]:
    part = controls.selectors()[path]
    return [(f"none: {part.without}", ""), *(_labelled(name, refused) for name in part.known)]


def _labelled(name: str, refused: Mapping[str, str]) -> tuple[str, str]:
    return (f"{name}{_NOT_HERE}" if name in refused else name), name
