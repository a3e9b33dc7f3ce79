"""`AutoencoderKLWan` on a whole clip at once, for training.

The stock model walks through a clip chunk by chunk, carrying the last frames of every causal
convolution along; on short clips a GPU then waits for launches. Its layers are causal, so one pass
over the whole clip gives the same numbers, once the two kinds of resampling in time treat the first
frame as the first chunk: it is neither averaged with others nor doubled.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
    WanUpsample,
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


def copy_statistics(source: AutoencoderKLWan, target: AutoencoderKLWan) -> None:
    """Give `target` the recorded mean and deviation of the latents of `source`.

    Raises:
        ValueError: their encoders differ, so that a denoiser for one is wrong for the other.
    """
    theirs = target.state_dict()
    for name, value in source.state_dict().items():
        if name.startswith(("encoder.", "quant_conv.")) and not (
            name in theirs
            and theirs[name].shape == value.shape
            and torch.allclose(theirs[name], value, rtol=1e-2, atol=1e-3)  # one may be rounded
        ):
            raise ValueError(
                f"the autoencoders differ in {name}: the other one makes other latents, which the "
                "denoiser does not know; train it with --decoder-only"
            )
    names = ("latents_mean", "latents_std")
    target.register_to_config(**{name: source.config[name] for name in names})


def channels_last(autoencoder: AutoencoderKLWan) -> None:
    """Channels innermost, as tensor cores want them, and layers that keep them there.

    Same numbers to rounding. A norm is one call of torch's RMS norm instead of a handful of passes
    over memory; convolutions pad in space themselves; repeating works in the dtype it is given.
    """
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
        if isinstance(module, WanRMS_norm):
            module.forward = MethodType(_rms_norm, module)
        elif isinstance(module, WanCausalConv3d):
            module.forward = MethodType(_causal_conv, module)
        elif isinstance(module, DupUp3D) and module.in_channels == module.out_channels:
            module.forward = MethodType(_repeat, module)
        elif isinstance(module, WanUpsample):
            module.forward = MethodType(nn.Upsample.forward, module)


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


def _causal_conv(self: WanCausalConv3d, x: torch.Tensor, cache_x: None = None) -> torch.Tensor:
    """`WanCausalConv3d.forward` without a cache; x `[B, C, F, height, width]`."""
    padding: Any = self._padding  # pyright: ignore[reportPrivateUsage]
    width, _, height, _, earlier, _ = padding
    if earlier:
        x = F.pad(x, (0, 0, 0, 0, earlier, 0))
    return F.conv3d(x, self.weight, self.bias, self.stride, (0, height, width))


def _repeat(self: DupUp3D, x: torch.Tensor, first_chunk: bool = False) -> torch.Tensor:
    """`DupUp3D.forward` for as many channels out as in: every value fills a small box."""
    x = x.permute(0, 2, 3, 4, 1)
    batch, frames, height, width, channels = x.shape
    t, s = self.factor_t, self.factor_s
    box = (batch, frames, t, height, s, width, s, channels)
    x = x[:, :, None, :, None, :, None].expand(box)
    x = x.reshape(batch, frames * t, height * s, width * s, channels)
    return (x[:, t - 1 :] if first_chunk else x).permute(0, 4, 1, 2, 3)


def _resample(self: WanResample, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """`WanResample.forward` for a whole clip `[B, C, F, height, width]`."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        pairs = self.time_conv(x[:, :, 1:]).permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1))
        later = pairs.movedim(-2, 2).flatten(1, 2)
        x = torch.cat([x[:, :, :1].permute(0, 2, 3, 4, 1), later], dim=1).permute(0, 4, 1, 2, 3)
    frames = x.shape[2]
    x = self.resample(x.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2))
    x = x.permute(0, 2, 3, 1).unflatten(0, (-1, frames)).permute(0, 4, 1, 2, 3)
    if self.mode == "downsample3d" and frames > 1:
        conv = self.time_conv
        later = F.conv3d(x, conv.weight, conv.bias, stride=conv.stride)
        x = torch.cat([x[:, :, :1], later], dim=2)
    return x
