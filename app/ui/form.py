"""From the fields of the page to a `Request`, and from a model's card to the fields' defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from ...accel import recipe as recipes
from ...accel.recipe import Recipe
from ...pipelines.cards import Card
from ...pipelines.errors import RequestError, explain_invalid
from ...pipelines.request import DENSE, Request
from ...pipelines.sidecar import Record
from .controls import method_of, settings, values

Keep = Callable[[Recipe], str]

BY_CARD = ("width", "height", "frames", "steps", "guidance", "fps")
"""Fields whose defaults are the model's own."""


def request_of(
    fields: Mapping[str, Any], options: Mapping[str, dict[str, Any]], output: str
) -> Request:
    """What the page asks for.

    An empty field means the default. `options` holds the values of the controls by method, and
    under "" those of a recipe as a whole; methods that the recipe does not use are left alone.

    Raises `KinoraError` where there is no such recipe, or a value is of the wrong kind.
    """
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    recipe = recipes.find(given.get("recipe", DENSE))
    chosen = {**options[""], **options.get(method_of(recipe) or "", {})}
    return checked({"prompt": "", **given, "output": output, "settings": settings(recipe, chosen)})


def checked(fields: Mapping[str, Any]) -> Request:
    """A request with these fields. Raises `RequestError` in one line."""
    try:
        return Request.model_validate(fields)
    except ValueError as error:  # pydantic's
        raise RequestError(explain_invalid(cast("Any", error))) from None


def restored(record: Record, keep: Keep) -> tuple[dict[str, Any], Recipe]:
    """The fields that ask for what a record shows, and its recipe, which they name.

    `keep` puts a recipe that is no preset with other options into a file, and tells where.
    """
    request = record.request
    recipe = recipes.from_table(request.recipe)
    names = (*BY_CARD, "prompt", "model", "seed", "dtype", "device", "strict", "keep_latents")
    fields = {name: getattr(request, name) for name in names}
    fields |= {"negative_prompt": request.negative_prompt or "", "format": request.format}
    fields |= {"num_videos": 1, "force": False, "recipe": _base(recipe) or keep(recipe)}
    return fields, recipe


def _base(recipe: Recipe) -> str | None:
    """The preset from which controls come to `recipe`, with the fewest changes."""
    wanted, found = recipe.table(), dict[str, int]()
    if not set(wanted) - {"title"}:
        return DENSE
    for name in recipes.names():
        preset = recipes.find(name)
        changes = settings(preset, values(recipe))
        if {**recipes.changed(preset, changes).table(), "title": ""} == {**wanted, "title": ""}:
            found[name] = len(changes)
    return min(found, key=lambda name: found[name], default=None)


def defaults(card: Card) -> dict[str, Any]:
    """The fields of `BY_CARD` as the model has them."""
    return {name: getattr(card, name) for name in BY_CARD}


def steps(card: Card) -> dict[str, float]:
    """By how much a press on a field's arrows changes it, so that it stays allowed."""
    across, down = card.multiple_px
    return {"width": across, "height": down, "frames": card.frame_stride, "guidance": 0.5}


def about(card: Card) -> str:
    """What the model is, in a line."""
    return f"{card.title or card.pipeline} (licence: {card.licence})"
