"""How a video is drawn, whatever its caption says: steadiness, flicker, clarity."""

from __future__ import annotations

import cv2
import numpy as np

from .arrays import Array
from .outlines import likeness
from .perceive import Perception
from .tracks import Track, moves

ONE_FRAME = "one frame"
FEW_FRAMES = "fewer than three frames in a row"
_NO_BACKGROUND = "no background between two frames"

# Differences at which a likeness is 0. Soft Dice: a circle and a square agree by 0.94, the most of
# all shapes. ΔE: two colours of the world are 40 apart.
_DICE_GAP = 0.2
_COLOUR_GAP = 40.0
_BACKDROP_GAP = 40.0
# Error against the mean of both neighbours at which motion is not smooth, in shorter sides.
_ROUGH = 0.05
# ΔE at which a colour or a background is no longer clean.
_DIRT = 40.0


def measure(seen: Perception, subjects: list[Track]) -> dict[str, float | str]:
    """The scores of drawing, with regard to the tracks `subjects`; a string says why none."""
    told: dict[str, float | str] = {
        f"world.{name}": ONE_FRAME
        for name in (
            *("subject_consistency", "background_consistency", "motion_smoothness"),
            *("temporal_flickering", "dynamic_degree"),
        )
    }
    if len(seen.frames) > 1:
        told["world.subject_consistency"] = _subject_consistency(seen, subjects)
        told["world.background_consistency"] = _background_consistency(seen)
        told["world.motion_smoothness"] = _smoothness(subjects)
        told["world.temporal_flickering"] = _flickering(seen)
        moving = any(moves(track, len(seen.frames)) for track in subjects)
        told["world.dynamic_degree"] = float(moving)
    told["world.imaging_quality"] = _imaging(seen, subjects)
    return told


def _near(difference: Array, gap: float) -> Array:
    return np.clip(1 - difference / gap, 0, 1)


def _subject_consistency(seen: Perception, subjects: list[Track]) -> float:
    """VBench's form, (to the previous + to the first frame) / 2, times the share of frames in which
    the subject is seen; likeness is that of outlines (turned and scaled freely) times colours."""
    values: list[float] = []
    for track in subjects:
        outlines = np.stack([blob.outline for blob in track.blobs])
        colours = np.stack([blob.lab for blob in track.blobs])
        visible = len(track.blobs) / len(seen.frames)
        if len(outlines) < 2:
            values.append(visible)
            continue
        parts = []
        for others, other_colours in (
            (outlines[:-1], colours[:-1]),
            (np.repeat(outlines[:1], len(outlines) - 1, axis=0), colours[:1]),
        ):
            shapes = _near(1 - likeness(outlines[1:], others), _DICE_GAP)
            gaps = np.sqrt(((colours[1:] - other_colours) ** 2).sum(-1))
            parts.append(float((shapes * _near(gaps, _COLOUR_GAP)).mean()))
        values.append(visible * sum(parts) / 2)
    return float(np.mean(values))


def _background_consistency(seen: Perception) -> float:
    """The same form on the mean colours of the background in a grid over the frame."""
    grids = np.stack([frame.grid for frame in seen.frames])
    parts: list[float] = []
    for others in (grids[:-1], grids[:1]):
        gaps = np.sqrt(((grids[1:] - others) ** 2).sum(-1))
        parts.append(float(_near(gaps, _BACKDROP_GAP).mean()))
    return sum(parts) / 2


def _smoothness(subjects: list[Track]) -> float | str:
    """1 - error of each frame's state against the mean of its neighbours, over `_ROUGH`.

    The state in shorter sides: the centre, the radius, and the way that a turn makes at the radius.
    """
    errors: list[float] = []
    for track in subjects:
        frames = np.array(track.frames)
        state = track.state()
        if len(frames) < 3:
            continue
        radius = np.exp(state[1:-1, 2])
        bend = np.abs(state[1:-1] - (state[:-2] + state[2:]) / 2)
        off = np.hypot(bend[:, 0], bend[:, 1]) + radius * (bend[:, 2] + bend[:, 3])
        errors += off[frames[2:] - frames[:-2] == 2].tolist()
    if not errors:
        return FEW_FRAMES
    return float(_near(np.array(errors, np.float32), _ROUGH).mean())


def _flickering(seen: Perception) -> float | str:
    """VBench's (255 - mean absolute difference of successive frames) / 255, background only."""
    values: list[float] = []
    for i, (one, other) in enumerate(zip(seen.frames, seen.frames[1:], strict=False)):
        both = one.behind & other.behind
        if both.any():
            change = cv2.absdiff(seen.video[i], seen.video[i + 1])
            values.append(255 - float(np.mean(cv2.mean(change, both.view(np.uint8))[:3])))
    return float(np.mean(values)) / 255 if values else _NO_BACKGROUND


def _imaging(seen: Perception, subjects: list[Track]) -> float:
    """Outlines' agreement with sharp shapes × purity of colours × cleanness of the background."""
    outlines = float(np.mean([track.sharp.mean() for track in subjects]))
    dirt = [blob.off_colour for track in subjects for blob in track.blobs]
    behind = [frame.off_backdrop for frame in seen.frames if frame.blobs]
    purity = float(_near(np.array(dirt, np.float32), _DIRT).mean())
    clean = float(_near(np.array(behind, np.float32), _DIRT).mean())
    return outlines * purity * clean
