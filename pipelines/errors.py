"""Everything that Kinora refuses, as one tree.

    KinoraError                 one line: what was given, what is allowed, the remedy
    ├── RequestError            a request that no run could fulfil (prompt, size, length, counts)
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

from ..accel.errors import AccelerationError, KinoraError, RecipeError, nearest

__all__ = [
    "AccelerationError",
    "Cancelled",
    "GenerationError",
    "KinoraError",
    "MemoryLimitError",
    "ModelError",
    "OutputError",
    "RecipeError",
    "RequestError",
    "SidecarError",
    "nearest",
]


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
