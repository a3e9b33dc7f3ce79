"""Damage of known kind to videos and scenes of the world: what the judge is validated with.

Each changes one thing, so that one knows which scores must fall and which must not. Videos are
`[F, H, W, 3]` uint8; `strength` 0 changes nothing.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import cv2
import numpy as np

from ...pipelines.world.palette import COLOURS
from ...pipelines.world.scene import FPS, MARGIN, Body, Scene, Thing
from ...pipelines.world.shapes import SHAPES
from .arrays import Bytes


def h264(video: Bytes, strength: float = 18) -> Bytes:
    """There and back through H.264 in yuv420p; `strength` is the constant rate factor."""
    import av  # only here: judging needs no codec

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(strength)})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r") as source:
        images = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    return np.stack(images).astype(np.uint8, copy=False)


def blur(video: Bytes, strength: float = 1.0) -> Bytes:
    """Gaussian of sigma `strength` pixels."""
    if not strength:
        return video.copy()
    return np.stack([cv2.GaussianBlur(image, (0, 0), strength) for image in video])


def noise(video: Bytes, strength: float = 10.0) -> Bytes:
    """Gaussian of sigma `strength` out of 255, new in each frame, the same on each call."""
    grain = np.random.default_rng(0).standard_normal(video.shape, np.float32)
    return (video + strength * grain).round().clip(0, 255).astype(np.uint8)


def reverse(video: Bytes, strength: float = 1.0) -> Bytes:
    """Backwards in time."""
    return video[::-1].copy() if strength else video.copy()


def freeze(video: Bytes, strength: float = 1.0) -> Bytes:
    """The first frame all along."""
    return np.repeat(video[:1], len(video), axis=0) if strength else video.copy()


def mirror(video: Bytes, strength: float = 1.0) -> Bytes:
    """Left and right exchanged."""
    return video[:, :, ::-1].copy() if strength else video.copy()


def jitter(video: Bytes, strength: float = 4.0) -> Bytes:
    """Each frame shifted along both axes by whole pixels, up to `strength`, edges repeated."""
    shifts = np.random.default_rng(0).uniform(-1, 1, (len(video), 2)) * strength
    moved = []
    for image, (dx, dy) in zip(video, shifts.round(), strict=True):
        matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        size = (video.shape[2], video.shape[1])
        moved.append(cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(moved)


def flicker(video: Bytes, strength: float = 0.12) -> Bytes:
    """Each frame's exposure changed by a factor of 1 ± `strength`."""
    gains = 1 + strength * np.random.default_rng(0).uniform(-1, 1, (len(video), 1, 1, 1))
    return (video * gains).round().clip(0, 255).astype(np.uint8)


def gray_frames(video: Bytes, strength: float = 1.0) -> Bytes:
    """Nothing but mid-gray."""
    return np.full_like(video, 128) if strength else video.copy()


def static(video: Bytes, strength: float = 1.0) -> Bytes:
    """Nothing but uniform noise."""
    if not strength:
        return video.copy()
    return np.random.default_rng(0).integers(0, 256, video.shape, np.uint8)


VIDEO_CORRUPTIONS: dict[str, Callable[[Bytes, float], Bytes]] = {
    function.__name__: cast("Callable[[Bytes, float], Bytes]", function)
    for function in (
        *(h264, blur, noise, reverse, freeze, mirror, jitter, flicker, gray_frames, static),
    )
}


def recolour(scene: Scene, rng: random.Random) -> Scene:
    """The first object in a colour that none has."""
    taken = {body.thing.colour for body in scene.bodies}
    colour = rng.choice([name for name in COLOURS if name not in taken])
    return _with_first(scene, colour=colour)


def reshape(scene: Scene, rng: random.Random) -> Scene:
    """The first object in a shape that none has, of the same motion."""
    first = scene.bodies[0].thing
    taken = {body.thing.shape for body in scene.bodies}
    free = [name for name in SHAPES if name not in taken]
    if first.motion == "spinning":
        free = [name for name in free if SHAPES[name].symmetry]
    return _with_first(scene, shape=rng.choice(free))


def remove(scene: Scene, rng: random.Random) -> Scene:
    """Without the first object."""
    return replace(scene, bodies=scene.bodies[1:])


def add(scene: Scene, rng: random.Random, *, frames: int = 33, aspect: float = 1.0) -> Scene:
    """With one more object, small and still, in another colour and clear of the others."""
    taken = {body.thing.colour for body in scene.bodies}
    colour = rng.choice([name for name in COLOURS if name not in taken])
    radius = 0.08
    wide, high = max(aspect, 1.0) / 2, max(1 / aspect, 1.0) / 2
    times = [i / FPS for i in range(frames)]
    places: list[tuple[float, float, float]] = []
    for _ in range(200):
        x = rng.uniform(-1, 1) * (wide - radius - MARGIN)
        y = rng.uniform(-1, 1) * (high - radius - MARGIN)
        gap = min(_gap(body, t, x, y) for body in scene.bodies for t in times)
        places.append((gap, x, y))
    _, x, y = max(places)
    thing = Thing(rng.choice(tuple(SHAPES)), colour, "still")
    return replace(scene, bodies=(*scene.bodies, Body(thing, x, y, radius)))


def _gap(body: Body, time: float, x: float, y: float) -> float:
    away = math.hypot(body.x + body.vx * time - x, body.y + body.vy * time - y)
    return away - body.radius * math.exp(body.growth * time)


def _with_first(scene: Scene, *, shape: str | None = None, colour: str | None = None) -> Scene:
    first = scene.bodies[0]
    thing = replace(
        first.thing, shape=shape or first.thing.shape, colour=colour or first.thing.colour
    )
    return replace(scene, bodies=(replace(first, thing=thing), *scene.bodies[1:]))


SCENE_CORRUPTIONS: dict[str, Callable[[Scene, random.Random], Scene]] = {
    "recolour": recolour,
    "reshape": reshape,
    "remove": remove,
    "add": add,
}
