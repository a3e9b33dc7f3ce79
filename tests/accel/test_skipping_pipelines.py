"""Recipes in diffusers' own pipelines, with each way of guidance that these have."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.attach.schedulers import schedule_of
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import TopBlocks
from kinora.accel.policies import Pattern
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site

from .sampling import spied

Build = Callable[[str], Any]
Made = tuple[Any, dict[str, Any]]
LETTERS = "CCCCsCsCsCsCsCCC"


def library() -> Any:
    """diffusers, untyped: its annotations do not allow what it documents."""
    return importlib.import_module("diffusers")


def texts(length: int, mask: str = "", dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """A prompt and another one for guidance, as if encoded."""
    encoded = torch.randn(1, length, 16)
    found = {"prompt_embeds": encoded, "negative_prompt_embeds": encoded / 2}
    if mask:
        whole = torch.ones(1, length, dtype=dtype)
        found |= {f"prompt_{mask}": whole, f"negative_prompt_{mask}": whole}
    return found


def pooled() -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": torch.randn(1, 8),
        "negative_pooled_prompt_embeds": torch.randn(1, 8),
    }


def stable_diffusion(build: Build, vae: Any) -> Made:
    pipe = library().StableDiffusionPipeline(
        vae=vae,
        unet=build("unet").unet,
        scheduler=library().DPMSolverMultistepScheduler(steps_offset=1),
        requires_safety_checker=False,
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
    )
    return pipe, texts(7)


def stable_diffusion_3(build: Build, vae: Any) -> Made:
    """With guidance by skipped layers, a third call in some steps."""
    coders = [f"{it}{n}" for it in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipe = library().StableDiffusion3Pipeline(
        transformer=build("sd3").transformer,
        scheduler=library().FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        **dict.fromkeys(coders),
    )
    return pipe, texts(9) | pooled() | {"skip_guidance_layers": [0]}


def without_coders(name: str, denoiser: Any, *others: str, **options: Any) -> Any:
    return getattr(library(), name)(
        transformer=denoiser,
        scheduler=library().FlowMatchEulerDiscreteScheduler(**options),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", *others)),
    )


def ltx(build: Build, vae: Any) -> Made:
    del vae
    pipe = without_coders("LTXPipeline", build("ltx").transformer)
    return pipe, texts(6, "attention_mask") | {"num_frames": 9}


def hunyuan(build: Build, vae: Any) -> Made:
    """Guidance in calls of its own, beside that which is distilled."""
    del vae
    denoiser = build("hunyuan").transformer
    pipe = without_coders("HunyuanVideoPipeline", denoiser, "text_encoder_2", "tokenizer_2")
    given = texts(8, "attention_mask") | pooled()
    return pipe, given | {"num_frames": 9, "true_cfg_scale": 3.0}


def mochi(build: Build, vae: Any) -> Made:
    """Its levels go up."""
    del vae
    pipe = without_coders("MochiPipeline", build("mochi").transformer, invert_sigmas=True)
    return pipe, texts(8, "attention_mask", torch.bool) | {"num_frames": 7}


def qwen(build: Build, vae: Any) -> Made:
    del vae
    pipe = without_coders("QwenImagePipeline", build("qwen").transformer)
    return pipe, texts(9, "embeds_mask") | {"true_cfg_scale": 3.0}


def music(build: Build, vae: Any) -> Made:
    """MusicLDM: a UNet that is told the text by its class embedding."""
    del build, vae
    import transformers

    lib = library()
    unet = lib.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
        norm_num_groups=4,
        attention_head_dim=2,
    )
    config = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        normalize_before=False,
    )
    coder: Any = torch.nn.Module()
    coder.device, coder.dtype, coder.text_model = torch.device("cpu"), torch.float32, coder
    pipe = lib.MusicLDMPipeline(
        vae=lib.AutoencoderKL(block_out_channels=(8, 8), in_channels=1, norm_num_groups=4,
                              down_block_types=("DownEncoderBlock2D",) * 2, out_channels=1,
                              up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=coder,
        tokenizer=None,
        feature_extractor=None,
        unet=unet.eval(),
        scheduler=lib.DDIMScheduler(steps_offset=1, clip_sample=False),
        vocoder=transformers.SpeechT5HifiGan(config).eval(),
    )  # fmt: skip
    text = torch.randn(1, 16)
    return pipe, {
        "prompt_embeds": text,
        "negative_prompt_embeds": text / 2,
        "audio_length_in_s": 0.05,
    }


def test_a_pipeline_that_steps_a_part_of_its_latents_is_refused_at_once(build: Build):
    """LTX from an image: the first frame stays, which no scheduler sees."""
    pipe = without_coders("LTXImageToVideoPipeline", build("ltx").transformer)
    pipe.set_progress_bar_config(disable=True)
    latents, steps = torch.randn(1, 8, 4), list[int]()
    with (
        accelerate(pipe, Recipe(steps=Pattern())),
        pytest.raises(AccelerationError, match="of which its pipeline makes"),
    ):
        pipe(
            **texts(6, "attention_mask"),
            latents=latents,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=16,
            output_type="latent",
            callback_on_step_end=lambda *it: steps.append(it[1]) or it[3],
        )
    assert not steps


PIPELINES = (stable_diffusion, stable_diffusion_3, ltx, hunyuan, mochi, qwen, music)


@pytest.mark.parametrize("make", PIPELINES, ids=lambda it: it.__name__)
def test_its_scheduler_gets_what_is_foretold(
    make: Callable[[Build, Any], Made], build: Build, model_folders: dict[str, Path]
):
    """Of x0s on a line in the noise level: the second difference of three around a skip is none."""
    vae = library().AutoencoderKL.from_pretrained(model_folders["sdxl"] / "vae")
    pipe, given = make(build, vae)
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        fixed: dict[str, Any] = {"num_inference_steps": 16, "output_type": "latent"}
        if make is not music:
            fixed |= {"height": 64, "width": 64}
        return pipe(generator=torch.Generator().manual_seed(0), **fixed, **given)[0]

    full = run()
    with spied(pipe.scheduler) as got, accelerate(pipe, Recipe(steps=Pattern())) as session:
        out = run()
        schedule = schedule_of(pipe.scheduler)
    ran = session.receipt.policy
    assert ran is not None and ran.pattern == LETTERS and not ran.raw
    assert len(got) == 16 and out.isfinite().all() and not torch.equal(out, full)
    x0 = [schedule.estimate(m, x, i) for i, (m, x) in enumerate(got)]
    t = [it.share for it in schedule.levels]
    for index in (i for i, letter in enumerate(LETTERS) if letter == "s"):
        a, b = [i for i in range(index) if LETTERS[i] == "C"][-2:]
        line = x0[b] + (x0[b] - x0[a]) * (t[index] - t[b]) / (t[b] - t[a])
        torch.testing.assert_close(x0[index], line, rtol=1e-4, atol=1e-4)


CLIP, IMAGE = TokenGrid(4, 8, 16), TokenGrid(1, 16, 32)
HALVED = {(TokenGrid(1, 32, 64), 0), (IMAGE, 0), (TokenGrid(1, 8, 16), 0)}


@pytest.mark.parametrize(
    ("make", "size", "seen", "calls"),
    [
        (stable_diffusion, (64, 128, 1), HALVED, 30),
        (stable_diffusion_3, (64, 128, 1), {(IMAGE, 9), (IMAGE, 0)}, 9),
        (ltx, (256, 512, 25), {(CLIP, 0)}, 6),
        (hunyuan, (64, 128, 13), {(CLIP, 8)}, 12),
        (mochi, (64, 128, 19), {(CLIP, 8)}, 12),
        (qwen, (256, 512, 1), {(IMAGE, 9)}, 12),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_its_self_attention_is_sparse_and_stock_where_all_is_kept(
    make: Callable[[Build, Any], Made],
    size: tuple[int, int, int],
    seen: set[tuple[TokenGrid, int]],
    calls: int,
    build: Build,
    model_folders: dict[str, Path],
):
    vae = library().AutoencoderKL.from_pretrained(model_folders["sdxl"] / "vae")
    pipe, given = make(build, vae)
    pipe.set_progress_bar_config(disable=True)
    height, width, frames = size
    given |= {"height": height, "width": width} | ({"num_frames": frames} if frames > 1 else {})

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, num_inference_steps=3, output_type="latent", **given)[0]

    told: list[tuple[TokenGrid, int]] = []

    class Spy(TopBlocks):
        """Notes where it is asked."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> Any:
            assert q.shape[2] == site.tokens
            told.append((site.grid, site.text))
            return super().plan(q, k, site)

    stock = run()
    with accelerate(pipe, Recipe(attention=TopBlocks(keep=1.0))):
        assert torch.equal(run(), stock)
    with accelerate(pipe, Recipe(attention=Spy(keep=0.4, tile="64x64"), when="always")) as session:
        out = run()
    ran = session.receipt.attention
    assert ran is not None and set(told) == seen and not ran.fallbacks
    assert sum(ran.kernels.values()) == len(told) == calls and ran.density < 0.9
    assert len(set(ran.layer_names)) == ran.layers == len(ran.density_by_layer)
    assert 1e-7 < (out - stock).norm() / stock.norm() < 0.2
    assert torch.equal(run(), stock)
