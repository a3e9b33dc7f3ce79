"""Train the autoencoder of `kinora-tiny`.

    python -m kinora.pipelines.tiny.train.autoencoder --out runs/vae --minutes 8

Clips are crowded: a scene of the world fills a twentieth of the frame and the rest teaches little,
so the objects of three other scenes are laid over each. Loss: L1 and squared error of the pixels,
and a pull of every latent channel towards mean 0 and variance 1. The latents carry noise of a fixed
size while training, which replaces the KL term: the decoder learns to read latents that a denoiser
gets slightly wrong, and no channel can collapse.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from ..architecture import new_autoencoder
from .clips import Clip, crowd, sample_clips
from .muon import muon_and_adamw, set_learning_rate, take_step
from .session import Average, Session, arguments, settings, trapezoid
from .whole_clip import channels_last, decode, encode, whole_clip

LATENT_NOISE = 0.1
LEARNING_RATE = 2.5e-3
BATCHES: tuple[tuple[Clip, int, float], ...] = (
    (Clip(17, 128, 128), 16, 0.45),
    (Clip(33, 128, 128), 8, 0.3),
    (Clip(17, 256, 256), 4, 0.25),
)
"""Clips, batch size, share of the steps; a batch holds four million pixels."""
DRAWN_TOGETHER = 8
"""Batches a call of the renderer; its launches then cost little beside a training step."""
SMALL_BATCHES = ((Clip(5, 32, 32), 2, 1.0),)
SMALL: dict[str, Any] = {"base_dim": 8}


def reconstruction_loss(video: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """L1 + 8 MSE over pixels in -1 to 1."""
    error = output.float() - video
    return error.abs().mean() + 8 * error.square().mean()


def channel_loss(latents: torch.Tensor) -> torch.Tensor:
    """Distance of each channel's statistics over the batch from mean 0, standard deviation 1."""
    deviation, mean = torch.std_mean(latents.float(), dim=(0, 2, 3, 4))
    return mean.square().mean() + (deviation - 1).square().mean()


def is_inner_filter(name: str, parameter: nn.Parameter) -> bool:
    """Convolutions between the first and the last one of each half, which Muon trains."""
    ends = ("conv_in.", "conv_out.", "quant_conv.")
    return parameter.ndim >= 4 and name.endswith("weight") and not any(it in name for it in ends)


def videos(
    batches: Sequence[tuple[Clip, int, float]], session: Session, seed: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """A batch for each step of `session`, `[B, 3, frames, height, width]` in -1 to 1."""
    drawn: dict[Clip, list[torch.Tensor]] = {clip: [] for clip, _, _ in batches}
    while True:
        rng = random.Random(f"{seed}/{session.step}")
        clip, size, _ = rng.choices(batches, [share for _, _, share in batches])[0]
        if not drawn[clip]:
            scenes = sample_clips(rng, clip, size * DRAWN_TOGETHER)
            drawn[clip] = list(crowd(scenes, clip, device).split(size))
        yield drawn[clip].pop()


def psnr_db(video: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Mean over clips of the PSNR in decibels, pixels in -1 to 1 clamped as on display."""
    error = (output.float().clamp(-1, 1) - video).square().mean(dim=(1, 2, 3, 4)) / 4
    return -10 * error.log10().mean()


def main(argv: list[str] | None = None) -> None:
    parser = arguments("Train the autoencoder of kinora-tiny.", LEARNING_RATE)
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="with --init: leave the encoder as it is, so that a denoiser stays valid",
    )
    options = parser.parse_args(argv)
    if options.decoder_only and not options.init:
        parser.error("--decoder-only needs --init: an untrained encoder is not worth decoding")
    torch.manual_seed(options.seed)
    device, cuda = torch.device(options.device), options.device.startswith("cuda")
    model = new_autoencoder(**(SMALL if options.small else {}))
    if options.init:
        model = AutoencoderKLWan.from_pretrained(options.init, dtype=torch.float32)
    nn.Module.to(whole_clip(model), device)
    if cuda:
        channels_last(model)
    # A constant posterior deviation, the training noise, is what the stock model reports.
    _fix_posterior(model)
    if options.decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    average = Average(model)
    optimizers = muon_and_adamw(model, is_inner_filter, options.learning_rate)
    batches = SMALL_BATCHES if options.small else BATCHES
    session = Session(
        options.out,
        options.minutes,
        {
            "model": model,
            "average": average,
            **{f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)},
        },
        settings(options, batches=batches),
        log_steps=5 if options.small else 50,
    )
    for progress, video in zip(
        session, videos(batches, session, options.seed, device), strict=False
    ):
        set_learning_rate(optimizers, options.learning_rate * trapezoid(progress))
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            latents = encode(model, video)
            noisy = latents + LATENT_NOISE * torch.randn_like(latents)
            output = decode(model, noisy)
        pixels, channels = reconstruction_loss(video, output), channel_loss(latents)
        (pixels + 0.1 * channels).backward()
        norm = nn.utils.clip_grad_norm_(list(average.source.values()), 1.0)
        take_step(optimizers)
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
