"""Scenes to video: an anti-aliased renderer in torch, for any device, size and length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .palette import BACKGROUNDS, COLOURS, RGB
from .scene import FPS, Body, Scene
from .shapes import SHAPES, signed_distance


def render(
    scenes: Sequence[Scene],
    *,
    frames: int,
    height: int,
    width: int,
    fps: float = FPS,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw a batch of scenes.

    Colour fades over one pixel at every outline, mixed in sRGB.

    Args:
        scenes: `B` of them.
        frames: `F`; frame `i` shows the time `i / fps` in seconds.
        height, width: in pixels.

    Returns:
        `[B, 3, F, height, width]` float32 sRGB in 0 to 1.
    """
    objects, cover = paint(
        scenes, frames=frames, height=height, width=width, fps=fps, device=device
    )
    behind = [background(scene.background, height, width, device) for scene in scenes]
    return torch.stack(behind)[:, :, None] * (1 - cover) + objects


def paint(
    scenes: Sequence[Scene],
    *,
    frames: int,
    height: int,
    width: int,
    fps: float = FPS,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objects of scenes alone, to be laid over any background; arguments as for `render`.

    Returns:
        Their colours times their cover, `[B, 3, F, height, width]`, and their cover in 0 to 1,
        `[B, 1, F, height, width]`, both float32.
    """
    short = min(height, width)
    # Pixel centres, in units of the shorter side from the middle of the frame.
    y = (torch.arange(height, device=device) + 0.5 - height / 2) / short
    x = (torch.arange(width, device=device) + 0.5 - width / 2) / short
    time = torch.arange(frames, device=device) / fps
    objects = torch.zeros(len(scenes), 3, frames, height, width, device=device)
    covered = torch.zeros(len(scenes), 1, frames, height, width, device=device)
    for layer in range(max(len(scene.bodies) for scene in scenes)):
        for shape in SHAPES:
            rows = [
                i
                for i, scene in enumerate(scenes)
                if layer < len(scene.bodies) and scene.bodies[layer].thing.shape == shape
            ]
            if not rows:
                continue
            bodies = [scenes[i].bodies[layer] for i in rows]
            cover = _coverage(shape, bodies, time, x, y, short)[:, None]
            colours = torch.stack([_unit(COLOURS[body.thing.colour], device) for body in bodies])
            index = torch.tensor(rows, device=device)
            objects[index] = torch.lerp(objects[index], colours[:, :, None, None, None], cover)
            covered[index] = torch.lerp(covered[index], torch.ones_like(cover), cover)
    return objects, covered


def background(
    name: str, height: int, width: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A backdrop alone, `[3, height, width]` float32 in 0 to 1."""
    backdrop = BACKGROUNDS[name]
    if backdrop.pattern == "vertical":
        mix = ((torch.arange(height, device=device) + 0.5) / height)[:, None].expand(height, width)
    elif backdrop.pattern == "stripes":
        x = (torch.arange(width, device=device) + 0.5 - width / 2) / min(height, width)
        mix = (0.5 - 0.5 * torch.cos(2 * math.pi * backdrop.periods * x)).expand(height, width)
    else:
        mix = torch.zeros(height, width, device=device)
    first, second = _unit(backdrop.first, device), _unit(backdrop.second, device)
    return torch.lerp(first[:, None, None], second[:, None, None], mix)


def _unit(colour: RGB, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.float32, device=device) / 255


def _coverage(
    shape: str,
    bodies: list[Body],
    time: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    short: int,
) -> torch.Tensor:
    """Share of each pixel that a body covers, `[bodies, frames, height, width]` in 0 to 1."""

    def column(name: str) -> torch.Tensor:
        values = [float(getattr(body, name)) for body in bodies]
        return torch.tensor(values, device=time.device)[:, None]

    radius = (column("radius") * torch.exp(column("growth") * time))[..., None, None]
    angle = (column("angle") + column("spin") * time)[..., None, None]
    dx = (x - (column("x") + column("vx") * time)[..., None])[:, :, None, :] / radius
    dy = (y - (column("y") + column("vy") * time)[..., None])[:, :, :, None] / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    distance = signed_distance(SHAPES[shape], dx * cos + dy * sin, dy * cos - dx * sin)
    return (0.5 - distance * radius * short).clamp(0, 1)
