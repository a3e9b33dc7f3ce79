"""The parts of kinora-tiny fit each other and the stock pipeline."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kinora.pipelines.tiny.architecture import (
    TEXT_LENGTH,
    UNKNOWN,
    assemble,
    encode_tokens,
    new_autoencoder,
    new_denoiser,
    new_text_encoder,
    new_tokenizer,
    tokenise,
)
from kinora.pipelines.world.grammar import phrase, words
from kinora.pipelines.world.scene import sample_description


def test_every_word_has_its_token():
    tokenizer = new_tokenizer()
    tokens = tokenizer(" ".join(words())).input_ids
    assert len(set(tokens)) == len(words()) + 1  # and the end
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.convert_ids_to_tokens(tokenizer("a mauve circle").input_ids)[1] == UNKNOWN


def test_captions_fit_the_text_length():
    tokenizer, rng = new_tokenizer(), random.Random(0)
    lengths = {
        len(tokenizer(phrase(sample_description(rng, things=2), rng)).input_ids)
        for _ in range(3000)
    }
    assert 30 < max(lengths) <= TEXT_LENGTH


def _pipeline() -> Any:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    return assemble(
        tokenizer=tokenizer,
        text_encoder=new_text_encoder(tokenizer).eval(),
        autoencoder=new_autoencoder(base_dim=8).eval(),
        denoiser=new_denoiser(num_layers=1, num_attention_heads=1, attention_head_dim=24).eval(),
    )


@pytest.mark.parametrize("length", [TEXT_LENGTH, 512])
def test_captions_are_encoded_as_the_stock_pipeline_does(length: int):
    pipe = _pipeline()
    captions = ["a red circle", "", "a blue star moving left over a black background"]
    with torch.no_grad():
        ours = encode_tokens(*tokenise(captions, pipe.tokenizer), pipe.text_encoder, length)
        stock = pipe._get_t5_prompt_embeds(captions, max_sequence_length=length)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 256), (33, 2304)])
def test_tokens_at_128(frames: int, tokens: int):
    pipe, seen = _pipeline(), []
    pipe.transformer.blocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a red circle",
        height=128,
        width=128,
        num_frames=frames,
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
    )
    assert seen == [tokens]
    assert made.frames.shape == (1, 16, 1 + (frames - 1) // 4, 16, 16)
