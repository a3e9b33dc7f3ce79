"""What the judge refuses: one line that names what was given, what is allowed, and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kinora.eval.world import judge
from kinora.eval.world.arrays import as_frames
from kinora.pipelines.world.scene import Scene

ZEROS = np.zeros((3, 64, 64, 3), np.uint8)
NAN = np.full((3, 64, 64, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("video", "given", "remedy"),
    [
        (ZEROS + np.float32(255), "float32 [3, 64, 64, 3]", "255 to 255: scale them to 0 to 1"),
        (torch.full((3, 64, 64, 3), -1.0), "float32 [3, 64, 64, 3]", "-1 to -1: scale"),
        (torch.full((3, 64, 64, 3), 2).bfloat16(), "bfloat16 [3, 64, 64, 3]", "2 to 2: scale"),
        (NAN, "float32 [3, 64, 64, 3]", "NaN"),
        (torch.from_numpy(NAN).bfloat16(), "bfloat16 [3, 64, 64, 3]", "NaN"),
        (np.zeros((0, 64, 64, 3), np.float32), "float32 [0, 64, 64, 3]", "at least one frame"),
        (ZEROS.astype(np.int64), "int64 [3, 64, 64, 3]", "astype"),
        (ZEROS.transpose(0, 3, 1, 2), "uint8 [3, 3, 64, 64]", "transpose(0, 2, 3, 1)"),
        (ZEROS[0], "uint8 [64, 64, 3]", "video[None]"),
        (ZEROS[..., :1], "uint8 [3, 64, 64, 1]", "transpose"),
        (ZEROS[:0], "uint8 [0, 64, 64, 3]", "at least one frame"),
        (ZEROS[:, :63], "uint8 [3, 63, 64, 3]", "resize"),
        (np.zeros((1, 64, 513, 3), np.uint8), "uint8 [1, 64, 513, 3]", "resize"),
        ([ZEROS[0]], "a list", "np.stack"),
    ],
)
def test_refused_videos(video: Any, given: str, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        judge(video, "a red circle")
    message = str(error.value)
    assert given in message and remedy in message and "uint8 [frames, height, width, 3]" in message
    assert "\n" not in message


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_floating_point_is_judged_as_its_bytes(truth: list[tuple[Scene, Any]], dtype: str) -> None:
    scene, video = truth[1]
    floats = torch.from_numpy(video).double() / 255
    given = floats.to(getattr(torch, dtype))
    exact = np.abs(as_frames(given).astype(int) - video).max()
    assert exact <= (1 if dtype == "bfloat16" else 0)  # which has 8 bits
    assert judge(given, scene.description)["world.all_correct"] == 1.0
    if dtype != "bfloat16":
        assert np.array_equal(as_frames(given.numpy()), video)


@pytest.mark.parametrize("caption", [None, 5, ["a red circle"] * 1000])
def test_captions_that_are_none(caption: Any) -> None:
    with pytest.raises(TypeError) as error:
        judge(ZEROS, caption)
    message = str(error.value)
    assert message.startswith("the caption is ") and "\n" not in message and len(message) < 200


def test_refused_caption() -> None:
    with pytest.raises(
        ValueError, match="'purpel' is no word of this world; the nearest is 'purple'"
    ):
        judge(ZEROS, "a purpel circle")
