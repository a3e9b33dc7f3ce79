"""UNets: a grid for each layer, cross-attention left alone, and sparse only where it pays."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kinora.accel.attach import accelerate
from kinora.accel.attach.families import FAMILIES
from kinora.accel.calibration import Tally
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import SlidingTile, TopBlocks
from kinora.accel.methods.paro import ParoObserver
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site

Build = Callable[[str], Any]
UNET = FAMILIES["UNet2DConditionModel"]


def diffusers() -> Any:
    """The library, untyped."""
    return importlib.import_module("diffusers")


def test_layers_are_told_in_the_order_and_on_the_grid_of_their_features(build: Build) -> None:
    model = build("unet")
    seen: list[tuple[int, TokenGrid, int]] = []
    features: list[tuple[str, TokenGrid]] = []

    class Spy(TopBlocks):
        """Notes its sites."""

        def predict(self, site: Site) -> float:
            seen.append((site.layer, site.grid, site.layers))
            return 1.0

    for name, module in model.unet.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            module.register_forward_pre_hook(
                lambda it, args, name=name: features.extend(
                    (f"{name}.transformer_blocks.{i}", TokenGrid(1, *args[0].shape[2:]))
                    for i in range(len(it.transformer_blocks))
                )
            )
    with accelerate(model, Recipe(attention=Spy())) as session:
        model(steps=1)
    assert [grid for _, grid, _ in seen] == [grid for _, grid in features]
    assert {str(grid) for _, grid, _ in seen} == {"1×32×64", "1×16×32", "1×8×16"}
    assert [(layer, layers) for layer, _, layers in seen] == [(i, 10) for i in range(10)]
    ran = session.receipt.attention
    assert ran is not None
    assert ran.layer_names == [f"unet.{name}.attn1" for name, _ in features]


def test_sizes_that_do_not_halve_evenly_are_followed(build: Build) -> None:
    model = build("unet")
    model.latents = (1, 4, 26, 38)
    with accelerate(model, Recipe(attention=TopBlocks(tile="64x64"), when="always")) as session:
        model(steps=1)
    ran = session.receipt.attention
    assert ran is not None and ran.kernels and not ran.fallbacks


def test_layers_with_few_tokens_stay_dense_and_say_why(build: Build) -> None:
    model = build("unet")
    with accelerate(model, Recipe(attention=TopBlocks(keep=0.3, tail="none"))) as session:
        model(steps=2)
    ran = session.receipt.attention
    assert ran is not None and ran.kernels
    levels = [it.halvings for it in UNET.attentions(model.unet) if it.sees == "picture"]
    dense = [density == 1 for density in ran.density_by_layer]
    assert dense == [level > 0 for level in levels]
    (slow,) = ran.fallbacks
    assert "predicted to take" in slow and "at 512 tokens" in slow
    assert ran.dense == {
        slow: 2 * levels.count(1),
        "because each of 2 tiles is the row's own or has text": 2,
    }


def test_a_loop_of_numbers_that_begins_in_the_middle_is_followed(build: Build) -> None:
    model = build("unet")
    seen: list[int] = []

    class Spy(TopBlocks):
        """Notes its steps."""

        def predict(self, site: Site) -> float:
            seen.append(site.step)
            return 1.0

    x = torch.randn(model.latents)
    with accelerate(model, Recipe(attention=Spy())), torch.no_grad():
        model.scheduler.set_timesteps(10)
        for t in model.scheduler.timesteps[5:7].tolist():
            out = model.unet(x, t, **model.arguments).sample
            x = model.scheduler.step(out, t, x).prev_sample
    assert seen == [5] * 10 + [6] * 10


def test_density_counts_pairs_of_tokens_not_calls(build: Build) -> None:
    model = build("unet")
    with accelerate(
        model, Recipe(attention=TopBlocks(keep=0.2, tile="64x64", tail="none"))
    ) as session:
        model(steps=1)
    ran = session.receipt.attention
    assert ran is not None
    layers = [it for it in UNET.attentions(model.unet) if it.sees == "picture"]
    pairs = [float(4 ** -(2 * it.halvings)) for it in layers]
    densities = [density for density in ran.density_by_layer if density is not None]
    expected = sum(p * d for p, d in zip(pairs, densities, strict=True)) / sum(pairs)
    assert ran.density == pytest.approx(expected, abs=1e-3)
    assert ran.density < sum(densities) / len(densities)


def test_windows_fit_each_grid(build: Build) -> None:
    model = build("sdxl")
    with accelerate(model, Recipe(attention=SlidingTile(), when="always")) as session:
        model()
    ran = session.receipt.attention
    assert ran is not None and not ran.fallbacks


def test_a_unet_without_self_attention_is_refused() -> None:
    class Pipe:
        """As much of a pipeline as is looked at."""

        unet = diffusers().UNet2DConditionModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            mid_block_type=None,
            norm_num_groups=4,
        )

    with (
        pytest.raises(AccelerationError, match="UNet2DConditionModel has no self-attention"),
        accelerate(Pipe(), Recipe(attention=TopBlocks())),
    ):
        pass


def test_paro_cannot_be_calibrated_for_several_grids(build: Build) -> None:
    model = build("unet")
    recipe = Recipe(attention=ParoObserver(Tally(keep=0.5)), when="always")
    told = "layers see different tokens yet: here 1×32×64 and 0 of text, there 1×16×32"
    with pytest.raises(AccelerationError, match=told), accelerate(model, recipe):
        model(steps=1)


def test_an_adapter_that_attends_once_more_is_noticed(build: Build) -> None:
    model = build("unet")

    class Twice:
        """Attends to the text and once more, as an IP adapter does."""

        def __init__(self, stock: Any) -> None:
            self.stock = stock

        def __call__(self, *args: Any, **given: Any) -> torch.Tensor:
            return self.stock(*args, **given) + 0 * self.stock(*args, **given)

    block = model.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn2.processor = Twice(block.attn2.processor)
    with (
        pytest.raises(AccelerationError, match="attends more often than it has layers"),
        accelerate(model, Recipe(attention=TopBlocks(tile="64x64"), when="always")),
    ):
        model(steps=1)


SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 768,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(("config", "side", "layers"), [({}, 64, 16), (SDXL, 128, 70)])
def test_the_cost_of_a_unet_is_what_torch_counts(
    config: dict[str, Any], side: int, layers: int
) -> None:
    """Stable Diffusion 1, which is diffusers' default, and XL, without memory."""
    with torch.device("meta"):
        denoiser = diffusers().UNet2DConditionModel(**{"cross_attention_dim": 768, **config})
        with FlopCounterMode(display=False) as counter:
            denoiser(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, 768))
    told = {"block_out_channels": (320, 640, 1280, 1280), **config}
    shape, grid = UNET.shape(told), TokenGrid(1, side, side)
    own = [it for it in UNET.attentions(denoiser) if it.sees == "picture"]
    modules = dict(denoiser.named_modules())
    assert len(own) == layers
    assert [(it.halvings, modules[it.name].heads) for it in own] == [
        (it.halvings, it.heads) for it in shape.layers
    ]
    assert [modules[it.name].inner_dim for it in own] == [
        it.heads * it.head_dim for it in shape.layers
    ]
    attention = sum(it.attention(grid) for it in shape.layers)
    predicted = 2 * attention / shape.attention_share(grid)
    # Of a text of 77 tokens the prediction counts nothing.
    assert 0.98 < predicted / counter.get_total_flops() < 1
