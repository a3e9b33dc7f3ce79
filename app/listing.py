"""Commands that tell what Kinora knows by name: models, recipes, methods, policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import Json, Settings
from .ending import print_json, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from ..accel.facts import Facts
    from ..accel.parts import Part


def _group(help: str) -> typer.Typer:
    return typer.Typer(
        help=help,
        invoke_without_command=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


models_app = _group("The models that Kinora knows by name, and where their weights are.")
recipes_app = _group("The recipes that Kinora knows: what to accelerate, and how.")
methods_app = _group("The attention methods that recipes can name: rules and sources.")
policies_app = _group("The step policies that recipes can name: rules and sources.")


@recipes_app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes that Kinora knows by name."""
    if context.invoked_subcommand is not None:
        return
    from ..accel import recipe as known
    from ..accel.presets import MEASURED
    from .terminal import show_recipes

    found = [known.find(name) for name in known.names()]
    if as_json:
        told = [
            {"name": it.name, **it.table(), "measured": asdict(MEASURED[it.name])} for it in found
        ]
        print_json({"recipes": told})
    else:
        show_recipes(found, stdout())


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A name, or the path of a TOML file.")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Print one recipe as a TOML file, with every option's range and meaning."""
    from ..accel import recipe as known

    found = known.changed(known.find(name), settings or ())
    if as_json:
        print_json({"name": found.name, **found.table()})
    else:
        stdout().print(found.to_toml(), markup=False, highlight=False, soft_wrap=True, end="")


@models_app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that Kinora knows by name, or show one."""
    if context.invoked_subcommand is not None:
        return
    from ..pipelines import cards
    from .terminal import show_models

    found = [cards.find(name) for name in cards.names()]
    if as_json:
        print_json({"models": [card.model_dump(mode="json") for card in found]})
    else:
        show_models(found, stdout())


@models_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name from `kinora models`, or a diffusers folder.")],
    as_json: Json = False,
) -> None:
    """Show rules, defaults, licence and words of one model, and where its weights are."""
    from ..pipelines import cards, models, vocabulary
    from ..pipelines.errors import ModelError
    from .terminal import show_card

    card = cards.find(name)
    words = vocabulary.words(card)
    try:
        folder = models.locate(card).folder.path
        where = f"here: {folder}"
    except ModelError as error:
        folder, where = None, str(error)
    if as_json:
        weights = None if folder is None else str(folder)
        print_json({"model": card.model_dump(mode="json"), "words": words, "weights": weights})
        return
    absent = card.folder is not None and not card.folder.is_dir()
    remark = "unknown without the weights" if absent else "any"
    show_card(card, remark if words is None else words, where, stdout())


@methods_app.callback()
def methods(context: typer.Context, as_json: Json = False) -> None:
    """List the attention methods that a recipe can name."""
    if context.invoked_subcommand is None:
        from ..accel.parts import ATTENTION
        from .terminal import show_methods

        _list(ATTENTION, "methods", show_methods, as_json)


@methods_app.command("show")
def show_method(
    name: Annotated[str, typer.Argument(help="Name from `kinora methods`.")],
    as_json: Json = False,
) -> None:
    """Show rule, source, differences, licence note and options of one method."""
    from ..accel.parts import ATTENTION

    _show(ATTENTION, name, as_json)


@policies_app.callback()
def policies(context: typer.Context, as_json: Json = False) -> None:
    """List the step policies that a recipe can name."""
    if context.invoked_subcommand is None:
        from ..accel.parts import STEPS
        from .terminal import show_policies

        _list(STEPS, "policies", show_policies, as_json)


@policies_app.command("show")
def show_policy(
    name: Annotated[str, typer.Argument(help="Name from `kinora policies`.")],
    as_json: Json = False,
) -> None:
    """Show rule, source, differences, licence note and options of one policy."""
    from ..accel.parts import STEPS

    _show(STEPS, name, as_json)


def _list(
    part: Part[Any], group: str, show: Callable[[list[Facts], Console], None], as_json: bool
) -> None:
    from ..accel.facts import facts

    found = [facts(it) for it in part.known.values()]
    if as_json:
        print_json({group: [it.to_json() for it in found]})
    else:
        show(found, stdout())


def _show(part: Part[Any], name: str, as_json: bool) -> None:
    from ..accel.facts import facts
    from .terminal import show_facts

    around = {it.name: it for it in part.wrappers}
    every = replace(part, known={**part.known, **around})
    found = facts(every.known[every.check_name(name)])
    if as_json:
        print_json({"around" if name in around else part.selector: found.to_json()})
    else:
        show_facts(found, stdout())
