"""`AutoencoderKLWan` on a whole clip at once, for training.

The stock model walks through a clip chunk by chunk, carrying the last frames of every causal
convolution along; on short clips a GPU then waits for launches. Its layers are causal, so one pass
over the whole clip gives the same numbers, once the two kinds of resampling in time treat the first
frame as the first chunk: it is neither averaged with others nor doubled.
"""

from __future__ import annotations

from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from torch import nn
from torch.nn import functional as F


def whole_clip(autoencoder: AutoencoderKLWan) -> AutoencoderKLWan:
    """Let the layers of `autoencoder` resample whole clips, for `encode` and `decode` below.

    The model must not be used through its own `encode` and `decode` any more; its weights are the
    stock ones. Works for the residual kind (`is_residual=True`) and the plain one.
    """
    for module in autoencoder.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(_resample, module)
    return autoencoder


def channels_last(autoencoder: AutoencoderKLWan) -> None:
    """Channels innermost, as tensor cores want them, and a norm for that: twice as fast on a GPU.

    `WanRMS_norm` is a handful of passes over memory; on channels that lie side by side it is one
    call of torch's RMS norm. Same numbers to rounding.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, WanRMS_norm):
            module.forward = MethodType(_rms_norm, module)


def encode(autoencoder: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Means of the posterior.

    Args:
        video: `[B, 3, 1 + 4n, height, width]` in -1 to 1.

    Returns:
        `[B, z, 1 + n, height / 8, width / 8]`.
    """
    states = autoencoder.encoder(patchify(video, autoencoder.config["patch_size"] or 1))
    return autoencoder.quant_conv(states).chunk(2, dim=1)[0]


def decode(autoencoder: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The reverse of `encode`, not clamped."""
    states = autoencoder.decoder(autoencoder.post_quant_conv(latents), first_chunk=True)
    return unpatchify(states, autoencoder.config["patch_size"] or 1)


def _rms_norm(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    """`WanRMS_norm.forward` with channels innermost; x `[B, C, …]`."""
    with torch.autocast(x.device.type, enabled=False):  # which would make it float32
        weight = self.gamma.flatten().to(x.dtype)
        normed = F.rms_norm(x.movedim(1, -1), (x.shape[1],), weight, eps=1e-12)
    return normed.movedim(-1, 1)


def _resample(self: WanResample, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """`WanResample.forward` for a whole clip `[B, C, F, height, width]`."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        first, rest = x[:, :, :1], x[:, :, 1:]
        pairs = self.time_conv(rest).unflatten(1, (2, -1))
        x = torch.cat([first, pairs.movedim(1, 3).flatten(2, 3)], dim=2)
    frames = x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1))
    x = x.unflatten(0, (-1, frames)).transpose(1, 2)
    if self.mode == "downsample3d" and frames > 1:
        conv = self.time_conv
        later = F.conv3d(x, conv.weight, conv.bias, stride=conv.stride)
        x = torch.cat([x[:, :, :1], later], dim=2)
    return x
