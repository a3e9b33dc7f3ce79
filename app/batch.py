"""`kinora batch`: makes all rows of a manifest, and tells how a batch stands."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from .arguments import (
    Device,
    Dtype,
    Force,
    Fps,
    Frames,
    Guidance,
    Image,
    Json,
    KeepLatents,
    Media,
    Model,
    NegativePrompt,
    RecipeName,
    Settings,
    Size,
    Steps,
    Strict,
    requested,
)
from .ending import EXIT_FAULT, EXIT_REFUSED, Left, print_json, stdout

if TYPE_CHECKING:
    from ..pipelines.batch import Batch


class _RunsByDefault(TyperGroup):
    """`kinora batch MANIFEST` is `kinora batch run MANIFEST`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` before what names no command."""
        if not args or args[0] not in {*self.commands, "-h", "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


batch_app = typer.Typer(
    cls=_RunsByDefault,
    help="Make all rows of a manifest; `run` may be left out.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@batch_app.command()
def run(
    context: typer.Context,
    manifest: Annotated[
        Path,
        typer.Argument(
            help="Rows to make: .jsonl, .csv, .parquet, or .txt with a prompt a line. What a row "
            "leaves out is taken from the options."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the batch. [default: outputs/NAME]"),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="SEEDS",
            help="Make each row that has no seed with each of these, such as 0-4 or 0-2,10. "
            "[default: 0]",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Make only part I of N, from 1. [default: 1/1]"),
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Try a failed row this often again. [default: 1]")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out rows that cannot run, make the others.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be made, and make nothing.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="What runs the rows: local, torchrun or ray. [default: local]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes. [default: one for each GPU, or one on the CPU]"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Cluster of --engine ray. [default: RAY_ADDRESS, or one that is started here]",
        ),
    ] = None,
    model: Model = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    strict: Strict = None,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: NegativePrompt = None,
    image: Image = None,
    media: Media = None,
    fps: Fps = None,
    device: Device = None,
    dtype: Dtype = None,
    keep_latents: KeepLatents = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make what is not done yet of MANIFEST."""
    from ..pipelines.batch import Options, prepare
    from ..pipelines.batch.rows import seeds_of
    from ..pipelines.batch.run import shard_of

    options = Options(
        manifest=manifest,
        output=output or Path("outputs") / manifest.stem,
        defaults=requested(
            model=model, recipe=recipe, settings=settings, strict=strict, size=size,
            frames=frames, steps=steps, guidance=guidance, negative_prompt=negative_prompt,
            image=image, media=media, fps=fps, dtype=dtype, keep_latents=keep_latents,
            force=force,
        ),
        seeds=tuple(seeds_of(seeds)) if seeds is not None else (),
        shard=shard_of(shard) if shard is not None else (1, 1),
        retries=1 if retries is None else retries,
        keep_going=keep_going,
        engine=engine or "local",
        device=device or "auto",
        workers=workers,
        address=address,
    )  # fmt: skip
    batch = prepare(options)
    if dry_run:
        _foretell(batch, as_json)
    else:
        _run(batch, as_json, context.obj)


def _foretell(batch: Batch, as_json: bool) -> None:
    from .batch_terminal import foretold, show_foretold

    if as_json:
        print_json(foretold(batch))
    else:
        show_foretold(batch, stdout())
    if batch.refused and not batch.options.keep_going:
        raise typer.Exit(EXIT_REFUSED)


def _run(batch: Batch, as_json: bool, left: Left) -> None:
    from rich.console import Console

    from ..pipelines.batch import run as start
    from .batch_terminal import follow, show_summary

    err = Console(stderr=True)
    with told_if_stopped(batch, left, err):
        summary = follow(start(batch), err)
    if batch.options.follows:  # the first of them tells
        if not summary.complete:
            raise typer.Exit(EXIT_FAULT)
        return
    show_summary(summary, batch, err if as_json else stdout())
    if as_json:
        status = "done" if summary.complete else "failed"
        print_json({"status": status, "output": str(batch.store.path), **summary.to_json()})
    if not summary.complete:
        raise typer.Exit(EXIT_FAULT)


@contextmanager
def told_if_stopped(batch: Batch, left: Left, err: Any) -> Generator[None, None, None]:
    """Say what is done where the run does not come to its end."""
    from ..pipelines.batch.report import status

    try:
        yield
    except Exception:
        raise
    except BaseException:
        if batch.store.header() is not None:
            it = status(batch.store.path)
            told = f"{it.done:,} of {it.rows:,} rows are done; the same command makes the others"
            err.print(told, markup=False, highlight=False, soft_wrap=True)
            left.told.update(done=it.done, failed=it.failed, left=it.left)
        raise


@batch_app.command("status")
def status_(
    folder: Annotated[Path, typer.Argument(help="Folder of a batch.")],
    as_json: Json = False,
) -> None:
    """Tell which rows of a batch are done, failed and left."""
    from ..pipelines.batch.report import status
    from .batch_terminal import show_status

    found = status(folder)
    if as_json:
        print_json(found.to_json())
    else:
        show_status(found, stdout())
