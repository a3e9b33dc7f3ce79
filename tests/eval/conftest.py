"""Ground truth for the judge's tests: scenes of all splits with one and two objects, drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import cv2
import pytest
import torch

from kinora.pipelines.world.render import render
from kinora.pipelines.world.scene import Scene, sample_scene
from kinora.pipelines.world.split import SPLITS, sample_split

Clip: TypeAlias = tuple[Scene, Any]
"""A scene and its video `[F, H, W, 3]` uint8."""


def draw_scene(scene: Scene, frames: int, height: int, width: int) -> Any:
    """The video of a scene, `[frames, height, width, 3]` uint8."""
    video = render([scene], frames=frames, height=height, width=width)[0]
    return (video.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()


def draw_scenes(
    count: int, frames: int = 33, aspect: float = 1.0, seed: int = 0
) -> Iterator[Scene]:
    """`count` scenes, splits and numbers of objects in turn."""
    rng = random.Random(seed)
    for i in range(count):
        description = sample_split(rng, SPLITS[i % 3], things=1 + i // 3 % 2)
        yield sample_scene(rng, description, frames=frames, aspect=aspect)


def draw_clips(
    count: int, frames: int = 33, height: int = 128, width: int = 128, seed: int = 0
) -> Iterator[Clip]:
    """The same scenes with their videos, drawn one at a time."""
    for scene in draw_scenes(count, frames, width / height, seed):
        yield scene, draw_scene(scene, frames, height, width)


@pytest.fixture(scope="session")
def draw() -> Callable[[Scene, int, int, int], Any]:
    return draw_scene


@pytest.fixture(scope="session")
def scenes() -> Callable[..., Iterator[Scene]]:
    return draw_scenes


@pytest.fixture(scope="session")
def clips() -> Callable[..., Iterator[Clip]]:
    return draw_clips


@pytest.fixture(scope="session")
def truth() -> list[Clip]:
    """A dozen clips of 33 frames at 128."""
    return list(draw_clips(12))


@pytest.fixture
def one_core() -> Iterator[None]:
    """Torch and OpenCV on one thread each."""
    torch_threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(torch_threads)
    cv2.setNumThreads(cv_threads)
