"""A request as the command line that asks for the same, and its recipe as a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ...accel import recipe as recipes
from ...pipelines import cards
from ...pipelines.request import Request, recipe_table
from .fields import FIELDS, spelled_as

_BY_SIZE = ("width", "height")
_INSPECTED = (
    "model", "frames", "steps", "guidance", "seed", "negative_prompt", "image", "device", "dtype"
)  # fmt: skip


def arguments(request: Request) -> list[str]:
    """What `kinora` must be called with to ask for the same; files are named as it names them.

    Fields that stand at their default are left out, and `output`, where others may not write.
    Raises `KinoraError` where there is no such model, and one side of the size is the model's own.
    """
    return _spelled("generate", request, FIELDS)


def inspection(request: Request, layer: int | None, step: int | None, output: Path) -> list[str]:
    """What `kinora` must be called with to draw what its recipe keeps in a layer at a step.

    None is the middle one. Raises as `arguments` does.
    """
    further = ["--recipe", str(request.recipe), "--output", str(output)]
    for flag, number in (("--layer", layer), ("--step", step)):
        further += [] if number is None else [flag, str(number)]
    return _spelled("inspect", request, _INSPECTED, further)


def _spelled(
    command: str, request: Request, names: Iterable[str], further: Sequence[str] = ()
) -> list[str]:
    told = list(further)
    if request.width is not None or request.height is not None:
        card = cards.find(request.model)
        told += ["--size", f"{request.width or card.width}x{request.height or card.height}"]
    for name in names:
        value = getattr(request, name)
        if name in _BY_SIZE or value == Request.model_fields[name].default:
            continue
        flag = spelled_as(name).flag
        told += [flag] if value is True else [flag, str(value)]
    for setting in request.settings:
        told += ["--set", setting]
    # Behind `--` nothing is an option, however it begins.
    prompt = ["--", request.prompt] if request.prompt.startswith("-") else [request.prompt]
    return [command, *told, *prompt] if len(prompt) > 1 else [command, *prompt, *told]


def toml(request: Request) -> str:
    """The recipe that is asked for as a file, with every option's range and meaning.

    Raises `RecipeError`.
    """
    return recipes.from_table(recipe_table(request) or recipes.find("dense").table()).to_toml()
