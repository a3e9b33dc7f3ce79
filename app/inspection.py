"""`kinora inspect`: what a recipe keeps at one attention call, drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import (
    Device,
    Dtype,
    Frames,
    Guidance,
    Image,
    Json,
    Model,
    NegativePrompt,
    Seed,
    Settings,
    Size,
    Steps,
    requested,
)
from .ending import print_json

if TYPE_CHECKING:
    from ..pipelines.inspection import Inspected

MOST_HEADS = 6
"""That are drawn where none are asked for."""


def inspect(
    prompt: Annotated[
        str | None, typer.Argument(help="What the run shows. [default: one of Kinora's own]")
    ] = None,
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Name from `kinora recipes`, or a TOML file. [default: balanced]"),
    ] = None,
    settings: Settings = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer to look at, from 0. [default: the middle one]")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step to look at, from 0. [default: the middle one]")
    ] = None,
    head: Annotated[
        list[int] | None,
        typer.Option(
            metavar="HEAD",
            help="Head to draw, from 0; may be given several times. "
            f"[default: all, or {MOST_HEADS} of them]",
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            metavar="FRAME,ROW,COLUMN",
            help="Token of the grid whose keys are shown. [default: the middle of the picture]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="PNG to write. [default: named after method, layer and step]"
        ),
    ] = None,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: NegativePrompt = None,
    image: Image = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Draw what a recipe keeps and misses in one layer at one step."""
    from ..pipelines import files
    from ..pipelines.errors import OutputError
    from ..pipelines.inspection import inspect as look
    from ..pipelines.request import EXAMPLE_PROMPT, Request

    if output is not None:
        if output.suffix.lower() != ".png":
            raise OutputError(f"--output {output} must end in .png")
        files.check_new(output)
    given = requested(
        model=model, recipe="balanced" if recipe is None else recipe, settings=settings,
        size=size, frames=frames, steps=steps, guidance=guidance, seed=seed,
        negative_prompt=negative_prompt, image=image, device=device, dtype=dtype,
    )  # fmt: skip
    found = look(
        Request(prompt=EXAMPLE_PROMPT if prompt is None else prompt, **given),
        layer=layer,
        step=step,
        heads=head or (),
        query=None if query is None else _place(query),
        report=lambda line: typer.echo(line, err=True),
    )
    from .picture import drawn

    heads = found.heads if head else _spread(found.heads)
    png = drawn(found.view, heads, found.query, _title(found))
    site = found.view.site
    name = output or Path(f"{_method(found)}-layer{site.layer}-step{site.step}.png")
    made = files.publish(name.absolute().parent, name.stem, {name.suffix: png})
    path = name.with_name(made[name.suffix].name)
    if as_json:
        print_json({"status": "done", "path": str(path), **_content(found)})
        return
    for line in (str(path), *_title(found), *_table(found)):
        typer.echo(line)


def _place(text: str) -> tuple[int, int, int]:
    """Frame, row and column. Raises `RequestError`."""
    from ..pipelines.errors import RequestError

    match = re.fullmatch(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*", text)
    if match is None:
        raise RequestError(f"--query must be FRAME,ROW,COLUMN, such as 4,8,8, not {text!r}")
    frame, row, column = map(int, match.groups())
    return frame, row, column


def _spread(heads: tuple[int, ...]) -> list[int]:
    """At most `MOST_HEADS` of them, from the first to the last."""
    count = min(len(heads), MOST_HEADS)
    return [heads[round(i * (len(heads) - 1) / max(1, count - 1))] for i in range(count)]


def _method(found: Inspected) -> str:
    return found.recipe.table()["attention"]["method"]


def _title(found: Inspected) -> list[str]:
    """What is looked at, in lines."""
    site, method = found.view.site, found.recipe.attention
    assert method is not None
    text = f" and {site.text} of text" if site.text else ""
    where = f"layer {site.layer} (0 to {site.layers - 1}), step {site.step} (0 to {site.steps - 1})"
    return [
        f"{_method(found)}, {found.model}: {where}, tokens {site.grid}{text}",
        f"asked: {method.words()}",
    ]


def _shares(found: Inspected) -> list[dict[str, float]]:
    """Of each head that was asked for, what is kept and what that holds."""
    view = found.view
    weights, kept = view.row(view.token(*found.query))
    of_query = (weights * kept).sum(-1)
    return [
        {
            "head": head,
            "density": float(view.density[head]),
            "recall": float(view.recall[head]),
            "recall_at_best": float(view.recall_at_best[head]),
            "recall_of_query": float(of_query[head]),
        }
        for head in found.heads
    ]


def _table(found: Inspected) -> list[str]:
    """The same in lines: shares of the pairs of tokens and of the dense attention."""
    lines = ["head  density  recall  at best  of the query"]
    for it in _shares(found):
        shares = [f"{it[name]:.1%}" for name in list(it)[1:]]
        lines.append("{:>4}  {:>7}  {:>6}  {:>7}  {:>12}".format(it["head"], *shares))
    return lines


def _content(found: Inspected) -> dict[str, Any]:
    site, tile = found.view.site, found.view.plan.tile
    return {
        "model": found.model,
        "recipe": found.recipe.table(),
        "layer": site.layer,
        "layers": site.layers,
        "step": site.step,
        "steps": site.steps,
        "grid": [site.grid.frames, site.grid.height, site.grid.width],
        "text": site.text,
        "tile": [tile.query, tile.key],
        "query": list(found.query),
        "heads": _shares(found),
    }
