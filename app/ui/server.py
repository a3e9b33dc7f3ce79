"""Serves page and jobs until Ctrl-C. Imports gradio, and says so if it is not there."""

from __future__ import annotations

import errno
import gc
import importlib.util
import logging
import os
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...pipelines.batch.making import Studio, with_previews
from ...pipelines.errors import KinoraError
from ...pipelines.jobs import Jobs
from . import later
from .dropped import Dropped
from .guard import TOKEN, UPLOAD_BYTES, Access, Guard

HOST = "127.0.0.1"
DEFAULT_PORT = 7860
_TRIED = 100
_CONNECTIONS = 1000
_LIBRARIES = ("gradio", "fastapi", "uvicorn")
# Half of the start: predictions alone need torch, and gradio's tables pandas.
LATER = ("torch", "pandas")


class PageError(KinoraError):
    """The page cannot be served."""


def serve(
    output: str, port: int | None, *, host: str, browser: bool, previews: bool = True
) -> None:
    """Serve the page until an exception (Ctrl-C) ends it; what is being made is interrupted then.

    With `port` None it is the default one, or the next that is free. Raises `KinoraError`.
    """
    access = Access.to(host, os.environ.get(TOKEN) or None)
    later.defer(*LATER)
    later.without_stubs()
    folder = Path(os.path.abspath(os.path.expanduser(output)))
    if folder.exists() and not folder.is_dir():
        raise PageError(f"--output {output} is a file: give a folder, the page names its files")
    _check_libraries()
    with (
        listening(port, host) as listener,
        closing(Jobs(folder, make=with_previews if previews else Studio)) as jobs,
        jobs.scratch() as scratch,
    ):
        jobs.start()
        taken = listener.getsockname()[1]
        with later.uncollected():
            app = application(jobs, access, scratch)
            gc.freeze()  # what stays is not looked through again
        with served(app, listener) as thread:
            address = f"http://{f'[{host}]' if ':' in host else host}:{taken}"
            if port is None and taken != DEFAULT_PORT:
                print(f"port {DEFAULT_PORT} is taken: using {taken}")
            asks = f"/?token=${TOKEN}" if access.token else ""
            print(f"{address}{asks} (Ctrl-C ends it)", flush=True)
            if browser:
                shown = f"{address}/?token={quote(access.token)}" if access.token else address
                if not webbrowser.open(shown):
                    print("there is no browser to open it in", flush=True)
            while thread.is_alive() and jobs.alive:
                thread.join(1)
    raise RuntimeError("the server of the page has ended")


def listening(port: int | None, host: str = HOST) -> socket.socket:
    """A socket at `port`, or at the first free one from the default on. Raises `PageError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wanted = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + _TRIED)
    for number in wanted:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            if port is None and error.errno == errno.EADDRINUSE:
                continue
            if error.errno in (errno.EADDRNOTAVAIL, None) or isinstance(error, socket.gaierror):
                raise PageError(
                    f"{host} is no address of this machine: choose another --host, such as {HOST}"
                ) from error
            why = (
                "taken" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
            )
            raise PageError(
                f"port {number} is {why}: choose another --port, or leave it out"
            ) from error
    raise PageError(
        f"ports {DEFAULT_PORT} to {DEFAULT_PORT + _TRIED - 1} are all taken: choose a --port"
    )


def _check_libraries() -> None:
    """Raises `PageError` where one is missing."""
    for name in _LIBRARIES:
        try:
            missing = importlib.util.find_spec(name) is None
        except ValueError:  # something stands in its place
            missing = sys.modules.get(name) is None
        if missing:
            raise PageError(
                f"the page needs {name}, which is not installed: "
                '`pip install --editable ".[ui]"` in the clone brings it'
            )


def application(jobs: Jobs, access: Access, scratch: Path) -> Guard:
    """The page and the jobs over HTTP as one ASGI application, with a folder for uploads."""
    # Read when gradio is imported. Its own folder in /tmp may belong to somebody else.
    os.environ["GRADIO_TEMP_DIR"] = str(scratch)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from fastapi import FastAPI

    from ...eval import players
    from . import api, evaluate, page
    from . import gallery as galleries

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    api.add(app, jobs)
    gallery = galleries.Gallery(jobs.folder)
    galleries.add(app, gallery)
    shown = page.Page(jobs, gallery, named_only=access.token is not None)
    evaluate.add(app, shown.reports)
    blocks = shown.blocks.queue(api_open=False)
    mounted = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=UPLOAD_BYTES,
        favicon_path=str(page.ICON),
        theme=page.theme(),
        css_paths=[players.STYLE, page.CSS],
    )
    return Guard(mounted, access, Dropped(scratch))


@contextmanager
def served(app: Any, listener: socket.socket) -> Generator[threading.Thread, None, None]:
    """Answer what comes in at `listener`, in a thread, for the length of the body."""
    import uvicorn

    debug = bool(os.environ.get("KINORA_DEBUG"))
    # It tells of each malformed form, in words of whoever sent it.
    logging.getLogger("python_multipart").setLevel(logging.INFO if debug else logging.CRITICAL)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.INFO if debug else logging.CRITICAL,
        ws="none",
        limit_concurrency=_CONNECTIONS,
        backlog=_CONNECTIONS,
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
