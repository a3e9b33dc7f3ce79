"""The denoisers that Kinora knows: where their self-attention is and what it sees."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..cost import LayerShape, Shape, transformer_layer
from ..grid import TokenGrid
from .family import Arguments, Attention, Family
from .unet import UNET


def _matching(
    joint: str = "", alone: str = "", *, other: tuple[str, ...] = ()
) -> Callable[[Any], list[Attention]]:
    """Modules by patterns of their names, first those named `other`; they are made as they run."""

    def attentions(denoiser: Any) -> list[Attention]:
        found = [Attention(name, "other") for name in other]
        for name, _ in denoiser.named_modules():
            if joint and re.fullmatch(joint, name):
                found.append(Attention(name, "joint"))
            elif alone and re.fullmatch(alone, name):
                found.append(Attention(name, "picture"))
        return found

    return attentions


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


def _sd3(config: Any, given: Arguments) -> TokenGrid:
    """Latents `[B, C, H, W]`."""
    *_, height, width = given["hidden_states"].shape
    return TokenGrid(1, height // config["patch_size"], width // config["patch_size"])


def _sd3_skips(attention: Attention, given: Arguments) -> bool:
    """Its guidance by skipped layers calls once more, without some of the blocks."""
    return int(attention.name.split(".")[1]) in (given.get("skip_layers") or ())


def _mochi(config: Any, given: Arguments) -> TokenGrid:
    """Latents `[B, C, F, H, W]`."""
    _, _, frames, height, width = given["hidden_states"].shape
    return TokenGrid(frames, height // config["patch_size"], width // config["patch_size"])


def _mochi_texts(given: Arguments) -> list[int]:
    """It attends for each item of a batch alone, and leaves the padding of its text out."""
    return given["encoder_attention_mask"].bool().sum(dim=1).tolist()


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
        layer = transformer_layer(
            heads,
            head_dim,
            int(config[middle]) if isinstance(middle, str) else middle * heads * head_dim,
            text=int(config[text]) if isinstance(text, str) else text,
            cross_attention=cross,
        )
        count = sum(int(config[name]) for name in layers)
        return Shape((layer,) * count, text_first=first)

    return shape


def _sd3_shape(config: Mapping[str, Any]) -> Shape:
    """333 tokens of text: 77 of CLIP, 256 of T5. SD 3.5 has layers of the image alone as well."""
    heads, head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    width = heads * head_dim
    joint = transformer_layer(heads, head_dim, 4 * width, text=333)
    alone = LayerShape(heads, head_dim, 4 * width**2)
    layers: list[LayerShape] = []
    for number in range(int(config["num_layers"])):
        layers += (
            [joint, alone] if number in (config.get("dual_attention_layers") or ()) else [joint]
        )
    return Shape(tuple(layers))


FAMILIES: dict[str, Family] = {
    family.denoiser: family
    for family in (
        Family(
            "WanTransformer3DModel",
            _matching(alone=r"blocks\.\d+\.attn1"),
            _wan,
            _shape("num_layers", middle="ffn_dim", cross=True),
        ),
        Family(
            "HunyuanVideoTransformer3DModel",
            _matching(r"(single_)?transformer_blocks\.\d+\.attn"),
            _hunyuan,
            _shape("num_layers", "num_single_layers", text=256),
        ),
        Family(
            "LTXVideoTransformer3DModel",
            _matching(alone=r"transformer_blocks\.\d+\.attn1"),
            _ltx,
            _shape("num_layers", cross=True),
        ),
        Family(
            "FluxTransformer2DModel",
            _matching(r"(single_)?transformer_blocks\.\d+\.attn"),
            _flux,
            _shape("num_layers", "num_single_layers", text=512, first=True),
            text_first=True,
        ),
        Family(
            "QwenImageTransformer2DModel",
            _matching(r"transformer_blocks\.\d+\.attn"),
            _qwen,
            _shape("num_layers", text=256, first=True),
            text_first=True,
        ),
        Family(
            "CogVideoXTransformer3DModel",
            _matching(r"transformer_blocks\.\d+\.attn1"),
            _cogvideox,
            _shape("num_layers", text="max_text_seq_length", first=True),
            text_first=True,
            dispatches=False,
        ),
        Family(
            "MochiTransformer3DModel",
            _matching(r"transformer_blocks\.\d+\.attn1", other=("time_embed.pooler",)),
            _mochi,
            _shape("num_layers", text=256),
            dispatches=False,
            texts=_mochi_texts,
        ),
        Family(
            "SD3Transformer2DModel",
            _matching(r"transformer_blocks\.\d+\.attn", r"transformer_blocks\.\d+\.attn2"),
            _sd3,
            _sd3_shape,
            dispatches=False,
            skips=_sd3_skips,
        ),
        UNET,
    )
}
"""By class name of the denoiser."""
