"""Predicts the peak memory of a run before anything is loaded, and what is free.

peak = weights + the larger of (one denoiser call with what its attention needs besides, the decode)
+ a fixed share for the libraries.
An estimate, meant to be right within a factor of about 1.5: it exists to stop what cannot fit.
The constants were set against the peak resident memory of a 10-layer Wan on a CPU (33 frames of
128² and 256², 9 of 512²: 0.93, 1.45 and 2.17 GB measured). On GPUs they are not measured yet.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..accel.grid import TokenGrid
from .errors import ModelError
from .folder import ModelFolder

# Live tensors of token width during one transformer block: residual, normed copy, q, k, v, the
# attention output and the feed-forward's four-fold middle, with the copies between them.
_BLOCK_COPIES = 16
# Live feature maps at full resolution in a VAE decoder's last stage, incl. convolution workspace.
_DECODER_COPIES = 14
# A UNet's live feature maps at latent resolution: skip connections of the top level and its blocks.
_UNET_COPIES = 48
_LIBRARIES_BYTES = 800 * 10**6
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Frames that a video autoencoder decodes at a time; one not listed decodes all of them at once.
_DECODE_FRAMES = {"AutoencoderKLWan": 4, "AutoencoderKLCogVideoX": 8}


# getrusage counts in KiB on Linux, in bytes on macOS.
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted bytes by what they are for.

    `workspace` is that of sparse attention, `pruning` the tokens that are kept for pruned steps.
    """

    weights: int
    denoise: int
    decode: int
    libraries: int = _LIBRARIES_BYTES
    workspace: int = 0
    pruning: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the highest point of the run."""
        step = self.denoise + self.workspace + self.pruning
        return self.weights + max(step, self.decode) + self.libraries

    def explain(self) -> str:
        """The parts in words, for an error or a report."""
        parts = {
            "weights": self.weights,
            "for a denoising step": self.denoise,
            "for sparse attention": self.workspace,
            "for pruned tokens": self.pruning,
            "for decoding": self.decode,
            "for the libraries": self.libraries,
        }
        return ", ".join(f"{amount(count)} {what}" for what, count in parts.items() if count)


def amount(count: int) -> str:
    """Bytes as text, in the largest of kB, MB and GB (powers of 1000) of which there is one."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def estimate(
    folder: ModelFolder,
    numel: Mapping[str, int],
    grid: TokenGrid | None,
    *,
    pixels: tuple[int, int, int],
    dtype: str,
    vae_dtype: str,
    resident: bool,
    workspace: int = 0,
    pruning: int = 0,
) -> Estimate:
    """Predict the peak of one video of `pixels` = (frames, height, width).

    `numel` are numbers of weights by part, `workspace` and `pruning` see `Estimate`. Without a
    `grid` latents are decoded only, by the autoencoder alone. `resident` says that the weights are
    loaded already and count as used, not as needed.
    """
    if grid is None:
        numel = {part: count for part, count in numel.items() if part == "vae"}
    try:
        denoise = 0 if grid is None else _denoise(folder, grid, dtype)
        decode = _decode(folder, pixels, vae_dtype)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder.path} has a config of the wrong form: {reason}") from error
    weights = sum(
        count * _BYTES[vae_dtype if part == "vae" else dtype] for part, count in numel.items()
    )
    return Estimate(
        weights=0 if resident else weights,
        denoise=denoise,
        decode=decode,
        workspace=workspace,
        pruning=pruning,
    )


def _denoise(folder: ModelFolder, grid: TokenGrid, dtype: str) -> int:
    config = folder.config("transformer")
    # Guidance runs as one batch of two in all but Wan and Flux; counted for all, as a margin.
    if config:
        width = _width(config)
        return 2 * grid.tokens * width * _BLOCK_COPIES * _BYTES[dtype]
    blocks = cast("list[int]", folder.config("unet").get("block_out_channels") or [320])
    return 2 * grid.tokens * blocks[0] * _UNET_COPIES * _BYTES[dtype]


def _width(config: dict[str, Any]) -> int:
    heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        return heads * size
    return next((config[key] for key in ("hidden_size", "inner_dim") if key in config), 3072)


def _decode(folder: ModelFolder, pixels: tuple[int, int, int], dtype: str) -> int:
    config = folder.config("vae")
    frames, height, width = pixels
    blocks = config.get("decoder_block_out_channels") or config.get("block_out_channels")
    channels = config.get("decoder_base_dim") or config.get("base_dim")
    if not isinstance(channels, int):
        channels = cast("list[int]", blocks)[0] if isinstance(blocks, list) else 128
    patch = config.get("patch_size") or 1
    at_once = min(frames, _DECODE_FRAMES.get(folder.parts.get("vae", ""), frames))
    side = int(patch) if isinstance(patch, int) else 1
    features = at_once * math.ceil(height / side) * math.ceil(width / side) * channels
    # The clip itself: decoded, post-processed in float32, and as 8-bit frames.
    clip = frames * height * width * 3 * (2 * _BYTES[dtype] + 4 + 1)
    return features * _DECODER_COPIES * _BYTES[dtype] + clip


def host_free_bytes() -> int:
    """Memory that can still be used without swapping, within this process's control group."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (_read_int(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _read_int(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def bytes_of(dtype: str) -> int:
    """Of one number of a type."""
    return _BYTES[dtype]


def free_bytes(device: str) -> int:
    """Free memory of `device` in bytes."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return host_free_bytes()


def peak_bytes(device: str) -> int:
    """The most memory so far: of an accelerator in this run, else of the process in its life."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(torch.device(device)))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
