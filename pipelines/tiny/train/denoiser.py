r"""Train the text encoder and the denoiser of `kinora-tiny` on latents of random clips.

    python -m kinora.pipelines.tiny.train.denoiser \
        --autoencoder runs/vae/vae --out runs/dit --minutes 20

Flow matching (Lipman et al. 2023) as Wan does it: with noise n and time s in 0 to 1, the input is
(1 - s) x + s n, the timestep 1000 s, the target n - x. Clips are encoded once into pools that stay
on the device; each draw gets a new phrasing, noise and time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
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
    TEXT_LENGTH,
    assemble,
    encode_captions,
    new_denoiser,
    new_text_encoder,
    new_tokenizer,
)
from .clips import Clip, caption, draw, sample_clips
from .muon import muon_and_adamw, set_learning_rate, take_step
from .session import Average, Session, arguments, trapezoid
from .whole_clip import channels_last, encode, whole_clip

STOCK_TEXT_LENGTH = 512
"""What `WanPipeline` pads to unless told otherwise. Cross-attention sees the padding, so a quarter
of the steps use it and the model works with both."""

LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """How many clips of one size are encoded, and how training draws them."""

    clip: Clip
    clips: int
    batch: int
    early_share: float
    """Weight among the steps at the start; it moves linearly to `late_share` by half time."""
    late_share: float
    time_shift: float
    """Times are logit-normal, then s -> shift s / (1 + (shift - 1) s): larger clips, more noise."""


POOLS = (
    PoolPlan(Clip(1, 128, 128), 40_000, 512, 0.20, 0.02, 1.5),
    PoolPlan(Clip(1, 256, 256), 6_000, 128, 0.05, 0.02, 2.0),
    PoolPlan(Clip(33, 128, 128), 40_000, 64, 0.65, 0.68, 3.0),
    PoolPlan(Clip(33, 96, 160), 6_000, 64, 0.04, 0.05, 3.0),
    PoolPlan(Clip(33, 160, 96), 6_000, 64, 0.04, 0.05, 3.0),
    PoolPlan(Clip(33, 256, 256), 5_000, 16, 0.02, 0.18, 4.0),
)
SMALL_POOLS = (
    PoolPlan(Clip(1, 32, 32), 16, 4, 0.5, 0.5, 1.5),
    PoolPlan(Clip(5, 32, 48), 16, 4, 0.5, 0.5, 3.0),
)
SMALL: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(slots=True)
class Pool:
    """Encoded clips of one size: `latents [N, 16, f, h, w]` bfloat16, not yet normalised."""

    plan: PoolPlan
    latents: torch.Tensor
    descriptions: list[Description]


@torch.no_grad()
def fill_pool(
    autoencoder: AutoencoderKLWan, plan: PoolPlan, seed: int, device: torch.device
) -> Pool:
    """Render and encode the clips of a plan."""
    rng = random.Random(f"{seed}/{plan.clip}")
    parts: list[torch.Tensor] = []
    descriptions: list[Description] = []
    while len(descriptions) < plan.clips:
        scenes = sample_clips(rng, plan.clip, min(plan.batch, plan.clips - len(descriptions)))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = encode(autoencoder, draw(scenes, plan.clip, device))
        parts.append(latents.to(torch.bfloat16))
        descriptions += [scene.description for scene in scenes]
    return Pool(plan, torch.cat(parts), descriptions)


def share(plan: PoolPlan, progress: float) -> float:
    """Weight of a pool at `progress` in 0 to 1."""
    return plan.early_share + (plan.late_share - plan.early_share) * min(1.0, 2 * progress)


def sample_times(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """`[count]` noise levels in 0 to 1."""
    s = torch.randn(count, device=device).sigmoid()
    return shift * s / (1 + (shift - 1) * s)


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The matrices inside the denoiser's blocks, which Muon trains."""
    return ".blocks." in name and parameter.ndim == 2


class Parts(nn.Module):
    """What is trained, as one module."""

    def __init__(self, text_encoder: UMT5EncoderModel, denoiser: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder, self.denoiser = text_encoder, denoiser


def _load(
    options: Any, device: torch.device
) -> tuple[AutoencoderKLWan, AutoencoderKLWan, Parts, Any]:
    tokenizer = new_tokenizer()
    if options.init:
        pipe = WanPipeline.from_pretrained(options.init, dtype=torch.float32)
        parts = Parts(pipe.text_encoder, pipe.transformer)  # pyright: ignore[reportArgumentType]
    else:
        small = SMALL if options.small else {}
        parts = Parts(new_text_encoder(tokenizer), new_denoiser(**small))
    shipped = AutoencoderKLWan.from_pretrained(options.autoencoder, dtype=torch.float32)
    working = AutoencoderKLWan.from_pretrained(options.autoencoder, dtype=torch.float32)
    nn.Module.to(whole_clip(working), device)
    return shipped, working.eval(), parts.to(device).train(), tokenizer


def compile_blocks(parts: Parts, device: torch.device) -> None:
    """Compile the denoiser's blocks where that pays; each runs for every kind of clip."""
    if device.type == "cuda":
        # A block is compiled for every kind of clip and caption length, and then for any batch.
        torch.compiler.config.recompile_limit = 64
        parts.denoiser.compile_repeated_blocks(fullgraph=True)


def main(argv: list[str] | None = None) -> None:
    parser = arguments("Train the text encoder and the denoiser of kinora-tiny.")
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder of the trained one")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    autoencoder, encoder, parts, tokenizer = _load(options, device)
    if device.type == "cuda":
        channels_last(encoder)
    compile_blocks(parts, device)
    plans = SMALL_POOLS if options.small else POOLS
    pools = [fill_pool(encoder, plan, options.seed, device) for plan in plans]
    del encoder
    mean, deviation = _channel_statistics(pools)
    autoencoder.register_to_config(
        latents_mean=mean.flatten().tolist(), latents_std=deviation.flatten().tolist()
    )
    optimizers, average = muon_and_adamw(parts, is_inner_matrix, LEARNING_RATE), Average(parts)
    stateful = {"parts": parts, "average": average}
    stateful |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    session = Session(options.out, options.minutes, stateful, log_steps=5 if options.small else 50)
    session.out.mkdir(parents=True, exist_ok=True)
    session.write(pools={str(pool.plan.clip): len(pool.descriptions) for pool in pools})
    for progress in session:
        rng = random.Random(f"{options.seed}/{session.step}")
        pool = rng.choices(pools, [share(pool.plan, progress) for pool in pools])[0]
        set_learning_rate(optimizers, LEARNING_RATE * trapezoid(progress))
        loss = flow_loss(parts, pool, tokenizer, rng, mean, deviation)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        take_step(optimizers)
        average.update()
        clip = pool.plan.clip
        session.log({"norm": norm, f"loss {clip.frames}x{clip.height}x{clip.width}": loss})
    average.copy_to_source()
    assemble(
        tokenizer=tokenizer,
        text_encoder=parts.text_encoder,
        autoencoder=autoencoder,
        denoiser=parts.denoiser,
    ).save_pretrained(options.out / "pipeline")


def _channel_statistics(pools: list[Pool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each latent channel over the largest pool, `[1, 16, 1, 1, 1]`."""
    latents = max(pools, key=lambda pool: pool.latents.numel()).latents[:2048].float()
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3, 4), keepdim=True)
    assert mean.shape[1] == LATENT_CHANNELS
    return mean, deviation


def flow_loss(
    parts: Parts,
    pool: Pool,
    tokenizer: Any,
    rng: random.Random,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> torch.Tensor:
    """Flow-matching loss of one batch, a scalar."""
    device = pool.latents.device
    rows = [rng.randrange(len(pool.descriptions)) for _ in range(pool.plan.batch)]
    captions = [caption(rng, pool.descriptions[row]) for row in rows]
    clean = (pool.latents[torch.tensor(rows, device=device)].float() - mean) / deviation
    noise = torch.randn_like(clean)
    times = sample_times(len(rows), pool.plan.time_shift, device)
    s = times[:, None, None, None, None]
    cuda = device.type == "cuda"
    length = STOCK_TEXT_LENGTH if rng.random() < 0.25 else TEXT_LENGTH
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=cuda),
        sdpa_kernel(
            [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
            set_priority=True,
        ),
    ):
        text = encode_captions(captions, tokenizer, parts.text_encoder, length)
        predicted = parts.denoiser(
            (1 - s) * clean + s * noise, times * 1000, text, return_dict=False
        )[0]
    return (predicted.float() - (noise - clean)).square().mean()


if __name__ == "__main__":
    main()
