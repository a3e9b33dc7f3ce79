"""Attention of the Wan denoiser for training."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch.nn import functional as F


class TrainingAttention(WanAttnProcessor):
    """The stock attention with the rotary embedding as a product with a constant matrix.

    The stock one writes even and odd channels in turn, which torch's compiler makes a slow kernel
    of: 28 % of a training step on an H200 (torch 2.11). Same numbers to rounding. For text to video
    alone; no mask.
    """

    def __init__(self, head_dim: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.turn = quarter_turn(head_dim, device)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`[B, N, C]` to `[B, N, C]`; arguments as of the stock processor."""
        assert attention_mask is None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query = attn.norm_q(query).to(value.dtype).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).to(value.dtype).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = self.rotate(query, *rotary_emb), self.rotate(key, *rotary_emb)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2, 3)))

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`[B, N, heads, D]` likewise; `cos` and `sin` are `[1, N, 1, D]`, equal in pairs."""
        turned = states @ self.turn.to(states.dtype)
        return (states * cos + turned * sin).to(states.dtype)


def quarter_turn(channels: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[channels, channels]` float32: takes every pair (a, b) of channels to (-b, a)."""
    pair = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], device=device)
    return torch.block_diag(*[pair] * (channels // 2))
