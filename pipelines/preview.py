"""A picture of what a run is heading for, while it runs: the first frame of its estimate of x0.

Only looks: what the scheduler gets and leaves is untouched, nothing is drawn from a generator, so a
run comes to the same bits with previews and without.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from ..accel.attach.schedulers import schedule_of
from ..accel.attach.steps import watched
from ..accel.steps import Schedule

_SHARE = 0.05
"""Of the time of a run, previews take so much at most."""
_APART_S = 1.0
_MOST_LATENTS = 64
"""Of a side; larger ones are averaged first, which bounds what decoding takes."""
# How pipelines undo what they have done to the latents of each of these; all others are left out.
_VAES = ("AutoencoderKLWan", "AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")


@dataclass(slots=True)
class _Last:
    """What the scheduler got in a step."""

    index: int
    output: torch.Tensor
    sample: torch.Tensor


class Previewer:
    """Of one run of a pipeline; `due` where enough time has gone by since the last picture."""

    def __init__(self, pipe: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._pipe, self._clock = pipe, clock
        self._schedule: Schedule | None = None
        self._count = 0
        self._last: _Last | None = None
        self._next_s = 0.0

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Remember, in the body, what the scheduler gets in each step."""
        if type(self._pipe.vae).__name__ not in _VAES:
            yield
            return
        with watched(self._pipe.scheduler, self._start, self._step, lambda _: None):
            yield
        self._last = None

    def _start(self) -> None:
        self._schedule, self._count, self._last = None, 0, None

    def _step(self, given: Mapping[str, Any]) -> None:
        self._last = _Last(self._count, given["model_output"], given["sample"])
        self._count += 1

    @property
    def due(self) -> bool:
        """Whether there is one to be made."""
        return self._last is not None and self._clock() >= self._next_s

    def picture(self) -> bytes | None:
        """Of the last step, as a small JPEG; None where it is not known what an output means.

        Raises what the autoencoder raises when its run is stopped.
        """
        began_s = self._clock()
        estimate = self._estimate()
        if estimate is None:
            self._next_s = float("inf")
            return None
        try:
            picture = _jpeg(_decoded(self._pipe.vae, estimate))
        except torch.OutOfMemoryError:  # the run itself may have enough
            self._next_s = float("inf")
            return None
        ended_s = self._clock()
        self._next_s = ended_s + max(_APART_S, (ended_s - began_s) / _SHARE)
        return picture

    def _estimate(self) -> torch.Tensor | None:
        """x0 of the first item `[C, F, H, W]`, or None where that cannot be told."""
        last = self._last
        if last is None:
            return None
        if self._schedule is None:
            self._schedule = schedule_of(self._pipe.scheduler)
        if self._schedule.codec is None or last.index >= len(self._schedule.levels):
            return None
        x0 = self._schedule.estimate(last.output[:1], last.sample[:1], last.index)
        return _channels_first(x0, self._pipe.vae)


def _channels_first(x0: torch.Tensor, vae: Any) -> torch.Tensor | None:
    """`[C, F, H, W]` of a sample of one item; None of one that is packed into tokens."""
    channels = vae.config.get("z_dim") or vae.config.get("latent_channels")
    if x0.ndim == 4:
        x0 = x0[:, :, None]
    if x0.ndim != 5:
        return None
    if x0.shape[1] != channels and x0.shape[2] == channels:
        x0 = x0.transpose(1, 2)
    return x0[0] if x0.shape[1] == channels else None


def _decoded(vae: Any, x0: torch.Tensor) -> torch.Tensor:
    """The first picture `[H, W, 3]` uint8 of x0 `[C, F, H, W]`.

    Causal autoencoders decode it alone as they do with all others behind it; later ones would need
    all before them.
    """
    latents = _unscaled(vae.config, x0[:, :1])
    largest = max(latents.shape[-2:])
    if largest > _MOST_LATENTS:
        sides = [max(1, it * _MOST_LATENTS // largest) for it in latents.shape[-2:]]
        latents = F.adaptive_avg_pool2d(latents, (sides[0], sides[1]))
    latents = latents[None].to(vae.dtype)
    moving = type(vae).__name__ != "AutoencoderKL"
    with torch.no_grad():
        # As the class has it: that of the instance counts as the run's own decoding.
        given = latents if moving else latents[:, :, 0]
        decoded = type(vae).decode(vae, given, return_dict=False)[0]
    picture = decoded[0, :, 0] if moving else decoded[0]
    return picture.float().add(1).mul(127.5).clamp(0, 255).byte().permute(1, 2, 0).cpu()


def _unscaled(config: Mapping[str, Any], latents: torch.Tensor) -> torch.Tensor:
    """Latents `[C, F, H, W]` as the autoencoder takes them."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    latents = latents / (config.get("scaling_factor") or 1.0)
    if mean and std:
        of_channels = (latents.new_tensor(it)[:, None, None, None] for it in (mean, std))
        mean, std = of_channels
        return latents * std + mean
    return latents + (config.get("shift_factor") or 0.0)


def _jpeg(picture: torch.Tensor) -> bytes:
    """A picture `[H, W, 3]` uint8."""
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "JPEG", quality=85)
    return file.getvalue()
