"""Objects followed through a clip: which shape they have and how they move."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from ...pipelines.world.scene import FPS
from ...pipelines.world.shapes import SHAPES
from .arrays import Array
from .blobs import Blob, Frame
from .outlines import match, stretch, turn

# Farthest step between frames, in shorter sides; the fastest object of the world makes 0.016, and a
# jitter of 4 pixels at 64 makes 0.18.
FARTHEST_STEP = 0.2
# A change of colour weighs as much as this distance when blobs are linked.
_COLOUR_STEP = 0.1
# Frames over which evidence about a shape is averaged.
WINDOW = 5
# Soft Dice below which an outline is none of the world's shapes. The world's own stay above 0.985
# after H.264 at 128 and above 0.97 at 64; an ellipse of 3 : 2 makes 0.91, such a rectangle 0.87.
LEAST_DICE = 0.92
# Stretch (see `outlines`) from which on it is none either. The world's own stay below 0.04 after
# H.264 at 128, 0.07 at 64, with noise of sigma 25 or after an autoencoder of 31 dB, and 0.11 after
# H.264 at crf 28; an ellipse of 20 : 17 makes 0.16.
LARGEST_STRETCH = 0.14

# Motions are named from these changes on, half of the least that the world shows in a clip of
# `seconds`: travel in shorter sides, logarithm of the radius, turn in radians.
_LEAST_TRAVEL = (0.16, 0.20)  # a second, and at most
_LEAST_GROWTH = math.log(1.6)  # in two seconds or more
_LEAST_TURN = math.radians(65)  # a second, for two seconds at most
# A heading is named within this angle of it.
_HEADING_COSINE = math.cos(math.radians(30))
# A motion is named if the object is seen in this share of the frames.
_LEAST_SEEN = 0.7
# A motion is steady if each of `_PARTS` parts of the clip (fewer, where these would have less than
# `_PART_STEPS`) goes at so many times the mean speed, and the steps back make at most such a share
# of the way. At 128, H.264 at crf 18 leaves the pace within 0.83 … 1.09, crf 28, noise of sigma 25
# and blur of sigma 2 within 0.76 … 1.29; a frozen or reversed quarter makes 0 or less. Steps back:
# below 0.06 there, 0.12 for noise of sigma 10 over 129 frames; pairs of frames exchanged make 0.5.
_PARTS, _PART_STEPS = 4, 4
PACE = (0.35, 2.0)
LARGEST_RETURN = 0.3
# Largest rms, in thresholds, about the line of anything that the motion does not change: 0.06 under
# the damage above, 0.07 after an autoencoder of 31 dB, 0.21 for noise of sigma 10, 5 frames, at 64.
LARGEST_REST = 0.35


@dataclass(slots=True)
class Track:
    """One object over time; the lists and arrays run over the frames in which it is seen.

    `dice` `[n, shapes]`: agreement with each shape, blurred as fits, averaged over `WINDOW` frames;
    `stretch` `[n]`: see `outlines`, averaged likewise; `shapes`: the best one of each frame, None
    if that is unlike all or stretched; `sharp` `[n]`: agreement with the sharp outline of the best
    shape; `angles` `[n]`: unwrapped, in radians.
    """

    blobs: list[Blob] = field(default_factory=list)
    dice: Array = field(default_factory=lambda: np.zeros((0, len(SHAPES)), np.float32))
    shapes: list[str | None] = field(default_factory=list)
    sharp: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    stretch: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    angles: Array = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def frames(self) -> list[int]:
        """Numbers of the frames in which the object is seen."""
        return [blob.frame for blob in self.blobs]

    @property
    def shape(self) -> str:
        """The shape that agrees best over the whole track."""
        return tuple(SHAPES)[int(self.dice.mean(0).argmax())]

    def state(self) -> Array:
        """`[n, 4]`: x, y, logarithm of the radius, angle."""
        rows = [(blob.x, blob.y, math.log(blob.radius)) for blob in self.blobs]
        return np.column_stack([np.array(rows, np.float32), self.angles]).astype(np.float32)


def follow(frames: list[Frame]) -> list[Track]:
    """Link the blobs of successive frames, nearest first, into tracks; longest first."""
    tracks: list[Track] = []
    for frame in frames:
        free = list(frame.blobs)
        pairs = sorted(
            (
                (_step(track.blobs[-1], blob), t, b)
                for t, track in enumerate(tracks)
                for b, blob in enumerate(free)
            ),
        )
        taken: set[int] = set()
        linked: set[int] = set()
        for step, t, b in pairs:
            if step <= FARTHEST_STEP and t not in linked and b not in taken:
                tracks[t].blobs.append(free[b])
                linked.add(t)
                taken.add(b)
        tracks += [Track([blob]) for b, blob in enumerate(free) if b not in taken]
    for track in tracks:
        _recognise(track)
    return sorted(tracks, key=lambda track: -len(track.blobs))


def _step(one: Blob, other: Blob) -> float:
    return math.hypot(one.x - other.x, one.y - other.y) + _COLOUR_STEP * (
        one.colour != other.colour
    )


def _recognise(track: Track) -> None:
    outlines = np.stack([blob.outline for blob in track.blobs])
    single, sharp = match(outlines, np.array([blob.radius_px for blob in track.blobs], np.float32))
    track.dice, track.stretch = _pool(single), _pool(stretch(outlines))
    track.sharp = sharp[np.arange(len(sharp)), track.dice.argmax(1)]
    names = tuple(SHAPES)
    track.shapes = [
        names[int(row.argmax())] if row.max() >= LEAST_DICE and wide <= LARGEST_STRETCH else None
        for row, wide in zip(track.dice, track.stretch, strict=True)
    ]
    symmetry = math.radians(SHAPES[track.shape].symmetry)
    angles = turn(outlines, track.shape)
    track.angles = np.unwrap(angles, period=symmetry).astype(np.float32) if symmetry else angles


def _pool(values: Array) -> Array:
    """Values `[n, …]` averaged over `WINDOW` frames around each."""
    half = WINDOW // 2
    return np.stack([values[max(i - half, 0) : i + half + 1].mean(0) for i in range(len(values))])


def thresholds(frames: int) -> Array:
    """Least x, y, growth and turn over a clip of `frames` that are called a motion, `[4]`."""
    seconds = (frames - 1) / FPS
    travel = min(_LEAST_TRAVEL[0] * seconds, _LEAST_TRAVEL[1])
    growth, spin = _LEAST_GROWTH * min(seconds / 2, 1), _LEAST_TURN * min(seconds, 2.0)
    return np.array([travel / 2, travel / 2, growth / 2, spin / 2], np.float32)


def changes(track: Track, frames: int) -> tuple[Array, Array]:
    """Change over the clip along the least-squares line, and rms about it; in thresholds, `[4]`."""
    time = np.array(track.frames, np.float32) / max(frames - 1, 1)
    time -= time.mean()
    state = track.state()
    state -= state.mean(0)
    power = np.float32(max(float((time**2).sum()), 1e-6))
    slope = (time[:, None] * state).sum(0) / power
    rest = np.sqrt(np.mean((state - time[:, None] * slope) ** 2, axis=0))
    least = thresholds(frames)
    return (slope / least).astype(np.float32), (rest / least).astype(np.float32)


def pace(track: Track, column: int) -> tuple[float, float, float]:
    """How evenly one column of the track's state changes.

    Returns:
        Speed of the slowest and of the fastest part over the mean speed, and the sum of the steps
        back over the way from first to last; 1, 1, 0 at constant speed.
    """
    time, state = np.array(track.frames, np.float64), track.state()[:, column].astype(np.float64)
    way = float(state[-1] - state[0]) or 1e-9
    parts = min(_PARTS, max((len(time) - 1) // _PART_STEPS, 1))
    ends = np.linspace(0, len(time) - 1, parts + 1).round().astype(int)
    speeds = np.diff(state[ends]) / np.diff(time[ends]) * (time[-1] - time[0]) / way
    back = float(np.maximum(-np.diff(state) / way, 0).sum())
    return float(speeds.min()), float(speeds.max()), back


def strengths(change: Array) -> tuple[float, float, float]:
    """Travel, growth and turn of a `change` in thresholds, regardless of their direction."""
    x, y, growth, turned = (abs(float(value)) for value in change)
    return math.hypot(x, y), growth, turned


def motion(track: Track, frames: int) -> str | None:
    """The motion of the world that a track shows in a clip of `frames`, or None.

    It is the only change above its threshold, `still` if there is none. None: one frame, seen too
    rarely, two motions at once, a heading more than 30° off every axis, or no steady motion
    (paused, turned back, frames out of order), or what should not change goes to and fro.
    """
    if frames < 2 or len(track.blobs) < max(_LEAST_SEEN * frames, 2):
        return None
    change, rest = changes(track, frames)
    seen = strengths(change)
    moved = sum(strength >= 1 for strength in seen)
    if moved == 0:
        return "still" if rest.max() <= LARGEST_REST else None
    column = max(((0, 1), (2,), (3,))[int(np.argmax(seen))], key=lambda i: abs(change[i]))
    slowest, fastest, back = pace(track, column)
    steady = slowest >= PACE[0] and fastest <= PACE[1] and back <= LARGEST_RETURN
    if moved > 1 or not steady or np.delete(rest, column).max() > LARGEST_REST:
        return None
    if column == 2:
        return "growing" if change[2] > 0 else "shrinking"
    if column == 3:
        return "spinning"
    if abs(float(change[column])) < seen[0] * _HEADING_COSINE:
        return None
    return (("left", "right"), ("up", "down"))[column][int(change[column] > 0)]


def moves(track: Track, frames: int) -> bool:
    """Whether anything of the object changes by more than a motion's threshold, however it goes."""
    if frames < 2:
        return False
    return bool((np.ptp(track.state(), axis=0) / thresholds(frames)).max() >= 1)
