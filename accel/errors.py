"""What the parts of Kinora refuse with: one line each. `pipelines.errors` has the whole tree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class KinoraError(ValueError):
    """A known failure, told in one line: what was given, what is allowed, the remedy."""

    def __init__(self, message: str, *, latents: Path | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.latents = latents


class RecipeError(KinoraError):
    """A recipe or one of its options that does not exist or is out of range."""


class AccelerationError(KinoraError):
    """An acceleration cannot be attached, did not come to life or, in strict mode, fell back."""


def nearest(given: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The entries of `known` that begin with `given`, then those most like it; maybe none."""
    by_lower = {name.lower(): name for name in known}
    begun = [name for name in by_lower if given and name.startswith(given.lower())]
    close = difflib.get_close_matches(given.lower(), list(by_lower), n=count, cutoff=0.5)
    return [by_lower[name] for name in dict.fromkeys([*begun, *close])][:count]


def hint(given: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` where something known is near, else nothing."""
    close = nearest(given, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
