"""The denoisers of a pipeline that a session can attach to."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch

from ..errors import AccelerationError, hint
from .entered import Entry
from .families import FAMILIES
from .family import Attention, Family

DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass
class Denoiser:
    """One denoiser of the pipeline, `number` 0 or 1, whose layers count from `offset`."""

    part: str
    """What the pipeline calls it."""
    module: Any
    inner: Any
    """The same, or what `torch.compile` has wrapped."""
    family: Family
    number: int
    attentions: list[Attention]
    layers: dict[int, int]
    """Number of the layer by place among `attentions`; what is no self-attention is no layer."""
    offset: int
    stock: list[Any] = field(default_factory=list[Any])
    kind: type | None = None
    """Of what a call returns; known after the first."""
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()
    """Of an item of what it returns."""
    pruned: int | None = None
    """Halvings of the grid at which its blocks may be pruned; None where none are."""

    def layer_names(self) -> list[str]:
        """Modules of its layers, as the pipeline calls them."""
        return [f"{self.part}.{self.attentions[place].name}" for place in self.layers]


def refuse_accelerated(pipe: Any) -> None:
    """Raise AccelerationError where a session stands on a denoiser of `pipe` already."""
    for name in DENOISERS:
        module = getattr(pipe, name, None)
        if module is not None and isinstance(vars(module).get("_compiled_call_impl"), Entry):
            raise AccelerationError(f"{name} of this pipeline is accelerated already")


def denoisers_of(pipe: Any, *, attends: bool = True) -> list[Denoiser]:
    """The denoisers of `pipe`, at least one; of any class unless their attention is to change.

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
        if family is None and not attends:
            family = _unknown(type(inner))
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
        attentions = family.attentions(inner) if attends else []
        places = [i for i, it in enumerate(attentions) if it.sees != "other"]
        layers = {place: number for number, place in enumerate(places)}
        if attends and not layers:
            raise AccelerationError(
                f"this {type(inner).__name__} has no self-attention that could be accelerated"
            )
        number = len(found)
        found.append(Denoiser(name, module, inner, family, number, attentions, layers, offset))
        offset += len(layers)
    if not found and type(pipe).__name__ in FAMILIES:
        raise AccelerationError(
            f"{type(pipe).__name__} is a denoiser: give the pipeline that holds it"
        )
    if not found:
        raise AccelerationError(
            f"{type(pipe).__name__} has no denoiser whose attention could be accelerated; "
            f"known are {', '.join(FAMILIES)}"
        )
    return found


def _unknown(denoiser: type) -> Family:
    """A family of which nothing is known but that its first argument are the latents."""
    _, latents, *_ = inspect.signature(cast("Any", denoiser).forward).parameters

    def untold(*_: Any) -> NoReturn:
        raise LookupError(f"{denoiser.__name__} is not known")

    return Family(denoiser.__name__, lambda _: [], untold, untold, latents=latents)
