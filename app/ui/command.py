"""`kinora ui`: the page of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ..ending import Left

Folder = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Folder to put videos into. [default: outputs]"),
]
Port = Annotated[
    int | None,
    typer.Option(
        metavar="PORT",
        min=0,
        max=65535,
        help="Port to listen on. [default: 7860, or the next one that is free]",
    ),
]
Browser = Annotated[bool, typer.Option("--open/--no-browser", help="Open a browser on it, or not.")]


def ui(
    context: typer.Context, output: Folder = None, port: Port = None, browser: Browser = False
) -> None:
    """Serve a page to generate with, on this machine only."""
    from ...pipelines.request import DEFAULT_OUTPUT
    from .server import serve

    left: Left = context.obj
    serve(output or DEFAULT_OUTPUT, port, browser=browser, unfinished=left.unfinished)
