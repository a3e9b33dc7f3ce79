"""`kinora calibrate`: what a method learns of a model before it is used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import Device, Dtype, Frames, Image, Json, Seed, Size, Steps, requested
from .ending import print_json

if TYPE_CHECKING:
    from ..accel.calibration import Calibration
    from ..pipelines.calibrate import Calibrated


def calibrate(
    model: Annotated[str, typer.Argument(help="Name from `kinora models`, or a folder.")],
    method: Annotated[
        str, typer.Option(help="What is calibrated. [default: paro]", show_default=False)
    ] = "paro",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. [default: paro.npz]"),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the tiles that masks keep. [default: 0.75]")
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="Queries by keys in a tile, as of other methods. [default: 128x64]"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the run shows. [default: one of Kinora's own]")
    ] = None,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    seed: Seed = None,
    image: Image = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Learn orders and masks for a method from one dense run."""
    from ..pipelines.calibrate import calibrate as learn
    from ..pipelines.errors import RequestError
    from ..pipelines.request import EXAMPLE_PROMPT, Request

    if method != "paro":
        raise RequestError(f"--method is {method!r}; paro is the one that is calibrated")
    given = requested(
        model=model, size=size, frames=frames, steps=steps, seed=seed, image=image,
        device=device, dtype=dtype,
    )  # fmt: skip
    made = learn(
        Request(prompt=prompt or EXAMPLE_PROMPT, **given),
        output or Path("paro.npz"),
        keep=0.75 if keep is None else keep,
        tile="128x64" if tile is None else tile,
        report=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        it = made.calibration
        print_json({"status": "done", "path": str(made.path), "recall": it.recall})
    else:
        for line in told(made):
            typer.echo(line)


def told(made: Calibrated) -> list[str]:
    """The file first, then what it holds, in words."""
    it = made.calibration
    heads, several = it.orders.shape[1], f", {it.experts} denoisers" if it.experts > 1 else ""
    return [
        str(made.path),
        f"{it.model}, tokens {it.grid}, {it.layers} layers of {heads} heads{several}",
        f"masks keep {it.density():.0%} of the tiles ({it.tile}) and {it.recall:.0%} of the "
        f"attention",
        *_orders(it),
        f"use it: --set attention.method=paro --set attention.calibration={made.path}",
    ]


def _orders(it: Calibration) -> list[str]:
    """How many heads have each order of axes, and what it does to the incoherence of theirs."""
    from ..accel.order import AXES

    told = [
        "incoherence, by order of axes: the largest over the mean attention in a tile, lower is "
        "better, 1 is even"
    ]
    worse = False
    for i, count in Counter(it.orders.flatten().tolist()).most_common():
        before, after = it.incoherence[it.orders == i].mean(0).tolist()
        change = f"{before:.1f} -> {after:.1f}" if i else f"{after:.1f}, the model's own order"
        told.append(f"  {AXES[i]}, {count} head{'' if count == 1 else 's'}: {change}")
        worse |= after > before
    if worse:
        told.append("  where it rises, masks keep more of the attention in that order")
    return told
