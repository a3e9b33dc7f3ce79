"""`inspect`: a run of a model with a recipe, up to one attention call that is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import cards, models, planning
from .errors import AccelerationError, GenerationError, RecipeError, RequestError
from .request import Request, resolve

if TYPE_CHECKING:
    from ..accel.inspection import View
    from ..accel.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Inspected:
    """A call with its plan, and what of it was asked for: heads, and a query by its place."""

    model: str
    recipe: Recipe
    view: View
    heads: tuple[int, ...]
    query: tuple[int, int, int]
    """Frame, row, column."""


def inspect(
    request: Request,
    *,
    layer: int | None = None,
    step: int | None = None,
    heads: Sequence[int] = (),
    query: tuple[int, int, int] | None = None,
    report: Callable[[str], None],
) -> Inspected:
    """Run `request` up to a step, and return the call of a layer there.

    The recipe's method is asked in every call, also where the recipe would find it too slow, of
    which `report` is told.

    Args:
        layer, step: from 0; None is the middle one.
        heads: from 0; none are all.
        query: frame, row and column of a token; None is the middle of the picture.
        report: is told what is going on, in lines.

    Raises `KinoraError`: as `generate` does; a number that is out of range; a call that the recipe
    runs dense, with a near one that it does not; one line each.
    """
    card = cards.find(request.model)
    resolved = resolve(request, card)
    weights = models.locate(card)
    place = models.place(card, resolved.device, resolved.dtype)
    resolved = resolved.model_copy(update={"device": place.device, "dtype": place.dtype})
    notices: list[str] = []
    recipe, _ = planning.recipe(resolved, weights, notices.append)
    if recipe.attention is None:
        raise RecipeError(
            "the recipe accelerates no attention, so there is no plan to look at: choose another "
            "--recipe, or --set attention.method"
        )
    shape = planning.shape_of(weights.folder)
    layer = _within("layer", layer, len(shape.layers))
    of = shape.layers[layer]
    grid = card.grid(resolved.width, resolved.height, resolved.frames).halved(of.halvings)
    step = _within("step", step, resolved.steps)
    heads = [_within("head", head, of.heads) for head in heads or range(of.heads)]
    frame, row, column = query or (None, None, None)
    query = (
        _within("frame of the query", frame, grid.frames),
        _within("row of the query", row, grid.height),
        _within("column of the query", column, grid.width),
    )

    from ..accel.attach import accelerate
    from ..accel.inspection import Caught, Lens, why_dense
    from ..accel.site import Site
    from .chatter import relayed
    from .denoise import denoise

    lens = Lens(recipe.attention, layer=layer, step=step)
    site = Site(grid, layer, len(shape.layers), step, resolved.steps)
    # How long text is beside the picture only the run knows.
    if not of.text and recipe.attention.predict(site) >= 1:
        raise AccelerationError(why_dense(recipe.attention, site))
    for notice in notices:
        report(f"{notice}; drawn is what its method would keep")
    report(f"loading {card.name}")
    with relayed(report):
        pipe: Any = models.load(weights, place).pipe

    def after_step(pipe: Any, step: int) -> None:
        del pipe
        report(f"step {step + 1}/{resolved.steps}")

    whole = recipe.model_copy(update={"attention": lens, "when": "always"})
    with accelerate(pipe, whole, seed=resolved.seed) as session:
        try:
            denoise(pipe, card, resolved, after_step)
        except Caught as caught:
            return Inspected(card.name, recipe, caught.view, tuple(dict.fromkeys(heads)), query)
    ran, policy = session.receipt.attention, session.receipt.policy
    if policy is not None and policy.pattern[step : step + 1] == "s":
        raise GenerationError(f"step {step} is skipped by {policy.asked}: choose another --step")
    cache = session.receipt.cache
    if cache is not None and cache.pattern[step : step + 1] == "r":
        raise GenerationError(
            f"layer {layer} is reused in step {step} by {cache.asked}: choose another --step"
        )
    why = "; ".join(ran.dense) if ran else ""
    raise GenerationError(f"no method was asked in layer {layer} at step {step}: dense {why}")


def _within(what: str, given: int | None, count: int) -> int:
    """A number from 0 to `count` - 1; None is the middle one. Raises `RequestError`."""
    if given is None:
        return count // 2
    if not 0 <= given < count:
        raise RequestError(f"the {what} must be 0 to {count - 1}, not {given}")
    return given
