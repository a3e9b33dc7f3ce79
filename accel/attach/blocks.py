"""The transformer blocks of each family: through which the same tokens run, and what tells tokens.

What a block is given that has an axis of tokens must be cut with them; what is not named here has
none. Blocks that are not known so cannot be pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import AccelerationError
from . import unet
from .family import Stack

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens of the picture that are kept, of `tokens`, and where text stands beside them."""

    rows: torch.Tensor
    """`[K]` int64, ascending."""
    tokens: int
    text_first: bool

    def of(self, value: Any, axis: int) -> Any:
        """`value`, a tensor, several or none, cut along the axis of its tokens.

        Text beside the picture's stays; one entry that serves all tokens does too.
        """
        if value is None:
            return None
        if isinstance(value, tuple | list):
            return type(value)(self.of(it, axis) for it in value)
        count = value.shape[axis]
        if count == 1:
            return value
        text = count - self.tokens
        if text < 0:
            raise AccelerationError(
                f"a block is given {list(value.shape)} for {self.tokens} tokens, of which it is "
                f"not known how to leave some out: leave steps.prune out"
            )
        rows = self.rows + (text if self.text_first else 0)
        if text:
            start = 0 if self.text_first else self.tokens
            beside = torch.arange(start, start + text, device=rows.device)
            rows = torch.cat((beside, rows) if self.text_first else (rows, beside))
        return value.index_select(axis, rows.to(value.device))


Cut = Callable[[Any, Kept], Any]


def _along(axis: int) -> Cut:
    return lambda value, kept: kept.of(value, axis)


def _wan_time(value: torch.Tensor, kept: Kept) -> torch.Tensor:
    """`[B, 6, d]`, or `[B, L, 6, d]` where tokens are at times of their own."""
    return kept.of(value, 1) if value.ndim == 4 else value


def _qwen_places(value: Any, kept: Kept) -> Any:
    """Those of the picture, and those of the text."""
    picture, text = value
    return kept.of(picture, 0), text


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a class of denoisers.

    Attributes:
        stacks: of a denoiser, in the order in which they run, with those at the largest grid alone.
        caches: width of what each of them puts out, and halvings of its grid, from the config.
        place: of the picture's tokens in what a block returns; None where it returns nothing else.
        cuts: arguments with an axis of tokens, besides `hidden_states`.
        channels: axis of the channels of a scheduler's sample.
        between: arguments of the denoiser that change tokens between blocks or inside of them.
        refuses: why a denoiser of this config cannot be pruned, or None.
    """

    stacks: Callable[[Any], list[Stack]]
    caches: Callable[[Config], list[tuple[int, int]]]
    place: int | None = None
    cuts: Mapping[str, Cut] = field(default_factory=dict[str, Cut])
    channels: int = 1
    between: tuple[str, ...] = ()
    refuses: Callable[[Config], str | None] = lambda _: None


def _lists(*lists: str) -> Callable[[Any], list[Stack]]:
    """One stack of all blocks in these lists."""

    def stacks(denoiser: Any) -> list[Stack]:
        names = [f"{it}.{i}" for it in lists for i in range(len(getattr(denoiser, it)))]
        return [Stack(tuple(names))]

    return stacks


def _one(config: Config) -> list[tuple[int, int]]:
    return [(int(config["num_attention_heads"]) * int(config["attention_head_dim"]), 0)]


def _hunyuan_refuses(config: Config) -> str | None:
    if config.get("image_condition_type") != "token_replace":
        return None
    return "its blocks treat the tokens of the first frame otherwise, by their place"


def _qwen_refuses(config: Config) -> str | None:
    return "it has layers of pictures" if config.get("use_layer3d_rope") else None


def _unet_refuses(config: Config) -> str | None:
    return None if unet.caches(config) else "it has no transformer blocks"


BLOCKS: dict[str, Blocks] = {
    "WanTransformer3DModel": Blocks(
        _lists("blocks"), _one, cuts={"rotary_emb": _along(1), "temb": _wan_time}
    ),
    "HunyuanVideoTransformer3DModel": Blocks(
        _lists("transformer_blocks", "single_transformer_blocks"),
        _one,
        place=0,
        cuts={
            "freqs_cis": _along(0),
            "image_rotary_emb": _along(0),
            "attention_mask": _along(-1),
        },
        refuses=_hunyuan_refuses,
    ),
    "LTXVideoTransformer3DModel": Blocks(
        _lists("transformer_blocks"),
        _one,
        cuts={"image_rotary_emb": _along(1), "temb": _along(1)},
    ),
    "FluxTransformer2DModel": Blocks(
        _lists("transformer_blocks", "single_transformer_blocks"),
        _one,
        place=1,
        cuts={"image_rotary_emb": _along(0)},
        between=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
    "QwenImageTransformer2DModel": Blocks(
        _lists("transformer_blocks"),
        _one,
        place=1,
        cuts={"image_rotary_emb": _qwen_places, "modulate_index": _along(1)},
        between=("controlnet_block_samples",),
        refuses=_qwen_refuses,
    ),
    "CogVideoXTransformer3DModel": Blocks(
        _lists("transformer_blocks"),
        _one,
        place=0,
        cuts={"image_rotary_emb": _along(0)},
        channels=2,
    ),
    "MochiTransformer3DModel": Blocks(
        _lists("transformer_blocks"), _one, place=0, cuts={"image_rotary_emb": _along(0)}
    ),
    "SD3Transformer2DModel": Blocks(
        _lists("transformer_blocks"),
        _one,
        place=1,
        between=("block_controlnet_hidden_states",),
    ),
    "UNet2DConditionModel": Blocks(
        unet.stacks, unet.caches, between=("attention_mask",), refuses=_unet_refuses
    ),
}
"""By class name of the denoiser."""


def refusal(denoiser: str, config: Config) -> str | None:
    """Why a denoiser of this class and config cannot be pruned, or None."""
    known = BLOCKS.get(denoiser)
    if known is None:
        why = f"its blocks are not known, only those of {', '.join(BLOCKS)}"
    else:
        why = known.refuses(config)
    return why and f"{denoiser} cannot be pruned: {why}; leave steps.prune out"
