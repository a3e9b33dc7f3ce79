"""What attention is given inside `kinora-tiny`: queries, keys and values to try methods on."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..chatter import relayed
from . import WEIGHTS

PROMPT = "a red circle moving left and a blue star standing still over a gray background"
Recording = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""q, k, v `[1, H, L, D]` by step and layer, after norms and rotary embedding."""


def recording(
    *,
    layers: Collection[int],
    steps: Collection[int],
    of: int,
    size_px: int = 256,
    prompt: str = PROMPT,
    seed: int = 0,
    device: str = "cpu",
) -> Recording:
    """Of the self-attention of some layers at some steps of a dense run of 33 frames.

    Args:
        layers, steps: numbers from 0; with guidance the branch of the prompt is recorded.
        of: steps of the run, which ends with the last one asked for.

    Raises:
        ValueError: a layer or a step that is not there.
    """
    from diffusers import WanPipeline

    with relayed(logging.getLogger(__name__).warning):
        pipe: Any = WanPipeline.from_pretrained(WEIGHTS).to(device)
    pipe.set_progress_bar_config(disable=True)
    count = len(pipe.transformer.blocks)
    if not set(layers) <= set(range(count)) or not set(steps) <= set(range(of)):
        raise ValueError(
            f"layers {sorted(layers)}, steps {sorted(steps)}; there are layers 0 to {count - 1} "
            f"and steps 0 to {of - 1}"
        )
    recorder = _Recorder(set(layers), set(steps))

    def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        del timestep
        recorder.step, recorder.layer = step + 1, 0
        pipe._interrupt = step + 1 > max(steps)
        return given

    with recorder:
        pipe(
            prompt,
            height=size_px,
            width=size_px,
            num_frames=33,
            num_inference_steps=of,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=after_step,
            output_type="latent",
        )
    return recorder.kept


class _Recorder(TorchFunctionMode):
    """Keeps what self-attention is given; the prompt's branch is the first of each step."""

    def __init__(self, layers: set[int], steps: set[int]) -> None:
        super().__init__()
        self.layers, self.steps = layers, steps
        self.step = self.layer = 0
        self.kept: Recording = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            q, k, v = named["query"], named["key"], named["value"]
            # Text has other lengths than the picture, and its encoder runs before the first step.
            if q.shape == k.shape and q.shape[2] > 1000:
                if self.step in self.steps and self.layer in self.layers:
                    self.kept[self.step, self.layer] = q.detach(), k.detach(), v.detach()
                self.layer += 1
        return func(*args, **(kwargs or {}))
