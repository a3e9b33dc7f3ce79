"""Controls for the options of recipes, made from their definitions: none is named here."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
from gradio.components import Component

from ...accel.methods import METHODS
from ...accel.options import Option, options_of
from ...accel.parts import ATTENTION
from ...accel.recipe import Recipe

PART = "attention"
_SLIDER_SPAN = 100  # whole numbers over more than that are easier typed


def recipe_options() -> dict[str, Option]:
    """Options of a recipe as a whole, by what `--set` calls them; a title changes nothing."""
    return {it.name: it for it in options_of(Recipe) if it.name != "title"}


def method_options(method: str) -> dict[str, Option]:
    """Options of an attention method and of what may wrap it, by what `--set` calls them."""
    return {f"{PART}.{it.name}": it for it in ATTENTION.options(METHODS[method])}


def method_of(recipe: Recipe) -> str | None:
    """The attention method of a recipe, if it has one."""
    return recipe.table().get(PART, {}).get("method")


def values(recipe: Recipe) -> dict[str, Any]:
    """Every option that `recipe` has, with its value there."""
    table = recipe.table()
    found = {path: table.get(path, it.default) for path, it in recipe_options().items()}
    method = method_of(recipe)
    if method is None:
        return found
    known = method_options(method)
    return found | {path: table[PART].get(it.name, it.default) for path, it in known.items()}


def settings(recipe: Recipe, chosen: dict[str, Any]) -> tuple[str, ...]:
    """What `--set` would have to say to come from `recipe` to the values chosen.

    A value that is None, as of an emptied field, leaves the option as it is.
    """
    return tuple(
        f"{path}={chosen[path]}"
        for path, value in values(recipe).items()
        if chosen.get(path) is not None and chosen[path] != value
    )


def control(option: Option, value: Any) -> Component:
    """The control for an option: its kind, range, choices, unit and help come from it."""
    name = option.name.replace("_", " ").capitalize()
    label = f"{name} ({option.unit})" if option.unit else name
    if option.choices:
        return gr.Dropdown(list(option.choices), value=value, label=label, info=option.help)
    if option.kind is bool:
        return gr.Checkbox(bool(value), label=label, info=option.help)
    if option.kind is str:
        return gr.Textbox(value, label=label, info=option.help)
    step = _step(option, value)
    if option.least is not None and option.most is not None and _slides(option):
        low = option.least + step if option.above else option.least
        # Without its reset button, which would go back to the default rather than to the recipe.
        return gr.Slider(
            low, option.most, value, step=step, label=label, info=option.help, buttons=[]
        )
    # No bounds for the field: what is out of range is refused by the recipe, in its own words.
    return gr.Number(value, label=label, info=option.help, step=step)


def _slides(option: Option) -> bool:
    span = (option.most or 0) - (option.least or 0)
    return option.kind is float or span <= _SLIDER_SPAN


def _step(option: Option, value: Any) -> float:
    """A step by which a slider can stand at `value`: a hundredth of the range, or finer."""
    if option.kind is int:
        return 1
    if option.least is None or option.most is None:
        return 0.1
    digits = 2 - math.floor(math.log10(option.most - option.least))
    while digits < 6 and round(value, digits) != value:
        digits += 1
    return round(10.0**-digits, digits)
