"""The parts of `kinora-tiny`, fresh and untrained, and their assembly into a `WanPipeline`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ..world.grammar import words

LATENT_CHANNELS = 16
SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4
TEXT_WIDTH = 128
TEXT_LENGTH = 64
"""Tokens that Kinora pads a caption to; the longest caption of the world has 44."""

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"

DENOISER: dict[str, Any] = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 10,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
AUTOENCODER: dict[str, Any] = {
    "base_dim": 48,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],  # diffusers' spelling
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": SPATIAL_FACTOR,
    "scale_factor_temporal": TEMPORAL_FACTOR,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}
TEXT_ENCODER: dict[str, Any] = {
    "d_model": TEXT_WIDTH,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the world; unknown words become `<unk>`, the end is marked."""
    vocabulary = {word: i for i, word in enumerate((PAD, END, UNKNOWN, *words()))}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    core.normalizer = Lowercase()
    core.pre_tokenizer = Sequence([Whitespace(), Punctuation()])
    core.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def new_text_encoder(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> UMT5EncoderModel:
    """An untrained text encoder for `tokenizer`."""
    config = UMT5Config(vocab_size=len(tokenizer), pad_token_id=0, **(TEXT_ENCODER | changes))
    return UMT5EncoderModel(config)


def new_autoencoder(**changes: Any) -> AutoencoderKLWan:
    """An untrained video autoencoder; it works on 2 x 2 pixels a site, as Wan 2.2's does."""
    return AutoencoderKLWan(**(AUTOENCODER | changes))


def new_denoiser(**changes: Any) -> WanTransformer3DModel:
    """An untrained denoiser of `LATENT_CHANNELS` latents, one token a latent site."""
    return WanTransformer3DModel(**(DENOISER | changes))


def assemble(
    *,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    autoencoder: AutoencoderKLWan,
    denoiser: WanTransformer3DModel,
    flow_shift: float = 6.0,
) -> WanPipeline:
    """The stock pipeline of these parts."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )
    return WanPipeline(
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder=text_encoder,
        vae=autoencoder,
        transformer=denoiser,
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
    )


def tokenise(
    captions: list[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their mask, both `[B, longest]`."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def encode_tokens(
    tokens: torch.Tensor,
    mask: torch.Tensor,
    text_encoder: UMT5EncoderModel,
    length: int = TEXT_LENGTH,
) -> torch.Tensor:
    """Caption states as `WanPipeline` makes them: zeros after the last token.

    Returns:
        `[B, length, TEXT_WIDTH]` in the encoder's dtype.
    """
    states = text_encoder(tokens, mask).last_hidden_state * mask[..., None]
    return torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
