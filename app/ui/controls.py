"""Controls for the options of recipes, made from their definitions: none is named here.

They stand in groups: "" has the options of a recipe as a whole, `attention` those of what wraps any
method, `attention.blade` those of one, `steps.easy` those of a policy, and so on. A selector, such
as `attention.method`, says which of a part's groups counts; "" is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import gradio as gr
from gradio.components import Component

from ...accel.options import Option, options_of
from ...accel.parts import PARTS, Part
from ...accel.recipe import Recipe

Values = dict[str, Any]
"""By what `--set` calls an option or a selector."""
_SHORT = frozenset(("qk", "pv", "cfg"))
_SLIDER_SPAN = 100  # whole numbers over more than that are easier typed


@cache
def selectors() -> dict[str, Part[Any]]:
    """The parts that choose something by name, by what `--set` calls the choice."""
    return {f"{it.key}.{it.selector}": it for it in PARTS.values() if isinstance(it, Part)}


@cache
def groups() -> dict[str, dict[str, Option]]:
    """All options by group, then by what `--set` calls them."""
    found: dict[str, dict[str, Option]] = {}
    for key, part in PARTS.items():
        if isinstance(part, Part):
            models: dict[str, Iterable[Any]] = {
                **{f"{key}.{name}": (it,) for name, it in part.known.items()},
                key: part.wrappers,
            }
        else:
            models = {key: (part.model,)}
        for group, each in models.items():
            found[group] = {f"{key}.{it.name}": it for model in each for it in options_of(model)}
    found[""] = {it.name: it for it in options_of(Recipe) if it.name != "title"}
    return {group: options for group, options in found.items() if options}


def active(chosen: Mapping[str, Any]) -> list[str]:
    """The groups that count where selectors have these values."""
    found: list[str] = []
    for group in groups():
        key, _, name = group.partition(".")
        part = PARTS.get(key)
        if isinstance(part, Part):
            selected = chosen.get(f"{key}.{part.selector}")
            if not selected or name not in ("", selected):
                continue
        found.append(group)
    return found


def defaults(selector: str, name: str) -> Values:
    """A method or policy of that name, as `--set` of it alone has it; {} where there is none."""
    part = selectors()[selector]
    if name not in part.known:
        return {}
    options = part.options(part.known[name])
    return {selector: name, **{f"{part.key}.{it.name}": it.default for it in options}}


def values(recipe: Recipe) -> Values:
    """Every option that `recipe` has, with its value there, and every selector."""
    table, known = recipe.table(), groups()
    found: Values = {path: it.default for path, it in known[""].items()}
    for path, part in selectors().items():
        found |= defaults(path, table.get(part.key, {}).get(part.selector, "")) or {path: ""}
    for group in active(found):
        found |= {path: it.default for path, it in known[group].items() if path not in found}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": it for name, it in value.items()}
        elif key in found:
            found[key] = value
    return found


def settings(recipe: Recipe, chosen: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What `--set` would have to say to come from `recipe` to what is chosen.

    None where nothing it could say does, since a part is to be left out. A value that is None, as
    of an emptied field, leaves the option as it is.
    """
    before, told = values(recipe), list[str]()
    for path, part in selectors().items():
        name = chosen.get(path)
        if name is None or name == before[path]:
            continue
        if not name:
            return None
        told.append(f"{path}={name}")
        others = {key: it for key, it in before.items() if not key.startswith(f"{part.key}.")}
        before = {**others, **defaults(path, name)}
    told += [
        f"{path}={str(chosen[path]).lower() if isinstance(value, bool) else chosen[path]}"
        for path, value in before.items()
        if chosen.get(path) is not None and chosen[path] != value
    ]
    return tuple(told)


def control(option: Option, value: Any) -> Component:
    """The control for an option: its kind, range, choices, unit and help come from it."""
    label = _label(option)
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


def _label(option: Option) -> str:
    """Its name, and its unit where the name does not say it."""
    words = option.name.split("_")
    told = " ".join(it.upper() if it in _SHORT else it for it in words)
    name = told[0].upper() + told[1:]
    # "of the steps" and "steps" of a `from_step`
    unit = option.unit.rpartition(" ")[2].removesuffix("s")
    return name if not unit or {unit, f"{unit}s"} & set(words) else f"{name} ({option.unit})"


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
