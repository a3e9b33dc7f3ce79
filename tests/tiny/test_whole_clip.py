"""One pass over a clip equals the stock autoencoder's walk through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinora.pipelines.tiny.architecture import new_autoencoder
from kinora.pipelines.tiny.train.whole_clip import channels_last, decode, encode, whole_clip

RESIDUAL: dict[str, Any] = {"base_dim": 8}
PLAIN: dict[str, Any] = {
    "base_dim": 4,
    "dim_mult": [1, 2, 2, 4],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "patch_size": None,
    "in_channels": 3,
    "out_channels": 3,
}


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("kind", [RESIDUAL, PLAIN], ids=["residual", "plain"])
def test_equals_the_stock_walk(kind: dict[str, Any], frames: int):
    torch.manual_seed(frames)
    stock: Any = new_autoencoder(**kind).double().eval()
    ours = new_autoencoder(**kind).double().eval()
    ours.load_state_dict(stock.state_dict())
    whole_clip(ours)
    video = torch.rand(2, 3, frames, 32, 48, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latents = stock.encode(video).latent_dist.mode()
        torch.testing.assert_close(encode(ours, video), latents, rtol=1e-10, atol=1e-12)
        decoded = stock.decode(latents).sample
        assert decoded.shape == video.shape
        ours_decoded = decode(ours, latents).clamp(-1, 1)
        torch.testing.assert_close(ours_decoded, decoded, rtol=1e-10, atol=1e-12)


def test_later_frames_change_nothing_before_them():
    torch.manual_seed(0)
    model = whole_clip(new_autoencoder(**RESIDUAL).double().eval())
    video = torch.rand(1, 3, 9, 32, 32, dtype=torch.float64)
    changed = video.clone()
    changed[:, :, 5:] = 0
    with torch.no_grad():
        before, after = encode(model, video), encode(model, changed)
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2])
    assert (before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-6


def test_gradients_reach_every_weight_that_is_used():
    model = whole_clip(new_autoencoder(**RESIDUAL))
    decode(model, encode(model, torch.rand(1, 3, 5, 32, 32))).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


def test_channels_last_changes_nothing_but_rounding():
    torch.manual_seed(0)
    plain = whole_clip(new_autoencoder(**RESIDUAL).eval())
    fast = whole_clip(new_autoencoder(**RESIDUAL).eval())
    fast.load_state_dict(plain.state_dict())
    channels_last(fast)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = encode(plain, video)
        torch.testing.assert_close(encode(fast, video), latents, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            decode(fast, latents), decode(plain, latents), rtol=1e-3, atol=1e-4
        )
