"""VBench's temporal flickering: how little neighbouring frames differ.

The one dimension of VBench that needs no model: (255 − mean absolute difference of neighbouring
frames) / 255, mean over the clip. It counts motion as flicker, which is why VBench takes it of
videos that a filter (which needs RAFT's weights) has found to be still; here no clip is filtered.
Source: Huang et al., VBench (arXiv 2311.17982), as the package 0.1.5 computes it.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from .clips import Clip
from .fidelity import Frames
from .result import Result, ok, skipped

UNFILTERED = "no clip was filtered for stillness, so motion counts as flicker"


def temporal_flickering(frames: Frames) -> float:
    """Of frames `[F, height, width, 3]` uint8, in any order of colours.

    Raises:
        ValueError: fewer than two frames.
    """
    if len(frames) < 2:
        raise ValueError(f"flicker is between frames: give at least 2, not {len(frames)}")
    gaps = [cv2.absdiff(a, b).mean(dtype=np.float64) for a, b in pairwise(frames)]
    return (255.0 - float(np.mean(gaps))) / 255.0


def measure(clip: Clip) -> Result:
    """Of a clip, decoded as the package does: by OpenCV, whose colours differ in the last bits."""
    frames = clip.frames() if clip.lossless else _opencv_frames(clip)
    if len(frames) < 2:
        return skipped("one frame: there is nothing to flicker between")
    return ok(temporal_flickering(frames), UNFILTERED)


def _opencv_frames(clip: Clip) -> Frames:
    """Frames in OpenCV's order of colours; where it cannot read the file, as we read it."""
    video = cv2.VideoCapture(str(clip.path))
    frames: list[Frames] = []
    while video.isOpened():
        there, frame = video.read()
        if not there:
            break
        frames.append(np.asarray(frame, dtype=np.uint8))
    video.release()
    return clip.whole(np.stack(frames)) if frames else clip.frames()
