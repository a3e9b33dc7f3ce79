"""Reports as files: whether one can be written is known before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from ..pipelines.errors import OutputError, RequestError


def check_report(path: Path) -> None:
    """Raise where `path` is no name for a page, or its folder is not there.

    A report that is there is replaced.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--html {path} is no name for a page: end it with .html")
    folder = path.absolute().parent
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder: name a file")
        if not folder.is_dir():
            raise OutputError(f"there is no folder {folder}: make it first")
        there = path.exists()
    except OSError as error:
        raise _not_written(error, path) from None
    if not os.access(path if there else folder, os.W_OK):
        raise OutputError(f"{path} cannot be written (Permission denied): name another file")


def write_report(path: Path, text: str) -> None:
    """Write `text`. Raises `OutputError` in one line where that fails."""
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # names may be no UTF-8
    except OSError as error:
        raise _not_written(error, path) from None


def wrote_report(path: Path, text: str) -> bool:
    """The same, where that must not lose what else is told: False, and the line on stderr."""
    try:
        write_report(path, text)
    except OutputError as error:
        typer.echo(f"kinora: {error}", err=True)
        return False
    return True


def _not_written(error: OSError, path: Path) -> OutputError:
    return OutputError(f"{path} cannot be written ({error.strerror or error}): name another file")
