"""What a session must know of a class of denoisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..cost import Shape
from ..grid import TokenGrid

Arguments = Mapping[str, Any]
"""Of a denoiser's `forward`, by name."""


@dataclass(frozen=True, slots=True)
class Attention:
    """A module of a denoiser whose attention calls come to a session.

    `sees`: its queries and keys are the tokens of the "picture", those and the text's ("joint"), or
    it is no self-attention ("other"), and left alone. `halvings` of the grid's height and width on
    the way to it.
    """

    name: str
    sees: Literal["picture", "joint", "other"]
    halvings: int = 0


class Expected(NamedTuple):
    """One attention call of a forward: of the attention at `place`, for the `item`-th text.

    `text` tokens stand beside the picture's, masked ones too.
    """

    place: int
    item: int
    text: int


class Stack(NamedTuple):
    """Blocks, by the names of their modules, that follow each other with nothing in between.

    Their grid's height and width are halved `halvings` times.
    """

    names: tuple[str, ...]
    halvings: int = 0


def _one_text(given: Arguments) -> list[int]:
    return [given["encoder_hidden_states"].shape[1]]


def _never(attention: Attention, given: Arguments) -> bool:
    del attention, given
    return False


@dataclass(frozen=True, slots=True)
class Family:
    """One class of denoisers.

    Attributes:
        attentions: of a denoiser, in the order in which they run. Of models that call torch these
            are all that do, of models that dispatch those of self-attention.
        grid: tokens of the picture, from the config and a call's arguments.
        shape: what a call costs, from the config.
        text_first: whether text stands before the picture, where they are joint.
        dispatches: through diffusers' attention dispatcher, else by calling torch's
            `scaled_dot_product_attention`, which it does nowhere but in `attentions`.
        latents: the argument with them.
        texts: text tokens in each of the calls that one self-attention makes. Most make one call.
        skips: whether a call leaves that attention out.
    """

    denoiser: str
    attentions: Callable[[Any], list[Attention]]
    grid: Callable[[Any, Arguments], TokenGrid]
    shape: Callable[[Mapping[str, Any]], Shape]
    text_first: bool = False
    dispatches: bool = True
    latents: str = "hidden_states"
    texts: Callable[[Arguments], list[int]] = _one_text
    skips: Callable[[Attention, Arguments], bool] = _never

    def expected(self, attentions: list[Attention], given: Arguments) -> list[Expected]:
        """The attention calls of a forward, in order."""
        joint = any(it.sees == "joint" for it in attentions)
        texts = self.texts(given) if joint else [0]
        found: list[Expected] = []
        for place, attention in enumerate(attentions):
            if self.skips(attention, given):
                continue
            items = [0] if attention.sees == "other" else texts
            beside = attention.sees == "joint"
            found += [Expected(place, i, text if beside else 0) for i, text in enumerate(items)]
        return found
