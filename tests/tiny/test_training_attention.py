"""The denoiser with the attention that training uses equals the stock one."""

from __future__ import annotations

from typing import Any

import torch

from kinora.pipelines.tiny.architecture import LATENT_CHANNELS, TEXT_WIDTH, new_denoiser
from kinora.pipelines.tiny.train.attention import TrainingAttention, quarter_turn


def test_a_quarter_turn():
    states = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert (states @ quarter_turn(4)).tolist() == [-2.0, 1.0, -4.0, 3.0]


def test_equals_the_stock_attention():
    torch.manual_seed(0)
    denoiser = new_denoiser(num_layers=2, num_attention_heads=2, attention_head_dim=24).double()
    latents = torch.randn(2, LATENT_CHANNELS, 3, 4, 6, dtype=torch.float64)
    text = torch.randn(2, 7, TEXT_WIDTH, dtype=torch.float64)
    times = torch.tensor([250.0, 900.0])
    stock = denoiser(latents, times, text, return_dict=False)[0]
    attention: Any = TrainingAttention(24)
    denoiser.set_attn_processor(attention)
    ours = denoiser(latents, times, text, return_dict=False)[0]
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)
    assert ours.abs().max() > 0.1
