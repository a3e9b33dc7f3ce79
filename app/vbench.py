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
    typer.Option("--dimension", help="VBench: names, with commas between. [default: all 16]"),
]
Info = Annotated[
    Path | None,
    typer.Option(help="VBench: its VBench_full_info.json. [default: the environment's own]"),
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
    suite: Annotated[str, typer.Argument(help="vbench.")],
    dimensions: Dimensions = None,
    samples: Annotated[
        int, typer.Option(help="Videos of each prompt. [default: 5]", show_default=False)
    ] = 5,
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

    from ..eval.vbench import client
    from ..eval.vbench import prompts as known
    from ..pipelines.errors import RequestError
    from ..pipelines.files import check_new

    if suite != "vbench":
        raise RequestError(f"there are no prompts of {suite!r}: known are vbench")
    if not 1 <= samples <= 100 or seed < 0:
        raise RequestError("--samples must be 1 to 100 and --seed 0 or more")
    names = [it for given in dimensions or () for it in given.split(",") if it]
    wanted = known.dimensions_of(names)
    if output is not None:
        check_new(output)
    if info is None:
        where = client.environment(vbench_python)
        if where is None:
            raise RequestError(f"{client.NO_ENVIRONMENT}, or give --info VBench_full_info.json")
        with tempfile.TemporaryDirectory() as folder:
            info = Path(client.about(where, Path(folder), 3600)["info"])
    rows = list(known.manifest(known.read(info), wanted, samples=samples, seed=seed))
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")
        typer.echo(f"{output}: {len(rows)} videos of {len(rows) // samples} prompts", err=True)


def score_by_vbench(videos: Sequence[Path], *, as_json: bool, **options: Any) -> None:
    """Score, show and end with status 1 where a dimension has no whole score."""
    from rich.console import Console

    from ..eval.vbench.suite import evaluate

    found = _followed(evaluate(videos, **options), Console(stderr=True))
    show(found, Console(stderr=True) if as_json else stdout())
    wrong = [it.reason for it in found.rejected]
    wrong += [it.reason for it in found.results.values() if it.status in ("failed", "partial")]
    wrong += [f"the prompts name {it}, which is not among the videos" for it in found.unmatched]
    for line in wrong:
        typer.echo(f"kinora: {line}", err=True)
    if as_json:
        print_json(found.to_json())
    if not found.ok:
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
    told = [it.reason for it in found.results.values() if it.status == "skipped"]
    if found.totals.missing:
        count = len(found.totals.missing)
        told.append(f"no total: {count} of 16 dimensions have no whole score")
    if found.unused:
        told.append(f"{found.unused} videos belong to none of these dimensions")
    notes = (f"note: {note}" for it in found.results.values() for note in it.notes)
    for line in dict.fromkeys([*told, *notes]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
