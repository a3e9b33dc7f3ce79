"""What the judge refuses: one line that names what was given, what is allowed, and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kinora.eval.world import judge

ZEROS = np.zeros((3, 64, 64, 3), np.uint8)
NAN = np.full((3, 64, 64, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("video", "given", "remedy"),
    [
        (ZEROS.astype(np.float32), "float32 [3, 64, 64, 3]", "* 255"),
        (torch.zeros(3, 64, 64, 3), "float32 [3, 64, 64, 3]", "* 255"),
        (NAN, "float32 [3, 64, 64, 3]", "NaN"),
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


def test_refused_caption() -> None:
    with pytest.raises(
        ValueError, match="'purpel' is no word of this world; the nearest is 'purple'"
    ):
        judge(ZEROS, "a purpel circle")
