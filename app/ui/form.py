"""From the fields of the page to a `Request`, and from a model's card to the fields' defaults."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, cast

from ...accel import recipe as recipes
from ...accel.recipe import Recipe
from ...pipelines import vocabulary
from ...pipelines.cards import Card
from ...pipelines.errors import KinoraError, RequestError, explain_invalid
from ...pipelines.request import DENSE, Request
from ...pipelines.sidecar import Record
from .controls import settings, values

BY_CARD = ("width", "height", "frames", "steps", "guidance", "fps")
"""Fields whose defaults are the model's own."""


def request_of(fields: Mapping[str, Any], chosen: Mapping[str, Any], output: str) -> Request:
    """What the page asks for.

    An empty field means the default. `chosen` is what the recipe is to have, see `controls`; where
    that leaves out a part of the recipe which the fields name, it is told from the dense one.

    Raises `KinoraError` where there is no such recipe, or a value is of the wrong kind.
    """
    given = {name: value for name, value in fields.items() if value not in (None, "")}
    told = settings(recipes.find(given.get("recipe", DENSE)), chosen)
    if told is None:
        given["recipe"], told = DENSE, settings(recipes.find(DENSE), chosen)
    return checked({"prompt": "", **given, "output": output, "settings": told})


def checked(fields: Mapping[str, Any]) -> Request:
    """A request with these fields. Raises `RequestError` in one line."""
    try:
        return Request.model_validate(fields)
    except ValueError as error:  # pydantic's
        raise RequestError(explain_invalid(cast("Any", error))) from None


def restored(record: Record) -> tuple[dict[str, Any], Recipe]:
    """The fields that ask for what a record shows, and its recipe.

    The one that the fields name is the preset from which fewest changes lead there.
    """
    request = record.request
    recipe = recipes.from_table(request.recipe) if request.recipe else recipes.find(DENSE)
    told = {name: settings(recipes.find(name), values(recipe)) for name in recipes.names()}
    changes = {name: len(it) for name, it in told.items() if it is not None}
    names = (*BY_CARD, "prompt", "model", "seed", "dtype", "device", "strict", "keep_latents")
    fields = {name: getattr(request, name) for name in names}
    fields |= {"negative_prompt": request.negative_prompt or "", "format": request.format}
    fields |= {"num_videos": 1, "force": False}
    return {**fields, "recipe": min(changes, key=lambda name: changes[name])}, recipe


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


def words(card: Card) -> str:
    """The words that the model knows, folded; nothing where it knows any, or cannot be asked."""
    try:
        known = vocabulary.words(card)
    except KinoraError:  # damaged: the prediction says so
        known = None
    if known is None:
        return ""
    return (
        '<details class="k-remark"><summary>Words it knows</summary>'
        f"<p>{escape(' '.join(known))}</p></details>"
    )
