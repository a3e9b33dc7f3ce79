"""`kinora eval` by VBench: what to generate, and scores by the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .ending import EXIT_FAULT, print_json, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.vbench.suite import Step, VBenchReport

Dimensions = Annotated[
    list[str] | None,
    typer.Option("--dimension", help="VBench: names, with commas between. [default: all]"),
]
Info = Annotated[
    Path | None,
    typer.Option(help="VBench: its list of prompts. [default: the environment's own]"),
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="VBench-I2V: folder of the images that videos begin with. [default: none]",
    ),
]
VBenchPython = Annotated[
    str | None,
    typer.Option(
        "--vbench-python",
        metavar="PATH",
        help="VBench: an interpreter that has it. [default: $KINORA_VBENCH_PYTHON, else uv]",
    ),
]


def prompts(
    suite: Annotated[str, typer.Argument(help="vbench, vbench-i2v or vbench2.")],
    dimensions: Dimensions = None,
    samples: Annotated[
        int | None, typer.Option(help="Videos of each prompt. [default: the suite's]")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Sample i, from 0, gets seed + i. [default: 0]", show_default=False)
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. [default: stdout]")
    ] = None,
    info: Info = None,
    vbench_python: VBenchPython = None,
) -> None:
    """List what a suite wants generated: a line of JSON, prompt and seed, for each video."""
    import tempfile

    from ..eval.clips import EvalError
    from ..eval.vbench import client
    from ..eval.vbench import prompts as known
    from ..eval.vbench.suites import find_suite
    from ..pipelines.errors import RequestError
    from ..pipelines.files import check_new

    known_suite = find_suite(suite)
    if not 1 <= (samples or 1) <= 100 or samples == 0 or seed < 0:
        raise RequestError("--samples must be 1 to 100 and --seed 0 or more")
    names = [it for given in dimensions or () for it in given.split(",") if it]
    wanted = known.dimensions_of(names, known_suite)
    if output is not None:
        check_new(output)
    if info is None:
        try:
            where = client.environment(vbench_python, known_suite)
        except EvalError as error:
            told = f"its list with --info {known_suite.listed} (curl -fLO {known_suite.list_url})"
            raise EvalError(f"{error}; or give {told}") from None
        with tempfile.TemporaryDirectory() as folder:
            info = client.about(where, known_suite, Path(folder), 3600)
    listed = known.read(info, known_suite)
    rows = list(known.manifest(listed, wanted, suite=known_suite, samples=samples, seed=seed))
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")
        count = len({row["prompt"] for row in rows})
        typer.echo(f"{output}: {len(rows)} videos of {count} prompts", err=True)


def score_by_vbench(
    suite: str, videos: Sequence[Path], *, as_json: bool, html: Path | None, **options: Any
) -> None:
    """Score, show and end with status 1 where a dimension has no whole score."""
    from rich.console import Console

    from ..eval.vbench.suite import evaluate
    from ..eval.vbench.suites import VBENCHES

    events = evaluate(videos, suite=VBENCHES[suite], **options)
    found = _followed(events, Console(stderr=True))
    show(found, Console(stderr=True) if as_json else stdout())
    written = True
    if html is not None:
        from ..eval.scorepage import vbench_page
        from .reports import wrote_report

        written = wrote_report(html, vbench_page(found))
    for line in found.failures():
        typer.echo(f"kinora: {line}", err=True)
    if as_json:
        print_json(found.to_json())
    if not found.ok or not written:
        raise typer.Exit(EXIT_FAULT)


def _followed(events: Iterable[Step | VBenchReport], console: Console) -> VBenchReport:
    from ..eval.vbench.suite import VBenchReport

    for event in events:
        if isinstance(event, VBenchReport):
            return event
        if event.dimension is not None:
            line = f"{event.dimension} [{event.done + 1}/{event.of}]"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    raise RuntimeError("the evaluation ended without a report")


def show(found: VBenchReport, console: Console) -> None:
    """Scores and totals in %, as the leaderboard has them, then what must be said of them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("dimension", "score", "videos", "status"):
        table.add_column(heading, justify="right" if heading in ("score", "videos") else "left")
    for name, it in found.results.items():
        score = "–" if it.score is None else f"{100 * it.score:.2f}"
        details = it.details
        videos = f"{details['videos']} of {details['expected']}" if "videos" in details else ""
        table.add_row(*(Text(cell) for cell in (name, score, videos, it.status)))
    for name, value in found.totals.scores.items():
        table.add_row(name, "–" if value is None else f"{100 * value:.2f}", "", "")
    console.print(table, highlight=False)
    for line in found.remarks():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
