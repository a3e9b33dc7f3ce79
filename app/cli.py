"""The command line. Parses, calls `generate` or `decode`, prints; imports torch only to work."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    NumVideos,
    Output,
    RecipeName,
    Seed,
    Settings,
    Size,
    Steps,
    Strict,
    format_of,
    requested,
)
from .batch import batch_app
from .bench.command import bench_app
from .calibrate import calibrate
from .compare import compare
from .ending import EXIT_FAULT, EXIT_REFUSED, Left, ended, print_json, stdout
from .evaluation import eval_app
from .inspection import inspect
from .listing import methods_app, models_app, policies_app, recipes_app
from .ui.command import ui

if TYPE_CHECKING:
    from ..pipelines.request import Request
    from ..pipelines.sidecar import Record
    from ..pipelines.worker import Event

_COMMANDS = (
    "generate",
    "decode",
    "batch",
    "plan",
    "calibrate",
    "models",
    "recipes",
    "methods",
    "policies",
    "inspect",
    "doctor",
    "ui",
    "bench",
    "eval",
    "compare",
)

app = typer.Typer(
    name="kinora",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kinora {metadata.version('kinora')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
]


@app.callback()
def root(version: Version = False) -> None:
    """Make videos and images with diffusion models, fast, and say exactly what was done."""


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
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
    seed: Seed = None,
    num_videos: NumVideos = None,
    output: Output = None,
    media: Media = None,
    fps: Fps = None,
    device: Device = None,
    dtype: Dtype = None,
    keep_latents: KeepLatents = False,
    force: Force = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Sidecar, or video by Kinora, whose frames to make again. [default: none]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate a video (or an image) from PROMPT."""

    def events() -> Generator[Event, None, None]:
        from ..pipelines.generate import generate as run

        given = requested(
            prompt=prompt, model=model, recipe=recipe, settings=settings, strict=strict,
            size=size, frames=frames, steps=steps, guidance=guidance,
            negative_prompt=negative_prompt, image=image, seed=seed, num_videos=num_videos,
            output=output, media=media, fps=fps, device=device, dtype=dtype,
            keep_latents=keep_latents, force=force,
        )  # fmt: skip
        request, original = _request(given, source)
        left: Left = context.obj
        return run(request, original=original, finished=left.finished, unfinished=left.unfinished)

    _follow(events, as_json)


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="File NAME.latents.safetensors of a run.")],
    model: Annotated[
        str | None, typer.Option(help="Name or folder. [default: the one the latents name]")
    ] = None,
    output: Output = None,
    media: Media = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Decode saved latents into a video."""

    def events() -> Generator[Event, None, None]:
        from ..pipelines.decode import decode as run

        return run(
            latents,
            model=model,
            output=output or _default_output(),
            media=format_of(media),
            device=device or "auto",
            force=force,
        )

    _follow(events, as_json)


@app.command()
def plan(
    model: Model = None,
    recipe: RecipeName = None,
    settings: Settings = None,
    size: Size = None,
    frames: Frames = None,
    steps: Steps = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Tell what a run would do, gain and need, without loading anything."""
    from ..pipelines.planning import plan as predict
    from ..pipelines.request import Request
    from .terminal import show_plan

    given = requested(
        model=model, recipe=recipe, settings=settings, size=size, frames=frames, steps=steps,
        device=device, dtype=dtype,
    )  # fmt: skip
    predicted = predict(Request(prompt="any", **given))
    if as_json:
        print_json(predicted.to_json())
    else:
        show_plan(predicted, stdout())
    # Without weights a plan is still one: they can be got.
    refused = [it for it in predicted.parts if it.verdict == "refused" and it.part != "weights"]
    for part in refused:
        typer.echo(f"kinora: {part.why}", err=True)
    if refused:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works on this machine, or why not."""
    from .doctor import examine, to_json, works
    from .terminal import show_findings

    findings = examine()
    if as_json:
        print_json(to_json(findings))
    else:
        show_findings([(it.verdict, it.subject, it.text) for it in findings], stdout())
    if not works(findings):
        raise typer.Exit(EXIT_FAULT)


app.add_typer(models_app, name="models")
app.add_typer(recipes_app, name="recipes")
app.add_typer(methods_app, name="methods")
app.add_typer(policies_app, name="policies")
app.command()(inspect)
app.command()(ui)
app.command()(calibrate)
app.add_typer(bench_app, name="bench")
app.add_typer(batch_app, name="batch")
app.add_typer(eval_app, name="eval")
app.command()(compare)


def _follow(start: Any, as_json: bool) -> None:
    """Run a job to its end, showing progress, and print its result."""
    from rich.console import Console

    from .terminal import follow, show_run

    with closing(start()) as events:
        run = follow(events, Console(stderr=True))
    if not run.leads:
        return
    show_run(run, Console(stderr=True) if as_json else stdout())
    if as_json:
        print_json({"status": "done", **run.to_json()})


def _request(given: dict[str, Any], source: Path | None) -> tuple[Request, Record | None]:
    """The request of the command line, or that of a sidecar with what was given put over it.

    With it, the record of the sidecar.
    """
    from ..pipelines.errors import RequestError
    from ..pipelines.request import DEFAULT_OUTPUT, Request, names_a_file
    from ..pipelines.sidecar import read

    if source is None:
        if "prompt" not in given:
            raise RequestError("there is no PROMPT: say what to show, or give --from a sidecar")
        return Request.model_validate(given), None
    fixed = sorted({"prompt", "num_videos"} & set(given))
    if fixed:
        them = "them" if fixed[1:] else "it"
        raise RequestError(f"--from has its own {' and '.join(fixed)}: leave {them} out")
    record = read(source)
    before = {**record.request.model_dump(), "output": DEFAULT_OUTPUT, "force": False}
    if "image" in given:
        before["image_sha256"] = None  # another file is meant, or the same elsewhere
    if names_a_file(str(given.get("output", DEFAULT_OUTPUT))):
        before["format"] = None  # the file's ending decides
    return Request.model_validate({**before, **given}), record


def _default_output() -> str:
    from ..pipelines.request import DEFAULT_OUTPUT

    return DEFAULT_OUTPUT


def main(argv: list[str] | None = None) -> int:
    """The `kinora` command; returns its exit status."""
    # OpenMP's threads wait for each other in a loop: beside any other work on the same cores that
    # made a run 35 times slower. Sleeping instead costs nothing measurable on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.warnoptions:
        # Python warnings are for developers; what a user should know arrives as a notice.
        warnings.simplefilter("ignore")
    given = sys.argv[1:] if argv is None else argv
    left = Left()
    return ended(
        lambda: app(args=given or ["--help"], prog_name="kinora", standalone_mode=False, obj=left),
        as_json="--json" in given,
        hint=_hint(given),
        left=left,
    )


def _hint(given: list[str]) -> str:
    """Where a mistake in an argument list is explained."""
    if not given or given[0] not in _COMMANDS:
        return "`kinora --help` tells more"
    group = {it.name: it.typer_instance for it in app.registered_groups}.get(given[0])
    known = group.registered_commands if group else []
    names = [it.name or getattr(it.callback, "__name__", "") for it in known]
    name = next((it for it in given[1:] if not it.startswith("-")), "")
    if name in names:
        return f"`kinora {given[0]} {name} --help` tells more"
    if name and "show" in names:
        return f"`kinora {given[0]} show {name}` shows one, `kinora {given[0]}` lists them"
    return f"`kinora {given[0]} --help` tells more"


if __name__ == "__main__":
    sys.exit(main())
