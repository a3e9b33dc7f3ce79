"""UNets: self-attention on a grid that is halved on the way down and doubled on the way up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..cost import LayerShape, Shape, transformer_layer
from ..grid import TokenGrid
from .family import Arguments, Attention, Family, Stack


def _attentions(denoiser: Any) -> list[Attention]:
    """All attention modules in the order in which they run, which is not that of their making."""
    deepest = len(denoiser.down_blocks) - 1
    down, middle, up = list[Attention](), list[Attention](), list[Attention]()
    for name, module in denoiser.named_modules():
        if not hasattr(module, "is_cross_attention"):
            continue
        sees = "other" if module.is_cross_attention else "picture"
        if found := re.match(r"down_blocks\.(\d+)\.", name):
            down.append(Attention(name, sees, int(found[1])))
        elif name.startswith("mid_block."):
            middle.append(Attention(name, sees, deepest))
        elif found := re.match(r"up_blocks\.(\d+)\.", name):
            up.append(Attention(name, sees, deepest - int(found[1])))
    return [*down, *middle, *up]


def _grid(config: Any, given: Arguments) -> TokenGrid:
    """Latents `[B, C, H, W]`."""
    del config
    *_, height, width = given["sample"].shape
    return TokenGrid(1, height, width)


def _each(value: Any, count: int) -> list[Any]:
    """Configs give a number for all or one for each."""
    return list(value) if isinstance(value, Sequence) else [value] * count


def _crossed(config: Mapping[str, Any]) -> tuple[list[bool], list[bool]]:
    """Which blocks on the way down, and on that up, have transformers."""
    count = len(config["block_out_channels"])
    crossed = ["CrossAttnDownBlock2D"] * (count - 1) + ["DownBlock2D"]
    down = ["CrossAttn" in it for it in config.get("down_block_types", crossed)]
    crossed = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (count - 1)
    return down, ["CrossAttn" in it for it in config.get("up_block_types", crossed)]


def stacks(denoiser: Any) -> list[Stack]:
    """The transformers of the level with the most tokens that has any, in order."""
    deepest, found = len(denoiser.down_blocks) - 1, dict[str, tuple[int, list[str]]]()
    for name, _ in denoiser.named_modules():
        told = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?.*transformer_blocks\.\d+", name)
        if told is None:
            continue
        number = int(told[2] or 0)
        level = {"down": number, "up": deepest - number}.get(told[1], deepest)
        found.setdefault(name.rpartition(".")[0], (level, []))[1].append(name)
    top = min((level for level, _ in found.values()), default=0)
    # "down" < "mid" < "up", also as text; sorting keeps the rest as it is.
    ordered = sorted(found, key=lambda it: it.partition("_")[0])
    return [Stack(tuple(found[it][1]), top) for it in ordered if found[it][0] == top]


def caches(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Width and halvings of the grid of what `stacks` finds, from the config."""
    channels = [int(it) for it in config["block_out_channels"]]
    count = len(channels)
    resnets = _each(config.get("layers_per_block", 2), count)
    down, up = _crossed(config)
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn"
    for level in range(count):
        found = down[level] * resnets[level] + up[count - 1 - level] * (resnets[level] + 1)
        found += middle and level == count - 1
        if found:
            return [(channels[level], level)] * found
    return []


def _shape(config: Mapping[str, Any]) -> Shape:
    """Layers of transformers, and convolutions of 3 x 3 beside them.

    What a config leaves out has the default of diffusers' class, as for Stable Diffusion 1.
    """
    channels = [int(it) for it in config["block_out_channels"]]
    count = len(channels)
    # `attention_head_dim` holds the numbers of heads, by a mistake that diffusers has kept.
    heads = _each(config.get("attention_head_dim", 8), count)
    resnets = _each(config.get("layers_per_block", 2), count)
    depths = _each(config.get("transformer_layers_per_block", 1), count)
    down, up = _crossed(config)
    layers: list[LayerShape] = []
    ends = config.get("in_channels", 4) + config.get("out_channels", 4)
    rest = Counter({0: 9 * channels[0] * ends})

    def attend(level: int, depth: int) -> None:
        width = channels[level]
        layer = transformer_layer(
            heads[level], width // heads[level], 6 * width, cross_attention=True
        )
        layers.extend([replace(layer, halvings=level)] * depth)
        rest[level] += 2 * width**2

    def convolve(level: int, given: int) -> None:
        width = channels[level]
        rest[level] += 9 * (given + width) * width + (given != width) * given * width

    skips, width = [channels[0]], channels[0]
    for level in range(count):
        for depth in _each(depths[level], resnets[level]):
            convolve(level, width)
            width = channels[level]
            skips.append(width)
            if down[level]:
                attend(level, depth)
        if level < count - 1:
            rest[level + 1] += 9 * width**2
            skips.append(width)
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        convolve(count - 1, width)
        convolve(count - 1, width)
        attend(count - 1, _each(depths[-1], 1)[0])
    told = config.get("reverse_transformer_layers_per_block")
    depths = depths if told is None else list(reversed(told))
    for level in reversed(range(count)):
        for depth in _each(depths[level], resnets[level] + 1):
            convolve(level, width + skips.pop())
            width = channels[level]
            if up[count - 1 - level]:
                attend(level, depth)
        if level:
            rest[level - 1] += 9 * width**2
    return Shape(tuple(layers), rest=tuple(sorted(rest.items())))


UNET = Family(
    "UNet2DConditionModel",
    _attentions,
    _grid,
    _shape,
    dispatches=False,
    latents="sample",
)
