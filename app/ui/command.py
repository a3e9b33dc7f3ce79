"""`kinora ui`: the page, and the jobs over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

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
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="Address to listen at; others than this machine's own need KINORA_TOKEN. "
        "[default: 127.0.0.1]",
        show_default=False,
    ),
]
Browser = Annotated[bool, typer.Option("--open/--no-browser", help="Open a browser on it, or not.")]

Previews = Annotated[
    bool,
    typer.Option(
        "--previews/--no-previews",
        help="Show what a run is heading for, for a twentieth of its time at most, or not. "
        "[default: show]",
        show_default=False,
    ),
]


def ui(
    output: Folder = None,
    port: Port = None,
    host: Host = "127.0.0.1",
    browser: Browser = False,
    previews: Previews = True,
) -> None:
    """Serve a page to generate with, and the same jobs over HTTP."""
    from ...pipelines.request import DEFAULT_OUTPUT
    from .server import serve

    serve(output or DEFAULT_OUTPUT, port, host=host, browser=browser, previews=previews)
