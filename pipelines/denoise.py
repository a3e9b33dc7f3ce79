"""A run of a loaded pipeline up to its latents, for those who look at what happens in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import images, models
from .cards import Card
from .request import Resolved
from .taps import without_progress_bar


def denoise(
    pipe: Any, card: Card, resolved: Resolved, after_step: Callable[[Any, int], None]
) -> None:
    """Run `pipe` as `resolved` asks; nothing is decoded.

    `after_step` gets the pipeline and the number of the step, from 0, and may set `_interrupt`.
    """
    import torch

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        after_step(pipe, step)
        return tensors

    wanted: dict[str, Any] = {
        "prompt": resolved.prompt,
        "height": resolved.height,
        "width": resolved.width,
        "num_frames": resolved.frames,
        "num_inference_steps": resolved.steps,
        "guidance_scale": resolved.guidance,
        "generator": torch.Generator("cpu").manual_seed(resolved.seed),
        "output_type": "latent",
        "callback_on_step_end": on_step,
        **card.call,
    }
    if resolved.image is not None:
        wanted["image"] = images.first_frame(resolved)
    if resolved.negative_prompt is not None:
        wanted["negative_prompt"] = resolved.negative_prompt
    accepted = models.call_parameters(type(pipe))
    with without_progress_bar(pipe):
        pipe(**{name: value for name, value in wanted.items() if name in accepted})
