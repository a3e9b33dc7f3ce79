"""Small denoisers of every family that can be accelerated, each in something that runs like a pipe.

The `Loop`s do what pipelines do to a denoiser and a scheduler, without text encoders.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# The processes of a `Gang` get this too, and import `gang` and `ranked` by it.
sys.path.insert(0, str(Path(__file__).parent))


def diffusers() -> Any:
    """The library, untyped: its annotations do not allow what it documents."""
    return importlib.import_module("diffusers")


@dataclass
class Loop:
    """A denoiser, a scheduler and the denoiser's other arguments."""

    transformer: Any
    """Or None, with a `unet`."""
    scheduler: Any
    latents: tuple[int, ...]
    arguments: dict[str, Any]
    unet: Any = None

    @property
    def denoiser(self) -> Any:
        return self.transformer if self.unet is None else self.unet

    def __call__(self, steps: int = 3, seed: int = 0, callback: Any = None) -> torch.Tensor:
        x = torch.randn(self.latents, generator=torch.Generator().manual_seed(seed))
        name = "hidden_states" if self.unet is None else "sample"
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            given = {name: x, "timestep": t.expand(len(x)), **self.arguments}
            with torch.no_grad():
                out = self.denoiser(**given, return_dict=False)[0]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
            if callback:
                callback(i)
        return x


def euler() -> Any:
    return diffusers().FlowMatchEulerDiscreteScheduler()


def ltx() -> Loop:
    """A grid of 4 x 8 x 16 and cross-attention with a mask."""
    denoiser = diffusers().LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    return Loop(
        denoiser.eval(),
        euler(),
        (1, 512, 4),
        {
            "encoder_hidden_states": torch.randn(1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
            "num_frames": 4,
            "height": 8,
            "width": 16,
        },
    )


def hunyuan(batch: int = 1, words: tuple[int, ...] = (5,)) -> Loop:
    """A grid of 4 x 8 x 16, then 8 tokens of text of which `words` are valid."""
    denoiser = diffusers().HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return Loop(
        denoiser.eval(),
        euler(),
        (batch, 4, 4, 8, 16),
        {
            "encoder_hidden_states": torch.randn(batch, 8, 16),
            "encoder_attention_mask": torch.stack([torch.arange(8) < it for it in words]).long(),
            "pooled_projections": torch.randn(batch, 8),
            "guidance": torch.full((batch,), 1000.0),
        },
    )


def qwen() -> Loop:
    """9 tokens of text, the last two masked, then a grid of 1 x 16 x 32."""
    denoiser = diffusers().QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return Loop(
        denoiser.eval(),
        euler(),
        (1, 512, 4),
        {
            "encoder_hidden_states": torch.randn(1, 9, 16),
            "encoder_hidden_states_mask": torch.arange(9)[None] < 7,
            "img_shapes": [[(1, 16, 32)]],
        },
    )


def mochi(words: tuple[int, ...] = (8, 5)) -> Loop:
    """A grid of 4 x 8 x 16, then 8 tokens of text of which `words` are valid in each item."""
    denoiser = diffusers().MochiTransformer3DModel(
        patch_size=1,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=8,
    )
    # Its rotary embedding begins as nothing.
    torch.nn.init.normal_(denoiser.pos_frequencies)
    batch = len(words)
    return Loop(
        denoiser.eval(),
        euler(),
        (batch, 4, 4, 8, 16),
        {
            "encoder_hidden_states": torch.randn(batch, 8, 16),
            "encoder_attention_mask": torch.stack([torch.arange(8) < it for it in words]),
        },
    )


def sd3() -> Loop:
    """A grid of 1 x 16 x 32, then 9 tokens of text; a layer that sees the image alone."""
    denoiser = diffusers().SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=10,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=20,
        pooled_projection_dim=8,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return Loop(
        denoiser.eval(),
        euler(),
        (1, 4, 32, 64),
        {
            "encoder_hidden_states": torch.randn(1, 9, 16),
            "pooled_projections": torch.randn(1, 8),
        },
    )


def unet() -> Loop:
    """Grids of 32 x 64, 16 x 32 (512 tokens) and 8 x 16 (128), with attention on all of them."""
    unet = diffusers().UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    return Loop(
        None,
        diffusers().DDIMScheduler(),
        (1, 4, 32, 64),
        {"encoder_hidden_states": torch.randn(1, 7, 16)},
        unet.eval(),
    )


@dataclass
class Stock:
    """A stock pipeline and how to run it to its latents."""

    pipe: Any
    arguments: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    @property
    def denoiser(self) -> Any:
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    def __call__(self, steps: int = 3, seed: int = 0, callback: Any = None) -> torch.Tensor:
        def on_step(_pipe: Any, step: int, _t: Any, tensors: Any) -> Any:
            if callback:
                callback(step)
            return tensors

        self.pipe.set_progress_bar_config(disable=True)
        return self.pipe(
            "a red circle",
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=on_step,
            **self.arguments,
        )[0]


SIZES: dict[str, dict[str, int]] = {
    "wan": {"width": 128, "height": 128, "num_frames": 9},
    "cogvideox": {"width": 128, "height": 128, "num_frames": 9},
    "flux": {"width": 64, "height": 64},
    "sdxl": {"width": 128, "height": 64},
}
LOOPS: dict[str, Callable[[], Loop]] = {
    "ltx": ltx,
    "hunyuan": hunyuan,
    "qwen": qwen,
    "mochi": mochi,
    "sd3": sd3,
    "unet": unet,
}


Build = Callable[[str], Any]


@pytest.fixture
def build(model_folders: dict[str, Path]) -> Build:
    """A function that makes a new small model of a family, always the same."""

    def make(family: str) -> Any:
        torch.manual_seed(0)
        if family in LOOPS:
            return LOOPS[family]()
        pipe = diffusers().DiffusionPipeline.from_pretrained(model_folders[family])
        return Stock(pipe, dict(SIZES[family]))

    return make


@pytest.fixture(params=[*SIZES, *LOOPS])
def model(request: pytest.FixtureRequest, build: Build) -> Any:
    """Each family: something with a denoiser and `scheduler`, that runs when called."""
    return build(request.param)
