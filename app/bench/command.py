"""`kinora bench`: how fast the parts are on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from .cases import Shape

bench_app = typer.Typer(
    help="Time the parts of Kinora on this machine, beside what others offer.",
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_T = TypeVar("_T")
_TWICE = "may be given several times."


@bench_app.callback()
def bench(context: typer.Context) -> None:
    """Time the parts of Kinora on this machine, beside what others offer."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        typer.echo("\n`kinora bench attention --help` tells what it can time.")


def _many(flag: str, metavar: str, help_: str, default: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=f"{help_}; {_TWICE} [default: {default}]")


@bench_app.command()
def attention(
    shape: Annotated[
        list[str] | None,
        _many("--shape", "HxLxD", "Heads, tokens and channels", "4x9216x64, or two on a GPU"),
    ] = None,
    tile: Annotated[
        list[str] | None, _many("--tile", "QxK", "Queries and keys of a tile", "128x64, 128x128")
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help=f"Share of the tiles that is kept; {_TWICE} [default: 0.2, 0.1]",
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None, _many("--pattern", "NAME", "random, local or recorded", "random")
    ] = None,
    tail: Annotated[list[str] | None, _many("--tail", "NAME", "none or complement", "none")] = None,
    precision: Annotated[
        list[str] | None,
        _many(
            "--precision",
            "QK.PV",
            "How queries and keys, then weights and values, are multiplied: input, int8, int4 or, "
            "of the latter, fp8; int8 means int8.input",
            "input",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, _many("--backend", "NAME", "Of ours", "those made for this device")
    ] = None,
    peer: Annotated[list[str] | None, _many("--peer", "NAME", "Of others", "all")] = None,
    repeats: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Turns on a CPU. [default: 5]", show_default=False),
    ] = 5,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="A JSON line for each line of the table, to here. [default: none]",
        ),
    ] = None,
) -> None:
    """Time block attention: ours and others', right first, then how fast.

    E is density x dense time / own time, with the fastest dense kernel of torch beside it; 1 is
    perfect. The error is against float64, TFLOP/s are those of the tiles that are kept, and making
    the plan is not in the time but told apart.
    """
    from ...kernels.backends import BACKENDS
    from ...kernels.plan import Tile
    from .attention import HEADING, Wanted, default_device, known_backends, rows
    from .cases import PATTERNS
    from .peers import PEERS

    device, dtype = default_device()
    cuda = device == "cuda"
    tails: Any = _names("--tail", tail or ["none"], ("none", "complement"))
    wanted = Wanted(
        shapes=_each("--shape", shape or _shapes(cuda), _shape),
        tiles=_each("--tile", tile or ["128x64", "128x128"], lambda it: Tile(*_numbers(it, 2))),
        densities=density or [0.2, 0.1],
        patterns=_names("--pattern", pattern or ["random"], PATTERNS),
        tails=tails,
        precisions=_each("--precision", precision or ["input"], _precision),
        backends=_names("--backend", backend or known_backends(device), BACKENDS),
        peers=_names("--peer", peer or list(PEERS), PEERS),
        device=device,
        dtype=dtype,
        repeats=repeats or 5,
    )
    if json_file:
        try:
            json_file.write_text("")
        except OSError as error:
            told = f"{str(json_file)!r}; {error.strerror}"
            raise typer.BadParameter(told, param_hint="--json") from None
    lines: list[str] = []
    typer.echo(HEADING)
    for row in rows(wanted):
        typer.echo(str(row))
        lines.append(json.dumps(row.to_json()))
        if json_file:
            json_file.write_text("".join(f"{line}\n" for line in lines))


def _shapes(cuda: bool) -> list[str]:
    return ["12x32768x128", "48x17776x64"] if cuda else ["4x9216x64"]


def _numbers(text: str, count: int) -> list[int]:
    if not re.fullmatch("x".join([r"[1-9]\d{0,6}"] * count), text):
        raise ValueError(f"{count} whole numbers with x between them")
    return [int(it) for it in text.split("x")]


def _shape(text: str) -> Shape:
    from .cases import Shape

    return Shape(*_numbers(text, 3))


def _precision(text: str) -> Any:
    from ...kernels.precision import Precision

    qk, _, pv = text.partition(".")
    return Precision(qk, pv or "input")  # pyright: ignore[reportArgumentType] # it says what is allowed


def _each(flag: str, texts: Sequence[str], read: Callable[[str], _T]) -> list[_T]:
    found: list[_T] = []
    for text in texts:
        try:
            found.append(read(text))
        except ValueError as error:
            raise typer.BadParameter(f"{text!r}; {error}", param_hint=flag) from None
    return found


def _names(flag: str, given: Sequence[str], known: Any) -> list[str]:
    import difflib

    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1)
            told = f", did you mean {near[0]}?" if near else ""
            raise typer.BadParameter(
                f"{name!r}{told}; there are {', '.join(known)}", param_hint=flag
            )
    return list(given)
