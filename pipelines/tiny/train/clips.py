"""Training clips: random scenes of the world's `train` split in several sizes and lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from ...world.grammar import phrase
from ...world.render import render
from ...world.scene import Description, Scene, sample_scene
from ...world.split import sample_split


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames, height and width in pixels of a clip."""

    frames: int
    height: int
    width: int

    @property
    def is_image(self) -> bool:
        return self.frames == 1


def sample_clips(rng: random.Random, clip: Clip, count: int) -> list[Scene]:
    """`count` scenes that training may show; two objects twice as often as one."""
    scenes: list[Scene] = []
    for _ in range(count):
        things = rng.choice((1, 2, 2))
        description = sample_split(rng, "train", things=things, still_image=clip.is_image)
        scene = sample_scene(rng, description, frames=clip.frames, aspect=clip.width / clip.height)
        scenes.append(scene)
    return scenes


def draw(scenes: list[Scene], clip: Clip, device: torch.device | str) -> torch.Tensor:
    """`[B, 3, frames, height, width]` float32 in -1 to 1."""
    video = render(scenes, frames=clip.frames, height=clip.height, width=clip.width, device=device)
    return video * 2 - 1


def caption(rng: random.Random, description: Description, *, empty: float = 0.1) -> str:
    """One phrasing; sometimes the background or the relation is left out, or (`empty`) all.

    An empty caption is what guidance steers away from.
    """
    if rng.random() < empty:
        return ""
    if rng.random() < 0.05:
        description = replace(description, background=None)
    if rng.random() < 0.1:
        description = replace(description, relation=None)
    return phrase(description, rng)
