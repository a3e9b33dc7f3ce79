"""A video taken apart: backgrounds, objects, tracks, and whether there is anything to judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pipelines.world.scene import HEADINGS
from .arrays import Bytes, as_frames
from .backdrop import find_backdrops
from .blobs import Frame, take_apart
from .tracks import Track, follow, motion

# Share of the frames that must have a background and an object for a clip to be judged at all.
LEAST_VALID = 0.5


@dataclass(frozen=True, slots=True)
class Perception:
    """What the judge sees in a video; tracks are sorted, the longest first.

    `reason` says why the video cannot be judged (blank, noise); it is empty otherwise.
    """

    video: Bytes
    frames: tuple[Frame, ...]
    tracks: tuple[Track, ...]
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        names = [frame.backdrop.name or "an unknown background" for frame in self.frames]
        least = len(self.frames) / 4
        long = [self._tell(track) for track in self.tracks if len(track.blobs) >= least]
        seen = ", ".join(long) or "no lasting object"
        return f"{seen} on {max(sorted(set(names)), key=names.count)}"

    def _tell(self, track: Track) -> str:
        count = len(self.frames)
        colour = track.blobs[len(track.blobs) // 2].colour or "oddly coloured"
        shape = track.shape if any(track.shapes) else "object of no known shape"
        moving = motion(track, count) or ("in no known motion" if count > 1 else "")
        moving = f"moving {moving}" if moving in HEADINGS else moving
        words = " ".join(filter(None, (colour, shape, moving)))
        return f"{words} ({len(track.blobs)} of {count} frames)"


def perceive(video: Any) -> Perception:
    """Take a video `[F, H, W, 3]` apart; see `judge` for what it may be."""
    images = as_frames(video)
    backdrops = find_backdrops(images)
    frames = tuple(
        take_apart(image, index, backdrop)
        for index, (image, backdrop) in enumerate(zip(images, backdrops, strict=True))
    )
    valid = np.array([bool(frame.blobs) for frame in frames])
    if valid.mean() < LEAST_VALID:
        reasons = [frame.reason or "blank: no object" for frame in frames if not frame.blobs]
        kinds = [reason.split(":")[0] for reason in reasons]
        kind = max(sorted(set(kinds)), key=kinds.count)
        return Perception(images, frames, (), reasons[kinds.index(kind)])
    return Perception(images, frames, tuple(follow(list(frames))))
