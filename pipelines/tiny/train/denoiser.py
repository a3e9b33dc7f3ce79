r"""Train the denoiser of `kinora-tiny` on latents of random clips.

    python -m kinora.pipelines.tiny.train.denoiser --autoencoder runs/vae/vae \
        --text-encoder runs/text/text_encoder --out runs/dit --minutes 12
    python -m kinora.pipelines.tiny.train.denoiser \
        --init pipelines/tiny/weights --seed 1 --out runs/more --minutes 12

Flow matching (Lipman et al. 2023) as Wan does it: with noise n and time s in 0 to 1, the input is
(1 - s) x + s n, the timestep 1000 s, the target n - x. Clips are encoded once into pools that stay
on the device; each draw of one (`lessons.py`) gets a new phrasing, noise and time. The text encoder
is trained before (`text_encoder.py`) and stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5EncoderModel

from ...world.scene import Description
from ..architecture import (
    LATENT_CHANNELS,
    TEMPORAL_FACTOR,
    TEXT_LENGTH,
    assemble,
    encode_tokens,
    new_denoiser,
    new_tokenizer,
)
from .attention import TrainingAttention
from .clips import Clip, draw, sample_clips
from .lessons import (
    LESSONS,
    POOLS,
    SMALL_LESSONS,
    SMALL_POOLS,
    STOCK_TEXT_LENGTH,
    Draw,
    Draws,
    Lesson,
    draws,
)
from .muon import muon_and_adamw, set_learning_rate, take_step
from .session import Average, Session, arguments, settings, trapezoid
from .whole_clip import channels_last, copy_statistics, encode, whole_clip

LEARNING_RATE = 3e-3
PIXELS_TOGETHER = 2**25
"""Encoded at a time: 62 clips of 33 frames of 128 x 128."""
SMALL: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(slots=True)
class Pool:
    """Encoded clips of one size: `latents [N, 16, f, h, w]` bfloat16, not yet normalised."""

    latents: torch.Tensor
    descriptions: list[Description]


@torch.no_grad()
def fill_pool(
    autoencoder: AutoencoderKLWan, clip: Clip, count: int, seed: int, device: torch.device
) -> Pool:
    """Render and encode `count` clips."""
    rng = random.Random(f"{seed}/{clip}")
    batch = max(1, PIXELS_TOGETHER // (clip.frames * clip.height * clip.width))
    parts: list[torch.Tensor] = []
    descriptions: list[Description] = []
    while len(descriptions) < count:
        scenes = sample_clips(rng, clip, min(batch, count - len(descriptions)))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = encode(autoencoder, draw(scenes, clip, device))
        parts.append(latents.to(torch.bfloat16))
        descriptions += [scene.description for scene in scenes]
    return Pool(torch.cat(parts), descriptions)


def fill_pools(
    autoencoder: AutoencoderKLWan, counts: dict[Clip, int], seed: int, device: torch.device
) -> dict[Clip, Pool]:
    """A pool for each kind of clip; works on a copy of the autoencoder."""
    encoder = whole_clip(deepcopy(autoencoder)).eval()
    nn.Module.to(encoder, device)
    if device.type == "cuda":
        channels_last(encoder)
    return {clip: fill_pool(encoder, clip, count, seed, device) for clip, count in counts.items()}


def sample_times(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """`[count]` noise levels in 0 to 1, one in each of `count` equally likely ranges."""
    quantiles = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    s = torch.special.ndtri(quantiles).sigmoid()
    return shift * s / (1 + (shift - 1) * s)


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The matrices inside the denoiser's blocks, which Muon trains."""
    return name.startswith("blocks.") and parameter.ndim == 2


@dataclass(slots=True)
class Parts:
    """A pipeline while its denoiser is trained; all parts float32."""

    tokenizer: Any
    text_encoder: UMT5EncoderModel
    autoencoder: AutoencoderKLWan
    denoiser: WanTransformer3DModel


def load(options: Any) -> Parts:
    """Trained parts from the folders in `options`, and a fresh denoiser unless `init` has one.

    With `init`, a pipeline, the other folders replace its parts; an autoencoder must be one for the
    same latents.
    """
    parts = Parts(new_tokenizer(), *[None] * 3)  # pyright: ignore[reportArgumentType]
    if options.init:
        pipe: Any = WanPipeline.from_pretrained(options.init, dtype=torch.float32)
        parts = Parts(pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.transformer)
    else:
        parts.denoiser = new_denoiser(**(SMALL if options.small else {}))
    if options.text_encoder:
        parts.text_encoder = UMT5EncoderModel.from_pretrained(options.text_encoder)
    if options.autoencoder:
        autoencoder = AutoencoderKLWan.from_pretrained(options.autoencoder, dtype=torch.float32)
        if options.init:
            copy_statistics(parts.autoencoder, autoencoder)
        parts.autoencoder = autoencoder
    return parts


def speed_up(denoiser: WanTransformer3DModel, device: torch.device) -> None:
    """Attention made for training; on a GPU the blocks are compiled."""
    head_dim = denoiser.config["attention_head_dim"]
    attention: Any = TrainingAttention(head_dim, device)
    denoiser.set_attn_processor(attention)
    if device.type == "cuda":
        # A block is compiled for every kind of clip and caption length, and then for any batch.
        torch.compiler.config.recompile_limit = 64
        denoiser.compile_repeated_blocks(fullgraph=True)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("Train the denoiser of kinora-tiny.", LEARNING_RATE)
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of the trained one (default: of --init)"
    )
    parser.add_argument(
        "--text-encoder", type=Path, help="folder of the trained one (default: of --init)"
    )
    options = parser.parse_args(argv)
    if not (options.init or (options.autoencoder and options.text_encoder)):
        parser.error("give --autoencoder and --text-encoder, or --init to go on with a pipeline")
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    parts = load(options)
    nn.Module.to(parts.text_encoder.eval().requires_grad_(False), device)
    denoiser = parts.denoiser.train()
    nn.Module.to(denoiser, device)
    speed_up(denoiser, device)
    lessons = SMALL_LESSONS if options.small else LESSONS
    if options.init:
        lessons = tuple(replace(it, early_share=it.late_share) for it in lessons)
    counts = SMALL_POOLS if options.small else POOLS
    optimizers = muon_and_adamw(denoiser, is_inner_matrix, options.learning_rate)
    average = Average(denoiser)
    stateful: dict[str, Any] = {"denoiser": denoiser, "average": average}
    stateful |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    must_agree = settings(options, pools=counts, **{f"lesson {it}": repr(it) for it in lessons})
    log_steps = 5 if options.small else 50
    session = Session(options.out, options.minutes, stateful, must_agree, log_steps=log_steps)
    session.check()  # before minutes of drawing and compiling
    pools = fill_pools(parts.autoencoder, counts, options.seed, device)
    if not options.init:
        measure_statistics(parts.autoencoder, pools)
    mean, deviation = (statistic.to(device) for statistic in statistics(parts.autoencoder))
    session.out.mkdir(parents=True, exist_ok=True)
    session.write(pools={str(clip): len(pool.descriptions) for clip, pool in pools.items()})
    told = {clip: pool.descriptions for clip, pool in pools.items()}
    dataset = Draws(lessons, told, parts.tokenizer, options.seed)
    if device.type == "cuda":
        compile_ahead(parts, pools, dataset, mean, deviation)
    drawn = draws(session, dataset, device)
    for progress, batch in zip(session, drawn, strict=False):
        lesson = lessons[batch.lesson]
        set_learning_rate(optimizers, options.learning_rate * trapezoid(progress))
        loss = flow_loss(parts, pools[lesson.clip], lesson, batch, mean, deviation)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        take_step(optimizers)
        average.update()
        session.log({"norm": norm, f"loss {lesson}": loss})
    average.copy_to_source()
    assemble(**{field.name: getattr(parts, field.name) for field in fields(parts)}).save_pretrained(
        options.out / "pipeline"
    )


def compile_ahead(
    parts: Parts,
    pools: Mapping[Clip, Pool],
    dataset: Draws,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> None:
    """Let blocks be compiled for every lesson and text length before the clock of training starts.

    One loss and its gradients each, which are dropped; the random state stays as it was.
    """
    device = mean.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, lesson in enumerate(dataset.lessons):
            for length in (TEXT_LENGTH, STOCK_TEXT_LENGTH):
                batch = dataset[0, number]._replace(text_length=length).to(device)
                flow_loss(parts, pools[lesson.clip], lesson, batch, mean, deviation).backward()
                parts.denoiser.zero_grad(set_to_none=True)


def measure_statistics(autoencoder: AutoencoderKLWan, pools: dict[Clip, Pool]) -> None:
    """Record mean and deviation of each latent channel over the largest pool."""
    latents = max((pool.latents for pool in pools.values()), key=torch.Tensor.numel)
    deviation, mean = torch.std_mean(latents[:2048].float(), dim=(0, 2, 3, 4))
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def statistics(autoencoder: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """The recorded mean and deviation, `[1, 16, 1, 1, 1]` each."""
    values = (autoencoder.config[name] for name in ("latents_mean", "latents_std"))
    mean, deviation = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in values)
    assert mean.shape[1] == LATENT_CHANNELS
    return mean, deviation


def flow_loss(
    parts: Parts,
    pool: Pool,
    lesson: Lesson,
    batch: Draw,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> torch.Tensor:
    """Flow-matching loss of one batch, a scalar."""
    device = pool.latents.device
    shown = (lesson.frames - 1) // TEMPORAL_FACTOR + 1
    clean = (pool.latents[batch.rows, :, :shown].float() - mean) / deviation
    noise = torch.randn_like(clean)
    times = sample_times(len(clean), lesson.time_shift, device)
    s = times[:, None, None, None, None]
    cuda = device.type == "cuda"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=cuda),
        sdpa_kernel(
            [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
            set_priority=True,
        ),
    ):
        with torch.no_grad():
            text = encode_tokens(batch.tokens, batch.mask, parts.text_encoder, batch.text_length)
        predicted = parts.denoiser(
            (1 - s) * clean + s * noise, times * 1000, text, return_dict=False
        )[0]
    return (predicted.float() - (noise - clean)).square().mean()


if __name__ == "__main__":
    main()
