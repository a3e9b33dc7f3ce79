"""What Kinora knows of diffusers' denoisers: where their self-attention is and what it sees."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..cost import Shape
from ..grid import TokenGrid

Arguments = Mapping[str, Any]
"""Of a denoiser's `forward`, by name."""


@dataclass(frozen=True, slots=True)
class Family:
    """One class of denoisers.

    `layers` matches the names of the modules whose processor does self-attention (joint with the
    text where `text` says so); cross-attention is left alone. `dispatches`: through diffusers'
    attention dispatcher, else by calling torch's `scaled_dot_product_attention`, which it does
    nowhere else.
    """

    denoiser: str
    layers: re.Pattern[str]
    text: Literal["none", "first", "last"]
    dispatches: bool
    grid: Callable[[Any, Arguments], TokenGrid]
    shape: Callable[[Mapping[str, Any]], Shape]

    def names(self, denoiser: Any) -> list[str]:
        """Names of the self-attention modules in the order in which they run."""
        return [name for name, _ in denoiser.named_modules() if self.layers.fullmatch(name)]


def _wan(config: Any, given: Arguments) -> TokenGrid:
    """Latents `[B, C, F, H, W]`."""
    _, _, *sides = given["hidden_states"].shape
    frames, height, width = (
        side // patch for side, patch in zip(sides, config["patch_size"], strict=True)
    )
    return TokenGrid(frames, height, width)


def _hunyuan(config: Any, given: Arguments) -> TokenGrid:
    """Latents `[B, C, F, H, W]`."""
    _, _, frames, height, width = given["hidden_states"].shape
    patch = config["patch_size"]
    return TokenGrid(frames // config["patch_size_t"], height // patch, width // patch)


def _cogvideox(config: Any, given: Arguments) -> TokenGrid:
    """Latents `[B, F, C, H, W]`."""
    _, frames, _, height, width = given["hidden_states"].shape
    patch = config["patch_size"]
    return TokenGrid(frames // (config["patch_size_t"] or 1), height // patch, width // patch)


def _ltx(config: Any, given: Arguments) -> TokenGrid:
    """Packed; the lengths come beside it."""
    del config
    return TokenGrid(given["num_frames"], given["height"], given["width"])


def _flux(config: Any, given: Arguments) -> TokenGrid:
    """Packed; `img_ids [L, 3]` holds row and column of each token."""
    del config
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    _, height, width = (int(it) + 1 for it in ids.amax(dim=0))
    return TokenGrid(1, height, width)


def _qwen(config: Any, given: Arguments) -> TokenGrid:
    """Packed; `img_shapes` holds one (frames, rows, columns) a picture of each item of a batch."""
    del config
    shapes = given["img_shapes"][0]
    first = shapes if isinstance(shapes[0], int) else shapes[0]
    return TokenGrid(*first)


def _shape(
    *layers: str,
    middle: int | str = 4,
    text: int | str = 0,
    first: bool = False,
    cross: bool = False,
) -> Callable[[Mapping[str, Any]], Shape]:
    """Reads a config: `layers` names its counts of layers, `middle` is a factor of the width or
    the name of a width, `text` a number of tokens or the name of one."""

    def shape(config: Mapping[str, Any]) -> Shape:
        heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        return Shape(
            layers=sum(int(config[name]) for name in layers),
            heads=heads,
            head_dim=head_dim,
            middle=int(config[middle]) if isinstance(middle, str) else middle * heads * head_dim,
            text=int(config[text]) if isinstance(text, str) else text,
            text_first=first,
            cross_attention=cross,
        )

    return shape


FAMILIES: dict[str, Family] = {
    family.denoiser: family
    for family in (
        Family(
            "WanTransformer3DModel",
            re.compile(r"blocks\.\d+\.attn1"),
            "none",
            True,
            _wan,
            _shape("num_layers", middle="ffn_dim", cross=True),
        ),
        Family(
            "HunyuanVideoTransformer3DModel",
            re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
            "last",
            True,
            _hunyuan,
            _shape("num_layers", "num_single_layers", text=256),
        ),
        Family(
            "LTXVideoTransformer3DModel",
            re.compile(r"transformer_blocks\.\d+\.attn1"),
            "none",
            True,
            _ltx,
            _shape("num_layers", cross=True),
        ),
        Family(
            "FluxTransformer2DModel",
            re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
            "first",
            True,
            _flux,
            _shape("num_layers", "num_single_layers", text=512, first=True),
        ),
        Family(
            "QwenImageTransformer2DModel",
            re.compile(r"transformer_blocks\.\d+\.attn"),
            "first",
            True,
            _qwen,
            _shape("num_layers", text=256, first=True),
        ),
        Family(
            "CogVideoXTransformer3DModel",
            re.compile(r"transformer_blocks\.\d+\.attn1"),
            "first",
            False,
            _cogvideox,
            _shape("num_layers", text="max_text_seq_length", first=True),
        ),
    )
}
"""By class name of the denoiser."""
