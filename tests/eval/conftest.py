"""Ground truth for the judge's tests: scenes of all splits with one and two objects, drawn."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import pytest
import torch
from selenium import webdriver

from kinora.pipelines.media import encode
from kinora.pipelines.sidecar import Record
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


Film = Callable[..., Path]


@pytest.fixture(scope="session")
def film() -> Film:
    """Write a clip as Kinora does: media file with its record inside, and the sidecar beside it.

    `request` and `record_` are fields that differ from the usual ones.
    """

    def write(
        path: Path,
        frames: Any,
        prompt: str,
        seed: int,
        sidecar: bool = True,
        request: Mapping[str, Any] | None = None,
        **record_: Any,
    ) -> Path:
        asked = {
            "prompt": prompt, "negative_prompt": None, "model": "kinora-tiny",
            "width": frames.shape[2], "height": frames.shape[1], "frames": len(frames),
            "steps": 30, "guidance": 4.0, "fps": 16.0, "seed": seed, "num_videos": 1,
            "output": "outputs", "format": path.suffix[1:], "device": "cpu", "dtype": "float32",
            "keep_latents": False, "force": False,
            **(request or {}),
        }  # fmt: skip
        record = Record.model_validate(
            {
                "schema": "kinora.run/1",
                "request": asked,
                "model": {
                    "name": "kinora-tiny", "pipeline": "WanPipeline", "repo": None,
                    "fingerprint": "sha256:0", "vae_dtype": "float32",
                },
                "machine": {"device": "cpu", "threads": 1, "versions": {}},
                "created": "2026-01-01T00:00:00+00:00",
                "latents_sha256": "0",
                **record_,
            }
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(frames, record.request.format, 16, record.to_text()))
        if sidecar:
            path.with_suffix(".json").write_text(record.to_text())
        return path

    return write


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, whose log is that of the page."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()
