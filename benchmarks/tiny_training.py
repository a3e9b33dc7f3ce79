"""Time of a training step of `kinora-tiny` by kind of clip, and how busy it keeps the GPU.

    python benchmarks/tiny_training.py [--part autoencoder|denoiser] [--small]

`busy` is the share of the wall time in which a kernel ran (torch's profiler): where it is far below
1 the GPU waits for Python, and a larger batch costs nothing.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile

from kinora.pipelines.tiny.architecture import (
    LATENT_CHANNELS,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    new_autoencoder,
    new_denoiser,
    new_text_encoder,
    new_tokenizer,
)
from kinora.pipelines.tiny.train import autoencoder, denoiser, lessons
from kinora.pipelines.tiny.train.clips import crowd, sample_clips
from kinora.pipelines.tiny.train.muon import muon_and_adamw, take_step
from kinora.pipelines.tiny.train.whole_clip import channels_last, decode, encode, whole_clip

STEPS = 8


def measure(name: str, clips: int, step: Callable[[], object], device: torch.device) -> None:
    """Print first call, median step, clips a second and busy share of `step`."""
    cuda = device.type == "cuda"

    def timed() -> float:
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first_s = timed()
    timed()
    steps_s = sorted(timed() for _ in range(STEPS))
    busy = ""
    if cuda:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            began = time.perf_counter()
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            wall_us = 1e6 * (time.perf_counter() - began)
        kernels_us = sum(event.device_time_total for event in trace.key_averages())
        busy = f"busy {kernels_us / wall_us:4.2f}"
    median_s = steps_s[len(steps_s) // 2]
    print(
        f"{name:44} first {first_s:6.1f} s, step {1e3 * median_s:7.1f} ms, "
        f"{clips / median_s:7.1f} clips/s {busy}",
        flush=True,
    )


def autoencoder_step(
    model: AutoencoderKLWan, optimizers: list[torch.optim.Optimizer], video: torch.Tensor
) -> None:
    """One step without the drawing."""
    cuda = video.device.type == "cuda"
    with torch.autocast(video.device.type, torch.bfloat16, enabled=cuda):
        output = decode(model, encode(model, video))
    autoencoder.reconstruction_loss(video, output).backward()
    take_step(optimizers)


def denoiser_step(
    loss: Callable[[], torch.Tensor], optimizers: list[torch.optim.Optimizer]
) -> None:
    """One step."""
    loss().backward()
    take_step(optimizers)


def time_autoencoder(device: torch.device, small: bool) -> None:
    """Rendering alone and whole steps, for each kind of clip."""
    model = whole_clip(new_autoencoder(**(autoencoder.SMALL if small else {})))
    torch.nn.Module.to(model, device)
    if device.type == "cuda":
        channels_last(model)
    optimizers = muon_and_adamw(model, autoencoder.is_inner_filter, 1e-3)
    for clip, size, _ in autoencoder.SMALL_BATCHES if small else autoencoder.BATCHES:
        rng = random.Random(0)
        scenes = sample_clips(rng, clip, size)
        measure(f"render {clip} x {size}", size, partial(crowd, scenes, clip, device), device)
        step = partial(autoencoder_step, model, optimizers, crowd(scenes, clip, device))
        measure(f"autoencoder {clip} x {size}", size, step, device)


def time_denoiser(device: torch.device, small: bool) -> None:
    """Whole steps on random latents, for each kind of clip."""
    parts = denoiser.Parts(
        tokenizer=new_tokenizer(),
        text_encoder=new_text_encoder(new_tokenizer()),
        autoencoder=new_autoencoder(**autoencoder.SMALL),
        denoiser=new_denoiser(**(denoiser.SMALL if small else {})),
    )
    for module in (parts.text_encoder, parts.denoiser):
        torch.nn.Module.to(module, device)
    denoiser.speed_up(parts.denoiser, device)
    optimizers = muon_and_adamw(parts.denoiser, denoiser.is_inner_matrix, 1e-3)
    mean = torch.zeros(1, LATENT_CHANNELS, 1, 1, 1, device=device)
    for lesson in lessons.SMALL_LESSONS if small else lessons.LESSONS:
        clip, rng = lesson.clip, random.Random(0)
        shape = (
            (clip.frames - 1) // TEMPORAL_FACTOR + 1,
            clip.height // SPATIAL_FACTOR,
            clip.width // SPATIAL_FACTOR,
        )
        latents = torch.randn(64, LATENT_CHANNELS, *shape, device=device).bfloat16()
        told = [scene.description for scene in sample_clips(rng, clip, 64)]
        batch = lessons.Draws([lesson], {clip: told}, parts.tokenizer, 0)[0, 0].to(device)
        pool = denoiser.Pool(latents, told)
        loss = partial(denoiser.flow_loss, parts, pool, lesson, batch, mean, mean + 1)
        step = partial(denoiser_step, loss, optimizers)
        measure(f"denoiser {lesson} x {lesson.size}", lesson.size, step, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", choices=["autoencoder", "denoiser"])
    parser.add_argument("--small", action="store_true", help="a toy size")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    if options.part != "denoiser":
        time_autoencoder(device, options.small)
    if options.part != "autoencoder":
        time_denoiser(device, options.small)


if __name__ == "__main__":
    main()
