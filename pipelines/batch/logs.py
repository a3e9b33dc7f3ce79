"""Files for what libraries print in workers, whose last line may tell why one has ended."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

_MOST_BYTES = 2**20


def write_to(log: Path) -> None:
    """Have what libraries print go to `log`, whose last line may say why a worker crashed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, closefd=False, errors="backslashreplace")
        for number in (1, 2)
    )


def shorten() -> None:
    """Empty that file where it has become long."""
    if os.fstat(2).st_size > _MOST_BYTES:
        os.ftruncate(2, 0)


def last(log: Path) -> str:
    """The last that was printed there, in brackets to follow other words; or nothing."""
    with suppress(OSError):
        lines = [it.strip() for it in log.read_text("utf-8", "replace")[-2000:].splitlines()]
        found = next((it for it in reversed(lines) if it), "")
        if found:
            return f" ({found[:200]})"
    return ""
