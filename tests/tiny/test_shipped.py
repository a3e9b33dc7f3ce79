"""The weights that are shipped: whole, small, safe, and loaded by stock diffusers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from kinora.pipelines.tiny import WEIGHTS
from kinora.pipelines.tiny.architecture import DENOISER, TEXT_LENGTH
from kinora.pipelines.tiny.train.export import LIMIT_BYTES
from kinora.pipelines.world.grammar import words
from kinora.pipelines.world.palette import COLOURS


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = WanPipeline.from_pretrained(WEIGHTS)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_size_and_kinds_of_files():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_the_parts_are_stock_classes():
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    parts = {name: part[1] for name, part in index.items() if isinstance(part, list) and part[0]}
    assert index["_class_name"] == "WanPipeline"
    assert parts == {
        "scheduler": "UniPCMultistepScheduler",
        "text_encoder": "UMT5EncoderModel",
        "tokenizer": "TokenizersBackend",
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
    }


def test_the_weights_are_of_this_architecture(pipe: Any):
    config = {name: pipe.transformer.config[name] for name in DENOISER}
    assert config | {"patch_size": tuple(config["patch_size"])} == DENOISER
    assert pipe.vae.config["scale_factor_spatial"] == 8
    assert pipe.vae.config["scale_factor_temporal"] == 4
    assert all(value > 0.1 for value in pipe.vae.config["latents_std"])


def test_it_loads_in_single_precision(pipe: Any):
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert {next(part.parameters()).dtype for part in parts} == {torch.float32}


def test_it_knows_the_words_of_the_world(pipe: Any):
    tokens = pipe.tokenizer(" ".join(words())).input_ids
    assert pipe.tokenizer.unk_token_id not in tokens


def _made(pipe: Any, prompt: str, width: int, height: int, frames: int, steps: int) -> Any:
    """`[frames, 3, height, width]` in 0 to 1."""
    result = pipe(
        prompt,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return result.frames[0]


def test_a_clip_of_any_size_is_finite_and_repeatable(pipe: Any):
    prompt = "a red circle moving left over a black background"
    video = _made(pipe, prompt, 64, 96, 5, steps=2)
    assert video.shape == (5, 3, 96, 64)
    assert torch.isfinite(video).all()
    assert torch.equal(video, _made(pipe, prompt, 64, 96, 5, steps=2))


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_it_paints_the_colour_that_it_is_asked_for(pipe: Any, colour: str):
    image = _made(pipe, f"a {colour} square over a black background", 128, 128, 1, steps=8)[0]
    asked = torch.tensor(COLOURS[colour])[:, None, None] / 255
    of_that_colour = ((image - asked).abs().amax(dim=0) < 0.15).float().mean()
    dark = (image.amax(dim=0) < 0.15).float().mean()
    assert 0.02 < of_that_colour < 0.4  # radius 0.11 to 0.19 of the side
    assert dark > 0.5
