"""Writes the reference page from the definitions: commands with their options, recipes.

    python -m kinora.app.reference > docs/reference.md

A test holds the page against what this prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer

from ..accel import recipe as recipes
from ..accel.options import Option, options_of
from .cli import app


def page() -> str:
    """The page in Markdown."""
    return "\n".join([*_head(), *_commands(), *_recipes()]) + "\n"


def _head() -> Iterator[str]:
    yield "# Reference"
    yield ""
    yield "Made by `python -m kinora.app.reference` from the definitions; do not edit."


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from _command(f"kinora {name}", command)
        for inner, sub in getattr(command, "commands", {}).items():
            yield from _command(f"kinora {name} {inner}", sub)


def _command(name: str, command: Any) -> Iterator[str]:
    yield ""
    yield f"## {name}"
    yield ""
    yield (command.help or "").partition("\n")[0]
    rows = [param for param in command.params if getattr(param, "help", None)]
    if rows:
        yield ""
        yield "| option | what |"
        yield "|---|---|"
    for param in rows:
        spelling = ", ".join(f"`{it}`" for it in (*param.opts, *param.secondary_opts))
        if param.param_type_name == "argument":
            spelling = f"`{param.name.upper()}`"
        yield f"| {spelling} | {_cell(param.help)} |"


def _recipes() -> Iterator[str]:
    yield ""
    yield "## Recipes"
    yield ""
    yield "| preset | for | what |"
    yield "|---|---|---|"
    for name in recipes.names():
        found = recipes.find(name)
        yield f"| `{name}` | {_cell(found.title)} | {_cell(found.words())} |"
    yield ""
    yield "### Of a recipe"
    yield ""
    yield from option_table(options_of(recipes.Recipe))
    yield ""
    yield "The options under `[attention]` are those of its method ([methods.md](methods.md)),"
    yield "those under `[steps]` those of its policy ([policies.md](policies.md))."


def option_table(options: tuple[Option, ...]) -> Iterator[str]:
    """A table of options with defaults and ranges, in lines of Markdown."""
    yield "| option | default | allowed | what |"
    yield "|---|---|---|---|"
    for it in options:
        default, allowed = json.dumps(it.default), _cell(it.allowed())
        yield f"| `{it.name}` | `{default}` | {allowed} | {_cell(it.help)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
