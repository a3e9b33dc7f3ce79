"""Train the autoencoder of `kinora-tiny`.

    python -m kinora.pipelines.tiny.train.autoencoder --out runs/vae --minutes 8

Loss: L1 and squared error of the pixels, and a pull of every latent channel towards mean 0 and
variance 1. The latents carry noise of a fixed size while training, which replaces the KL term: the
decoder learns to read latents that a denoiser gets slightly wrong, and no channel can collapse.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from ..architecture import new_autoencoder
from .clips import Clip, draw, sample_clips
from .session import Average, Session, arguments, trapezoid
from .whole_clip import decode, encode, fuse_norms, whole_clip

LATENT_NOISE = 0.1
BATCHES: tuple[tuple[Clip, int, float], ...] = (
    (Clip(17, 128, 128), 32, 0.5),
    (Clip(33, 128, 128), 16, 0.2),
    (Clip(17, 256, 256), 8, 0.2),
    (Clip(9, 96, 160), 64, 0.1),
)
"""Clips, batch size, share of the steps; a batch holds about half a million latent-free pixels."""
SMALL_BATCHES = ((Clip(5, 32, 32), 2, 1.0),)
SMALL: dict[str, Any] = {"base_dim": 8}


def reconstruction_loss(video: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """L1 + 4 MSE over pixels in -1 to 1."""
    error = output.float() - video
    return error.abs().mean() + 4 * error.square().mean()


def channel_loss(latents: torch.Tensor) -> torch.Tensor:
    """Distance of each channel's statistics over the batch from mean 0, standard deviation 1."""
    deviation, mean = torch.std_mean(latents.float(), dim=(0, 2, 3, 4))
    return mean.square().mean() + (deviation - 1).square().mean()


def psnr_db(video: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Mean over clips of the PSNR in decibels, pixels in -1 to 1 clamped as on display."""
    error = (output.float().clamp(-1, 1) - video).square().mean(dim=(1, 2, 3, 4)) / 4
    return -10 * error.log10().mean()


def main(argv: list[str] | None = None) -> None:
    parser = arguments("Train the autoencoder of kinora-tiny.")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="with --init: leave the latents as they are, so that a denoiser stays valid",
    )
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    device, cuda = torch.device(options.device), options.device.startswith("cuda")
    model = new_autoencoder(**(SMALL if options.small else {}))
    if options.init:
        model = AutoencoderKLWan.from_pretrained(options.init, dtype=torch.float32)
    nn.Module.to(whole_clip(model), device)
    if cuda:
        torch.backends.cudnn.benchmark = True
        fuse_norms(model)
    # A constant posterior deviation, the training noise, is what the stock model reports.
    _fix_posterior(model)
    if options.decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    average = Average(model)
    optimizer = torch.optim.AdamW(
        list(average.source.values()), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda
    )
    batches = SMALL_BATCHES if options.small else BATCHES
    session = Session(
        options.out,
        options.minutes,
        {"model": model, "optimizer": optimizer, "average": average},
        log_steps=5 if options.small else 50,
    )
    for progress in session:
        rng = random.Random(f"{options.seed}/{session.step}")
        clip, size, _ = rng.choices(batches, [share for _, _, share in batches])[0]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * trapezoid(progress)
        video = draw(sample_clips(rng, clip, size), clip, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            latents = encode(model, video)
            noisy = latents + LATENT_NOISE * torch.randn_like(latents)
            output = decode(model, noisy)
        pixels, channels = reconstruction_loss(video, output), channel_loss(latents)
        (pixels + 0.1 * channels).backward()
        norm = nn.utils.clip_grad_norm_(list(average.source.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        with torch.no_grad():
            scores = {"pixels": pixels, "channels": channels, "norm": norm}
            session.log(scores | {"psnr": psnr_db(video, output)})
    average.copy_to_source()
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    model.save_pretrained(options.out / "vae")


def _fix_posterior(model: AutoencoderKLWan) -> None:
    conv = model.quant_conv
    half = conv.out_channels // 2
    with torch.no_grad():
        conv.weight[half:] = 0
        assert conv.bias is not None
        conv.bias[half:] = 2 * torch.log(torch.tensor(LATENT_NOISE))
    # The loss never reads that half, so its gradient is zero and it stays as set here.


if __name__ == "__main__":
    main()
