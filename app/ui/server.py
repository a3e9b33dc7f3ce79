"""Serves the page on this machine until Ctrl-C. Imports gradio, and says so if it is not there."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
import webbrowser
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...pipelines.errors import KinoraError

if TYPE_CHECKING:
    from ...pipelines.saving import Kept

HOST = "127.0.0.1"
DEFAULT_PORT = 7860
_TRIED = 100
_LIBRARIES = ("gradio", "fastapi", "uvicorn")


class PageError(KinoraError):
    """The page cannot be served."""


def serve(output: str, port: int | None, *, browser: bool, unfinished: list[Kept]) -> None:
    """Serve the page until an exception (Ctrl-C) ends it, and a run of it with it.

    With `port` None it is the default one, or the next that is free. `unfinished` gets the latents
    of a run that is then being decoded. Raises `PageError`.
    """
    folder = Path(os.path.abspath(os.path.expanduser(output)))
    if folder.exists() and not folder.is_dir():
        raise PageError(f"--output {output} is a file: give a folder, the page names its files")
    if folder.suffix:
        output = f"{output}/"  # otherwise it would mean a file of that kind
    with listening(port) as listener, TemporaryDirectory(prefix="kinora-ui-") as scratch:
        # Read when gradio is imported. Its own folder in /tmp may belong to somebody else.
        os.environ["GRADIO_TEMP_DIR"] = scratch
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        taken = listener.getsockname()[1]
        app, desk = _application(folder, output, unfinished)
        with _served(app, listener) as thread:
            address = f"http://{HOST}:{taken}"
            if port is None and taken != DEFAULT_PORT:
                print(f"port {DEFAULT_PORT} is taken: using {taken}")
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if browser and not webbrowser.open(address):
                print("there is no browser to open it in", flush=True)
            desk.work(thread.is_alive)
    raise RuntimeError("the server of the page has ended")


def listening(port: int | None) -> socket.socket:
    """A socket at `port`, or at the first free one from the default on. Raises `PageError`."""
    wanted = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _TRIED)
    for number in wanted:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, number))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            if port is None and error.errno == errno.EADDRINUSE:
                continue
            why = (
                "taken" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
            )
            raise PageError(
                f"port {number} is {why}: choose another --port, or leave it out"
            ) from error
    raise PageError(
        f"ports {DEFAULT_PORT} to {DEFAULT_PORT + _TRIED - 1} are all taken: choose a --port"
    )


def _application(folder: Path, output: str, unfinished: list[Kept]) -> tuple[Any, Any]:
    """The page as an ASGI application, and its desk."""
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        raise PageError(
            f"the page needs {error.name}, which is not installed: "
            '`pip install --editable ".[ui]"` in the clone brings it'
        ) from error
    from . import page
    from .desk import Desk
    from .guard import Guard

    desk = Desk(unfinished=unfinished)
    blocks = page.Page(desk, output).blocks.queue(api_open=False)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        server_name=HOST,
        allowed_paths=[str(folder)],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        favicon_path=str(page.ICON),
        theme=page.theme(),
        css_paths=[page.CSS],
    )
    return Guard(app), desk


@contextmanager
def _served(app: Any, listener: socket.socket) -> Generator[threading.Thread, None, None]:
    """Answer what comes in at `listener`, in a thread, for the length of the body."""
    import uvicorn

    debug = bool(os.environ.get("KINORA_DEBUG"))
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.INFO if debug else logging.CRITICAL,
        ws="none",
        # Pages that are open keep a connection each, which would never end by themselves.
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="kinora-server", daemon=True
    )
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.02)
        yield thread
    finally:
        server.should_exit = True
        thread.join()
