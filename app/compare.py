"""`kinora compare`: the same videos by several recipes, and what each costs and gains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import (
    Device,
    Dtype,
    Force,
    Frames,
    Guidance,
    Image,
    Json,
    Model,
    NegativePrompt,
    Size,
    Steps,
    Strict,
    requested,
)
from .ending import EXIT_FAULT, Left, print_json, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from ..eval.comparison import Comparison
    from ..pipelines.batch import Batch

PAGE = "report.html"
REPORT = "report.json"
ROUNDS = 4
"""In which recipes take turns; each loads the model once for every recipe."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def compare(
    context: typer.Context,
    recipes: Annotated[
        list[str],
        typer.Option(
            metavar="NAMES",
            help="Recipes with commas between: names from `kinora recipes`, or TOML files. Dense "
            "runs are always made, by each kernel that the recipes name for dense calls.",
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            help="What to show: .txt with a prompt a line, or .jsonl, .csv or .parquet whose rows "
            "may set all but the recipe."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the report; the videos lie in one in it by recipe."
        ),
    ],
    seeds: Annotated[
        str, typer.Option(metavar="SEEDS", help="Such as 0-4 or 0-2,10. [default: 0]",
                          show_default=False),
    ] = "0",
    model: Model = None,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: NegativePrompt = None,
    image: Image = None,
    strict: Strict = None,
    media: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="mp4, gif, webm or png. All but png lose something, which then is in the scores. "
            "[default: png]",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make the same videos by several recipes, and compare them with dense."""
    from rich.console import Console

    defaults = requested(
        model=model, strict=strict, size=size, frames=frames, steps=steps, guidance=guidance,
        negative_prompt=negative_prompt, image=image, media="png" if media is None else media,
        dtype=dtype, force=force,
    )  # fmt: skip
    tables = chosen([it for given in recipes for it in given.split(",")])
    batches = _prepared(tables, prompts, output, defaults, seeds, device)
    err = Console(stderr=True)
    failed = _make(batches, err, context.obj)
    for line in failed:
        typer.echo(f"kinora: {line}", err=True)
    found = _compare(batches, err)
    _write(output / PAGE, found)
    _show(found, output, err if as_json else stdout())
    for line in found.failures():
        typer.echo(f"kinora: {line}", err=True)
    if as_json:
        print_json({**found.to_json(), "page": str(output / PAGE)})
    if failed or found.status != "ok":
        raise typer.Exit(EXIT_FAULT)


def chosen(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The tables of the recipes by label, dense first, with a dense one for each dense kernel.

    Raises `RequestError` for none, two of one label or equal ones, and `RecipeError` for a name
    that is not known.
    """
    from ..accel import recipe as known
    from ..eval.runs import STOCK, is_dense
    from ..pipelines.errors import RequestError
    from ..pipelines.request import DENSE

    names = [it.strip() for it in given if it.strip()]
    if not [it for it in names if it != DENSE]:
        raise RequestError(f"--recipes must name one beside {DENSE}, such as --recipes balanced")
    asked: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == DENSE:
            continue
        label = Path(name).stem if name.endswith(".toml") else name
        table = known.find(name).table()
        if not _LABEL.fullmatch(label) or label.startswith(DENSE) or label in asked:
            raise RequestError(
                f"--recipes {name} cannot be called {label!r} here: give each a name of its own, "
                f"of letters, digits, '.', '_' and '-', that does not begin with {DENSE}"
            )
        asked[label] = table
    dense: dict[str, dict[str, Any]] = {}
    there = [it.get("dense_kernel") for it in asked.values() if is_dense(it)]
    for kernel in (it.get("dense_kernel", STOCK) for it in asked.values()):
        if kernel != STOCK and kernel not in there:
            there.append(kernel)
            dense[f"{DENSE}-{kernel}"] = {"dense_kernel": kernel}
    return {DENSE: {}, **dense, **asked}


def _prepared(
    tables: dict[str, dict[str, Any]],
    prompts: Path,
    output: Path,
    defaults: dict[str, Any],
    seeds: str,
    device: str | None,
) -> dict[str, Batch]:
    """A batch for each recipe; nothing is written before all of them can begin."""
    from ..pipelines.batch import Options, prepare
    from ..pipelines.batch.rows import seeds_of
    from ..pipelines.errors import ManifestError

    batches: dict[str, Batch] = {}
    for label, table in tables.items():
        options = Options(
            manifest=prompts,
            output=output / label,
            defaults={**defaults, "recipe": table},
            seeds=tuple(seeds_of(seeds)),
            device=device or "auto",
        )
        batch = prepare(options)
        for row in batch.refused[:1]:
            raise ManifestError(f"{label}: {prompts}, line {row.line}: {row.why}")
        _check(batch, table)
        batches[label] = batch
    return batches


def _check(batch: Batch, table: dict[str, Any]) -> None:
    """Raises `ManifestError` where a row has its own recipe, or two have one prompt and seed."""
    from ..pipelines.errors import ManifestError

    seen: dict[tuple[str, int], int] = {}
    for i in range(len(batch.table)):
        row = batch.table.row(i)
        where = f"{batch.options.manifest}, line {row.line}"
        # Dense rows have no recipe, so that one of these batches sees any that a row sets.
        if bool(row.request.recipe) != bool(table):
            raise ManifestError(f"{where}: it sets a recipe, which --recipes does: leave it out")
        key = (row.request.prompt, row.request.seed)
        if key in seen:
            raise ManifestError(
                f"{where}: line {seen[key]} has its prompt and seed too: leave one out"
            )
        seen[key] = row.line


def _make(batches: dict[str, Batch], err: Console, left: Left) -> list[str]:
    """Make what is not there yet; a line for each recipe that not all videos were made of.

    In rounds, every other one backwards, so that no recipe has the machine while it is cool or idle
    and another one later. A round of a recipe is a process, so that peaks of memory are its own.
    """
    from dataclasses import replace

    from ..pipelines.batch import run
    from .batch import told_if_stopped
    from .batch_terminal import follow

    for label, batch in batches.items():
        told = f"{label}: {batch.before} of {batch.rows} videos are there"
        err.print(told, markup=False, highlight=False, soft_wrap=True)
    made = dict.fromkeys(batches, 0)
    reasons: dict[str, str | None] = {}
    stopped: set[str] = set()
    count = len(next(iter(batches.values())).table)
    for number, rows in enumerate(rounds(count)):
        for label in list(batches)[:: -1 if number % 2 else 1]:
            batch = batches[label]
            pending = [i for i in batch.pending if i in rows]
            if not pending or label in stopped:
                continue
            upto = batch.before + made[label] + len(pending)
            part = replace(batch, rows=upto, pending=pending)
            with told_if_stopped(part, left, err):
                summary = follow(run(part), err)
            made[label] += summary.done
            if summary.blocked is not None:
                stopped.add(label)
            if not summary.complete:
                first = str(summary.failures[0]) if summary.failures else summary.blocked
                reasons.setdefault(label, first)
    return [
        f"{label}: {batches[label].rows - batches[label].before - made[label]} of "
        f"{batches[label].rows} videos were not made; {why}"
        for label, why in reasons.items()
    ]


def rounds(count: int) -> list[range]:
    """Rows of a manifest in rounds: at most `ROUNDS`, of two at least, since the first of a process
    warms up and its time is left out."""
    number = max(1, min(ROUNDS, count // 2))
    edges = [count * k // number for k in range(number + 1)]
    return [range(a, b) for a, b in pairwise(edges)]


def _compare(batches: dict[str, Batch], err: Console) -> Comparison:
    from ..eval.cache import default_path
    from ..eval.compare import compare as by_pairs
    from ..eval.comparison import Comparison
    from .evaluation import followed

    folders = {label: batch.store.path for label, batch in batches.items()}
    videos = {label: _videos(batch) for label, batch in batches.items()}
    events = by_pairs(folders, videos=videos, cache=default_path(), workers=0)
    return followed(events, Comparison, err)


def _videos(batch: Batch) -> list[Path]:
    """Those of the batch that are there; the folder may hold others, of earlier prompts."""
    rows = (batch.table.row(i) for i in range(len(batch.table)))
    return [
        batch.store.path / f"{it.name}.{it.request.format}"
        for it in rows
        if batch.store.has(it.name, f".{it.request.format}")
    ]


def _write(path: Path, found: Comparison) -> None:
    import json

    from ..eval.page import page
    from .reports import write_report

    write_report(path, page(found))
    write_report(path.with_name(REPORT), json.dumps(found.to_json(), indent=1))


def _show(found: Comparison, output: Path, console: Console) -> None:
    """The verdict of each recipe as a table, and where the page is."""
    from rich.table import Table
    from rich.text import Text

    from ..eval.page import HEADINGS, row_of

    rows = [(it.name, *row_of(found, it)) for it in found.recipes]
    columns = list(zip(("recipe", *HEADINGS), *rows, strict=True))
    told = [it for it in columns if set(it[1:]) != {"–"}]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in told:
        table.add_column(column[0])
    for row in list(zip(*told, strict=True))[1:]:
        table.add_row(*map(Text, row))
    console.print(table, highlight=False)
    for note in found.notes():
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(str(output / PAGE), markup=False, highlight=False, soft_wrap=True)
