"""Everything that Kinora refuses, as one tree.

    KinoraError                 one line: what was given, what is allowed, the remedy
    ├── RequestError            a request that no run could fulfil (prompt, size, length, counts)
    ├── BusyError               more jobs wait already than are taken
    ├── ManifestError           a manifest, or a row of one, that no batch could run
    ├── RecipeError             an acceleration, or an option of one, that does not exist
    ├── AccelerationError       an acceleration cannot be attached or, in strict mode, fell back
    ├── ModelError              the model is not known, not there, or not whole
    ├── MemoryLimitError        the predicted peak is above what is free
    ├── OutputError             the output cannot be written; `latents` names what was kept
    ├── SidecarError            a sidecar or embedded record that is not one of ours
    └── GenerationError         the model failed; `latents` names what was kept

A front end shows `str(error)` and nothing else; any other exception is a fault in Kinora.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..accel.errors import AccelerationError, KinoraError, RecipeError, nearest

if TYPE_CHECKING:
    from pydantic import ValidationError

# What is wrong with a value, by pydantic's name for the error.
_WRONG = {
    "missing": "is missing",
    "extra_forbidden": "is no field that Kinora knows",
    "json_invalid": "is no JSON",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    "int_parsing_size": "must be a number of fewer digits",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a JSON object"),
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "literal_error": "must be {expected}",
}

__all__ = [
    "AccelerationError",
    "BusyError",
    "Cancelled",
    "GenerationError",
    "KinoraError",
    "ManifestError",
    "MemoryLimitError",
    "ModelError",
    "OutputError",
    "RecipeError",
    "RequestError",
    "SidecarError",
    "nearest",
    "shortened",
]


class RequestError(KinoraError):
    """The request itself cannot be fulfilled."""


class BusyError(KinoraError):
    """No further job is taken before others have ended."""


class ManifestError(KinoraError):
    """A manifest, or a row of one, cannot be run."""


class ModelError(KinoraError):
    """The model is unknown, absent or damaged; `damaged` is a file that must be fetched anew."""

    def __init__(
        self, message: str, *, latents: Path | None = None, damaged: Path | None = None
    ) -> None:
        super().__init__(message, latents=latents)
        self.damaged = damaged


class MemoryLimitError(KinoraError):
    """The predicted peak memory is above what is free."""


class OutputError(KinoraError):
    """The output cannot be written."""


class SidecarError(KinoraError):
    """A sidecar, or the record inside a media or latents file, cannot be read."""


class GenerationError(KinoraError):
    """The model ran and failed."""


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """Ends a run that nobody wants any more: in its worker, and where its events are waited for."""


def shortened(given: str | int) -> str:
    """What was given, for a message: of long texts both ends, of huge numbers the magnitude."""
    if isinstance(given, str):
        return given if len(given) <= 300 else f"{given[:200]}…{given[-60:]}"
    if abs(given) < 10**18:
        return str(given)
    return f"{'minus ' if given < 0 else ''}about 10^{math.log10(abs(given)):.0f}"


def explain_invalid(error: ValidationError) -> str:
    """The first thing that pydantic found wrong: where, what is allowed, what was given."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the record"
    wrong = _WRONG.get(first["type"])
    if wrong is None:
        return f"{where}: {first['msg']}"
    told = f"{where} {wrong.format(**first.get('ctx', {}))}"
    if not wrong.startswith("must"):
        return told
    given = json.dumps(first["input"], ensure_ascii=False, default=str)
    return f"{told}, not {given if len(given) <= 60 else given[:60] + '…'}"
