"""Reports as files: whether one can be written is known before the work begins."""

from __future__ import annotations

from pathlib import Path

from ..pipelines.errors import OutputError, RequestError
from ..pipelines.files import explain


def check_report(path: Path) -> None:
    """Raise where `path` is no name for a page, or its folder is not there.

    A report that is there is replaced.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise RequestError(f"--html {path} is no name for a page: end it with .html")
    if path.is_dir():
        raise OutputError(f"{path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {path.absolute().parent}: make it first")


def write_report(path: Path, text: str) -> None:
    """Write `text`. Raises `OutputError` in one line where that fails."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise explain(error, path) from None
