"""Training clips: random scenes of the world's `train` split in several sizes and lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from ...world.grammar import phrase
from ...world.render import background, paint, render
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
    """`count` scenes that training may show; one object as often as two."""
    scenes: list[Scene] = []
    for _ in range(count):
        things = rng.choice((1, 2))
        description = sample_split(rng, "train", things=things, still_image=clip.is_image)
        scene = sample_scene(rng, description, frames=clip.frames, aspect=clip.width / clip.height)
        # One frame shows no motion, so its caption must not tell the one that was drawn for it.
        bodies = zip(scene.bodies, description.things, strict=True)
        scenes.append(replace(scene, bodies=tuple(replace(b, thing=t) for b, t in bodies)))
    return scenes


def draw(scenes: list[Scene], clip: Clip, device: torch.device | str) -> torch.Tensor:
    """`[B, 3, frames, height, width]` float32 in -1 to 1."""
    video = render(scenes, frames=clip.frames, height=clip.height, width=clip.width, device=device)
    return video * 2 - 1


def crowd(
    scenes: list[Scene], clip: Clip, device: torch.device | str, guests: int = 3
) -> torch.Tensor:
    """Like `draw`, with the objects of `guests` other scenes of the batch over each, mirrored."""
    size = {"frames": clip.frames, "height": clip.height, "width": clip.width}
    objects, cover = paint(scenes, **size, device=device)
    behind = [background(scene.background, clip.height, clip.width, device) for scene in scenes]
    video = torch.stack(behind)[:, :, None] * (1 - cover) + objects
    for guest in range(1, guests + 1):
        mirrored = [-1] if guest % 2 else [-2]
        over = objects.roll(guest, dims=0).flip(mirrored)
        video = video * (1 - cover.roll(guest, dims=0).flip(mirrored)) + over
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
