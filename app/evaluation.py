"""`kinora eval`: scores of videos that are there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from .arguments import Json
from .ending import EXIT_FAULT, print_json, stdout
from .vbench import Dimensions, Images, Info, VBenchPython
from .vbench import prompts as prompts_command

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.evaluate import Progress
    from ..eval.report import Report

_R = TypeVar("_R")


class _Default(TyperGroup):
    """A group that takes whatever is none of its commands for the arguments of `score`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `score` before arguments that name no command; without any show the help."""
        if not args:
            args = ["--help"]
        if args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["score", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=_Default,
    help="Score videos: how near to a reference they are, or what they show.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


eval_app.command("prompts")(prompts_command)


@eval_app.command()
def score(
    videos: Annotated[
        list[Path], typer.Argument(help="Videos, their sidecars, or folders of them.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the videos to compare with, found by prompt and seed, or by name. "
            "[default: none]",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics", "-m", help="Names, with commas between. [default: those of the suite]"
        ),
    ] = None,
    suites: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="fidelity, world, flicker, learned; or one of vbench, vbench-i2v and vbench2. "
            "[default: fidelity with a reference, else world]",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON file of prompts, {"name.mp4": "a red circle"}. [default: the sidecars\']'
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="File of earlier scores. [default: ~/.cache/kinora/scores.jsonl]"),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Score anew what was scored before.")
    ] = False,
    workers: Annotated[
        int, typer.Option(help="Processes; 0 for one a core. [default: 0]", show_default=False)
    ] = 0,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Checkpoint of clip_score: a folder, or a name of the Hugging Face hub that is on "
            "this disk. [default: openai/clip-vit-large-patch14]",
        ),
    ] = None,
    metrics_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="An interpreter that has the libraries of lpips and fid. "
            "[default: $KINORA_METRICS_PYTHON, else uv]",
        ),
    ] = None,
    dimensions: Dimensions = None,
    custom: Annotated[
        bool,
        typer.Option(
            "--custom",
            help="VBench: take videos of any prompts, not its standard set.",
        ),
    ] = False,
    static_filter: Annotated[
        bool,
        typer.Option(
            "--static-filter",
            help="VBench: score flickering of those videos alone that its filter finds still, of "
            "up to 25 of each prompt.",
        ),
    ] = False,
    info: Info = None,
    images: Images = None,
    vbench_python: VBenchPython = None,
    device: Annotated[
        str,
        typer.Option(
            help="Of VBench and of metrics by networks: auto, cpu or cuda. [default: auto]",
            show_default=False,
        ),
    ] = "auto",
    timeout: Annotated[
        float,
        typer.Option(
            metavar="MINUTES", help="VBench: for each dimension. [default: 240]", show_default=False
        ),
    ] = 240,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT",
            help="Write the results, with the videos, as one page to this file. [default: none]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score videos; `kinora eval VIDEOS` is short for it."""
    from rich.console import Console

    from ..eval.cache import default_path
    from ..eval.evaluate import evaluate
    from ..eval.learned.spec import CLIP_MODEL, Tools
    from ..eval.report import Report
    from ..eval.vbench.suites import VBENCHES
    from ..pipelines.errors import RequestError
    from .reports import check_report, wrote_report

    if workers < 0:
        raise RequestError(f"--workers must be 0 or more, not {workers}")
    if html is not None:
        check_report(html)
    kept = None if again else cache or default_path()
    by_package = [it for it in _names(suites) if it in VBENCHES]
    if by_package:
        (suite, *others) = _names(suites)
        if others or metrics or reference:
            raise RequestError(
                f"--suite {by_package[0]} goes alone: take other metrics in another call"
            )
        if not timeout > 0:
            raise RequestError(f"--timeout must be more than 0 minutes, not {timeout:g}")
        from .vbench import score_by_vbench

        score_by_vbench(
            suite, videos, as_json=as_json, html=html, dimensions=_names(dimensions),
            custom=custom, still=static_filter, prompts=prompts, info=info, images=images,
            python=vbench_python, device=device, timeout_s=60 * timeout, cache=kept,
        )  # fmt: skip
        return
    if dimensions or custom or static_filter or info or images or vbench_python:
        raise RequestError(
            "--dimension, --custom, --static-filter, --info, --images and --vbench-python need "
            "--suite vbench, vbench-i2v or vbench2"
        )
    events = evaluate(
        videos,
        reference=reference,
        metrics=_names(metrics),
        suites=_names(suites),
        prompts=prompts,
        cache=kept,
        workers=workers,
        tools=Tools(clip or CLIP_MODEL, metrics_python, device),
    )
    found = followed(events, Report, Console(stderr=True))
    show(found, Console(stderr=True) if as_json else stdout())
    written = True
    if html is not None:
        from ..eval.scorepage import page

        written = wrote_report(html, page(found))
    for line in found.failures():
        typer.echo(f"kinora: {line}", err=True)
    if as_json:
        print_json(found.to_json())
    if found.status != "ok" or not written:
        raise typer.Exit(EXIT_FAULT)


def _names(given: list[str] | None) -> tuple[str, ...]:
    """Names given one by one, or with commas between."""
    return tuple(name.strip() for it in given or () for name in it.split(",") if name.strip())


def followed(events: Iterable[Progress | _R], kind: type[_R], console: Console) -> _R:
    """Show progress until the report is there, which is of `kind`."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from ..eval.evaluate import Progress as Scoring

    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bars.add_task("scoring", total=None)
    with bars:
        for event in events:
            if isinstance(event, kind):
                return event
            assert isinstance(event, Scoring)
            bars.update(task, total=event.of, completed=event.done)
            tenth = not event.done % max(1, event.of // 10) or event.done == event.of
            if tenth and not console.is_terminal:
                was = "known" if event.known == event.done else "scored"
                console.print(f"{was} {event.done}/{event.of}", highlight=False)
    raise RuntimeError("the evaluation ended without a report")


def show(found: Report, console: Console) -> None:
    """Totals as a table, then what must be said of them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("metric", "mean", "95 %", "videos", "status"):
        table.add_column(heading, justify="right" if heading in ("mean", "videos") else "left")
    for name, it in found.totals.items():
        span = "" if it.low is None or it.high is None else f"{it.low:.4f} to {it.high:.4f}"
        mean = "–" if it.mean is None else f"{it.mean:.4f}"
        row = (name, mean, span, f"{it.n} of {it.asked}", it.status)
        table.add_row(*(Text(cell) for cell in row))
    console.print(table, highlight=False)

    for line in found.remarks():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
