"""VBench's temporal flickering: its formula, and how a file is decoded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kinora.eval.clips import Clip
from kinora.eval.flicker import UNFILTERED, measure, temporal_flickering
from kinora.pipelines.media import encode


def by_the_formula(frames: list[Any]) -> float:
    """As the package writes it, in float32."""
    gaps = [
        np.mean(cv2.absdiff(a.astype(np.float32), b.astype(np.float32)))
        for a, b in pairwise(frames)
    ]
    return (255.0 - np.mean(gaps).item()) / 255.0


def test_it_is_the_packages_formula_to_a_millionth(truth: list[tuple[Any, Any]], tmp_path: Path):
    for index, (_, video) in enumerate(truth[:4]):
        assert temporal_flickering(video) == pytest.approx(by_the_formula(list(video)), abs=1e-6)
        path = tmp_path / f"{index}.mp4"
        path.write_bytes(encode(video, "mp4", 16, ""))
        capture, frames = cv2.VideoCapture(str(path)), []
        while (read := capture.read())[0]:
            frames.append(read[1])
        found = measure(Clip(path))
        assert found.score == pytest.approx(by_the_formula(frames), abs=1e-6)
        assert found.notes == (UNFILTERED,)


def test_known_values() -> None:
    still = np.full((5, 8, 8, 3), 90, np.uint8)
    assert temporal_flickering(still) == 1.0
    blinking = still.copy()
    blinking[1::2] = 141
    assert temporal_flickering(blinking) == pytest.approx(1 - 51 / 255)


def test_a_single_frame_has_none(tmp_path: Path) -> None:
    frame = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 2, not 1"):
        temporal_flickering(frame)
    path = tmp_path / "one.png"
    path.write_bytes(encode(frame, "png", 16, ""))
    assert measure(Clip(path)).status == "skipped"
