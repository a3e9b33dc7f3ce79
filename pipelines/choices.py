"""Which choices of a recipe a model or a machine cannot run, told before anything is loaded.

A choice is refused for what a run with it would be refused for: by the functions that plans and
runs ask, see `verdicts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from . import cards, models, verdicts
from .errors import RecipeError
from .folder import ModelFolder, WeightFile
from .request import Request, Resolved, resolve

if TYPE_CHECKING:
    from ..accel.cost import Shape
    from ..accel.recipe import Recipe
    from ..kernels.precision import Precision

Refused = dict[str, dict[str, str]]
"""By what `--set` calls an option, then by choice: why it cannot be."""


def refused(request: Request) -> Refused:
    """The choices that could not run in place of those of the recipe of `request`.

    Choices that are not there can run, as far as is known without their other options. Raises
    `KinoraError` as `plan` does.
    """
    from ..accel.recipe import from_table

    card = cards.find(request.model)
    resolved = resolve(request, card, read_image=False)
    outline = models.outline(card)
    place = models.place(card, resolved.device, resolved.dtype)
    resolved = resolved.model_copy(update={"device": place.device, "dtype": place.dtype})
    chosen = from_table(resolved.recipe)
    return {
        "attention.method": _methods(outline.folder, outline.files),
        "steps.policy": _policies(resolved, chosen, outline.folder),
        "dense_kernel": _dense_kernels(resolved, outline.folder),
        **_precisions(resolved, chosen, outline.folder),
    }


def _methods(folder: ModelFolder, files: Sequence[WeightFile]) -> dict[str, str]:
    from ..accel.methods import METHODS

    try:
        verdicts.shape_of(folder)
    except RecipeError as error:
        return dict.fromkeys(METHODS, str(error))
    told = {name: verdicts.unfit(method(), files) for name, method in METHODS.items()}
    return {name: why for name, why in told.items() if why}


def _policies(resolved: Resolved, chosen: Recipe, folder: ModelFolder) -> dict[str, str]:
    from ..accel.policies import POLICIES

    found: dict[str, str] = {}
    for name, policy in POLICIES.items():
        table = chosen.model_copy(update={"steps": policy()}).table()
        part = verdicts.steps(resolved.model_copy(update={"recipe": table}), folder)
        if part is not None and part.verdict == "refused":
            found[name] = part.why
    return found


def _dense_kernels(resolved: Resolved, folder: ModelFolder) -> dict[str, str]:
    from ..kernels.dense import DENSE_KERNELS

    found: dict[str, str] = {}
    for name in DENSE_KERNELS:
        table = {"dense_kernel": name}
        part = verdicts.dense_kernel(resolved.model_copy(update={"recipe": table}), folder)
        if part is not None and part.verdict == "refused":
            found[name] = part.why
    return found


def _precisions(resolved: Resolved, chosen: Recipe, folder: ModelFolder) -> Refused:
    """Of the method that is chosen; none are told where there is none."""
    from ..accel.options import options_of
    from ..accel.wrappers import Quantised, innermost

    if chosen.attention is None:
        return {}
    try:
        shape = verdicts.shape_of(folder)
    except RecipeError:
        return {}  # then the method itself is refused
    method, now = innermost(chosen.attention), chosen.attention.precision()
    found: Refused = {}
    for option in options_of(Quantised):
        told = found[f"attention.{option.name}"] = dict[str, str]()
        for choice in option.choices:
            try:
                Quantised.check(method, {option.name: choice})
            except RecipeError as error:
                told[choice] = str(error)
                continue
            why = _unserved(resolved, chosen, shape, replace(now, **{option.name: choice}))
            if why and choice != option.default:
                told[choice] = why
    return found


def _unserved(resolved: Resolved, chosen: Recipe, shape: Shape, precision: Precision) -> str | None:
    """Why no kernel of the device multiplies so, but the reference alone; or None."""
    import torch

    from ..accel.cost import problem_of
    from ..kernels.backends import choose, refuses
    from ..kernels.precision import INPUT

    assert chosen.attention is not None
    grid = cards.find(resolved.model).grid(resolved.width, resolved.height, resolved.frames)
    layer = shape.layers[0]
    problem = problem_of(
        chosen.attention.tiling(),
        resolved.device,
        getattr(torch, resolved.dtype),
        (2, layer.heads, layer.tokens(grid), layer.head_dim),
        precision=precision,
    )
    usual = choose(replace(problem, precision=INPUT))
    if usual == "reference" or choose(problem) != "reference":
        return None
    return (
        f"no kernel multiplies so on {resolved.device}, of the {usual} kernel "
        f"{refuses(problem, usual)}; the reference rounds alike, and is slow"
    )
