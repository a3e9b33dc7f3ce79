"""The scores of one video: what its caption asks for, and how well it is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...pipelines.world.grammar import parse
from ...pipelines.world.scene import Description, Thing
from . import quality
from .blobs import Blob
from .perceive import Perception, perceive
from .tracks import Track, motion

SCORES = tuple(
    f"world.{name}"
    for name in (
        *("object_class", "color", "count", "multiple_objects", "spatial_relationship"),
        *("motion", "scene", "subject_consistency", "background_consistency"),
        *("motion_smoothness", "temporal_flickering", "dynamic_degree", "imaging_quality"),
        "all_correct",
    )
)
ALL_CORRECT = "world.all_correct"

# Share of the frames in which an atom must hold to count for `all_correct`: 3 of 33 may be wrong.
LEAST_SHARE = 0.9
# Distance along a relation's axis, in shorter sides; the least that the world shows is 0.17.
LEAST_APART = 0.06
NOT_ASKED = "not asked"
STILL_IMAGE = "one frame: a still image cannot show the motion asked for"
_RELATION_AXIS: dict[str, tuple[int, int]] = {
    "left of": (1, 0),
    "right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}


@dataclass(frozen=True, slots=True)
class WorldScores:
    """Scores of one video by name, 0 to 1 or None; `reasons` says of each None why."""

    scores: Mapping[str, float | None]
    reasons: Mapping[str, str]
    seen: str

    def __getitem__(self, name: str) -> float | None:
        return self.scores[name]


@dataclass(frozen=True, slots=True)
class _Sight:
    """One frame against the caption: which blob stands for each thing, and what fits of it."""

    blobs: tuple[Blob | None, ...]
    shapes: tuple[bool, ...]
    colours: tuple[bool, ...]
    count: int

    @property
    def bound(self) -> bool:
        """Every thing is there with its shape and its colour."""
        return all(self.shapes) and all(self.colours)


def judge(video: Any, caption: str | Description) -> WorldScores:
    """Score a video by what its caption says.

    Args:
        video: `[F, H, W, 3]` uint8 or floating point in 0 to 1, numpy or torch, sides 64 to 512,
            shown at `FPS`.
        caption: a caption of the world, or what it means. What it leaves open is not checked.

    Raises:
        ValueError: the video has another form, or the caption is none of the world's.
        TypeError: the caption is neither a text nor a `Description`.
    """
    if isinstance(caption, str):
        caption = parse(caption)
    elif not isinstance(caption, Description):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"the caption is {caption!r:.60}: give a text, such as 'a red circle', or a Description"
        )
    return score(perceive(video), caption)


def score(seen: Perception, description: Description) -> WorldScores:
    """The scores of a perceived video; `judge` is `score(perceive(video), parse(caption))`."""
    if seen.reason:
        return WorldScores(dict.fromkeys(SCORES), dict.fromkeys(SCORES, seen.reason), seen.reason)
    sights = _sights(seen, description.things)
    told = _semantics(seen, description, sights)
    told |= quality.measure(seen, _subjects(seen, sights, len(description.things)))
    told[ALL_CORRECT] = _all_correct(told, sights)
    scores = {name: value if isinstance(value, float) else None for name, value in told.items()}
    reasons = {name: value for name, value in told.items() if isinstance(value, str)}
    return WorldScores({name: scores[name] for name in SCORES}, reasons, str(seen))


def _sights(seen: Perception, things: tuple[Thing, ...]) -> list[_Sight]:
    """For each frame the assignment of blobs to things under which most fits."""
    shapes: dict[int, str | None] = {}
    for track in seen.tracks:
        shapes |= {id(blob): shape for blob, shape in zip(track.blobs, track.shapes, strict=True)}
    sights: list[_Sight] = []
    for frame in seen.frames:
        # A thing may be missing, hence the None for each.
        options = [*frame.blobs, *(None for _ in things)]
        best: tuple[float, _Sight] | None = None
        for blobs in itertools.permutations(options, len(things)):
            pairs = list(zip(blobs, things, strict=True))
            same_shape = tuple(b is not None and shapes[id(b)] == t.shape for b, t in pairs)
            same_colour = tuple(b is not None and b.colour == t.colour for b, t in pairs)
            # Shapes weigh more: a blue circle and a red square instead of a red circle and a blue
            # square are right shapes in wrong colours. Being there at all weighs a little.
            there = sum(blob is not None for blob in blobs)
            fit = sum(same_shape) + 0.9 * sum(same_colour) + 0.01 * there
            if best is None or fit > best[0]:
                best = fit, _Sight(blobs, same_shape, same_colour, len(frame.blobs))
        assert best is not None
        sights.append(best[1])
    return sights


def _share(values: list[bool]) -> float:
    return sum(values) / len(values)


def _semantics(
    seen: Perception, asked: Description, sights: list[_Sight]
) -> dict[str, float | str]:
    """Scores of what the caption says; a string says why there is none."""
    told: dict[str, float | str] = {
        "world.object_class": _share([all(sight.shapes) for sight in sights]),
        "world.color": _share([colour for sight in sights for colour in sight.colours]),
        "world.count": _share([sight.count == len(asked.things) for sight in sights]),
        "world.multiple_objects": NOT_ASKED,
        "world.spatial_relationship": NOT_ASKED,
        "world.motion": _motion(seen, asked, sights),
        "world.scene": NOT_ASKED,
    }
    if len(asked.things) > 1:
        told["world.multiple_objects"] = _share([sight.bound for sight in sights])
    if asked.relation:
        told["world.spatial_relationship"] = _share([_holds(asked.relation, s) for s in sights])
    if asked.background:
        names = [frame.backdrop.name for frame in seen.frames]
        told["world.scene"] = _share([name == asked.background for name in names])
    return told


def _holds(relation: str, sight: _Sight) -> bool:
    """Whether the first thing stands so to the second; each must be known by shape or colour."""
    first, second = sight.blobs
    known = [shape or colour for shape, colour in zip(sight.shapes, sight.colours, strict=True)]
    if first is None or second is None or not all(known):
        return False
    dx, dy = _RELATION_AXIS[relation]
    return dx * (second.x - first.x) + dy * (second.y - first.y) >= LEAST_APART


def _track_of(seen: Perception, sights: list[_Sight], thing: int) -> Track | None:
    """The track that stands for a thing in most frames."""
    mine = {id(sight.blobs[thing]) for sight in sights if sight.blobs[thing] is not None}
    held = [sum(id(blob) in mine for blob in track.blobs) for track in seen.tracks]
    return seen.tracks[held.index(max(held))] if held and max(held) else None


def _subjects(seen: Perception, sights: list[_Sight], things: int) -> list[Track]:
    """The tracks of the captioned things, or the longest tracks where these are others."""
    subjects = [_track_of(seen, sights, thing) for thing in range(things)]
    kept: list[Track] = []
    for track in (*subjects, *seen.tracks):
        if track is not None and not any(track is other for other in kept):
            kept.append(track)
    return kept[: min(things, len(seen.tracks))]


def _motion(seen: Perception, asked: Description, sights: list[_Sight]) -> float | str:
    wanted = [(i, thing.motion) for i, thing in enumerate(asked.things) if thing.motion]
    if not wanted:
        return NOT_ASKED
    if len(seen.frames) < 2:
        return quality.ONE_FRAME
    right: list[bool] = []
    for thing, name in wanted:
        track = _track_of(seen, sights, thing)
        right.append(track is not None and motion(track, len(seen.frames)) == name)
    return _share(right)


def _all_correct(told: Mapping[str, float | str], sights: list[_Sight]) -> float | str:
    """1 if every asked atom holds (things bound to shape and colour, number, relation, background
    in `LEAST_SHARE` of the frames, every motion), else 0; none where a motion cannot be seen."""
    moved = told["world.motion"]
    if moved == quality.ONE_FRAME:
        return STILL_IMAGE
    atoms = ("count", "spatial_relationship", "scene")
    shares = [told[f"world.{atom}"] for atom in atoms]
    shares.append(_share([sight.bound for sight in sights]))
    held = all(share >= LEAST_SHARE for share in shares if isinstance(share, float))
    return float(held and (isinstance(moved, str) or math.isclose(moved, 1.0)))
