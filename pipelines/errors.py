"""Everything that Kinora refuses, as one tree.

    KinoraError                 one line: what was given, what is allowed, the remedy
    ├── RequestError            a request that no run could fulfil (prompt, size, length, counts)
    ├── ModelError              the model is not known, not there, or not whole
    ├── MemoryLimitError        the predicted peak is above what is free
    ├── OutputError             the output cannot be written; `latents` names what was kept
    ├── SidecarError            a sidecar or embedded record that is not one of ours
    └── GenerationError         the model failed; `latents` names what was kept

A front end shows `str(error)` and nothing else; any other exception is a fault in Kinora.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class KinoraError(ValueError):
    """A known failure, told in one line."""

    def __init__(self, message: str, *, latents: Path | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.latents = latents


class RequestError(KinoraError):
    """The request itself cannot be fulfilled."""


class ModelError(KinoraError):
    """The model is unknown, absent or damaged."""


class MemoryLimitError(KinoraError):
    """The predicted peak memory is above what is free."""


class OutputError(KinoraError):
    """The output cannot be written."""


class SidecarError(KinoraError):
    """A sidecar, or the record inside a media or latents file, cannot be read."""


class GenerationError(KinoraError):
    """The model ran and failed."""


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """Raised inside the worker to end a run that nobody wants any more."""


def nearest(given: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The entries of `known` that begin with `given`, then those most like it; maybe none."""
    by_lower = {name.lower(): name for name in known}
    begun = [name for name in by_lower if given and name.startswith(given.lower())]
    close = difflib.get_close_matches(given.lower(), list(by_lower), n=count, cutoff=0.5)
    return [by_lower[name] for name in dict.fromkeys([*begun, *close])][:count]
