"""The denoisers of a pipeline that a session can attach to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import AccelerationError, hint
from .families import FAMILIES, Family

DENOISERS = ("transformer", "transformer_2")


@dataclass
class Denoiser:
    """One denoiser of the pipeline, `number` 0 or 1, whose layers count from `offset`."""

    module: Any
    inner: Any
    """The same, or what `torch.compile` has wrapped."""
    family: Family
    number: int
    layers: list[str]
    offset: int
    stock: list[Any] = field(default_factory=list[Any])
    kind: type | None = None
    """Of what a call returns; known after the first."""
    dtype: torch.dtype = torch.float32


class Entry:
    """What stands in for a denoiser's call while it is accelerated."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def refuse_accelerated(pipe: Any) -> None:
    """Raise AccelerationError where a session stands on a denoiser of `pipe` already."""
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if module is not None and isinstance(vars(module).get("_compiled_call_impl"), Entry):
            raise AccelerationError(f"{name} of this pipeline is accelerated already")


def denoisers_of(pipe: Any) -> list[Denoiser]:
    """The denoisers of `pipe`, at least one.

    Raises:
        AccelerationError: there is none, or one that cannot be accelerated; it says why.
    """
    refuse_accelerated(pipe)
    found: list[Denoiser] = []
    offset = 0
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if module is None:
            continue
        inner = getattr(module, "_orig_mod", module)
        family = FAMILIES.get(type(inner).__name__)
        if family is None:
            raise AccelerationError(
                f"attention of {type(inner).__name__} cannot be accelerated yet"
                f"{hint(type(inner).__name__, FAMILIES)}; known are {', '.join(FAMILIES)}"
            )
        if getattr(inner, "is_cache_enabled", False):
            raise AccelerationError(
                f"{name} has a cache of diffusers enabled, which skips layers unseen: "
                f"call disable_cache() on it first"
            )
        layers = family.names(inner)
        found.append(Denoiser(module, inner, family, len(found), layers, offset))
        offset += len(layers)
    if not found and type(pipe).__name__ in FAMILIES:
        raise AccelerationError(
            f"{type(pipe).__name__} is a denoiser: give the pipeline that holds it"
        )
    if not found:
        raise AccelerationError(
            f"{type(pipe).__name__} has no transformer whose attention could be accelerated"
            f"{', and UNets cannot be yet' if hasattr(pipe, 'unet') else ''}; "
            f"known are {', '.join(FAMILIES)}"
        )
    return found
