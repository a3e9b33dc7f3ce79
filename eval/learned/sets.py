"""FID and FVD: one number of all videos and all references, none of a single video."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from ..cache import Cache
from ..clips import Clip, EvalError
from ..registry import Metric
from ..result import Result, Total, failed, ok
from . import client
from .client import Runner
from .frechet import Values, distance
from .spec import FEW_FRAMES, FEW_VIDEOS, Tools

LEAST_FRAMES = 10
"""Of a video for I3D, which halves time three times."""


def measure(
    metric: Metric, clips: Sequence[Clip], references: Sequence[Clip], cache: Cache, tools: Tools
) -> Generator[Path, None, Total]:
    """The distance of the videos' features from the references'; yields each file as it is read.

    FID is of frames, FVD of videos. Without the features of some the distance of the others is no
    mean of all, but the `partial_mean`.
    """
    name = metric.name
    without = client.without(name, tools)
    if without is not None:
        return _total(without, 0, len(clips))
    try:
        parts = [it.sha256() for it in (*clips, *references)]
        key = [name, str(metric.version), client.identity(name, tools), str(len(clips)), *parts]
    except EvalError as error:
        key, before = None, None
        broken = str(error)
    else:
        before, broken = cache.get(key), ""
    if before is not None:
        return _total(before, len(clips), len(clips))
    found: list[list[Values]] = []
    reasons: list[str] = [broken] if broken else []
    used = 0
    for group in (clips, references):
        features: list[Values] = []
        for clip in group:
            its = _features(name, clip, tools)
            yield clip.path
            if isinstance(its, Result):
                reasons.append(its.reason)
                if its.status == "skipped":
                    return _total(its, 0, len(clips))
                continue
            features.append(its)
            used += group is clips
        found.append(features)
    if not all(found):
        return _total(failed(f"{name}: {reasons[0]}"), 0, len(clips))
    try:
        ours, theirs = (np.concatenate(it) for it in found)
        result = ok(distance(ours, theirs), *_notes(name, ours, theirs))
    except ValueError as error:
        return _total(failed(f"{name}: {error}"), 0, len(clips))
    if reasons:
        why = f"without {len(reasons)} files; {reasons[0]}"
        partial = Result("partial", result.score, why, result.notes)
        return _total(partial, used, len(clips))
    if key is not None:
        cache.put(key, result)
    return _total(result, used, len(clips))


def _features(name: str, clip: Clip, tools: Tools) -> Values | Result:
    try:
        frames = clip.frames()
    except EvalError as error:
        return failed(str(error))
    if name == "fvd" and len(frames) < LEAST_FRAMES:
        return failed(f"{clip.path} has {len(frames)} frames, fvd needs {LEAST_FRAMES}")
    runner = client.runner(name, tools)
    if isinstance(runner, Result):
        return runner
    return _asked(runner, name, clip, frames)


def _asked(runner: Runner, name: str, clip: Clip, frames: np.ndarray) -> Values | Result:
    given, out = (client.scratch() / f"{it}.npy" for it in ("frames", "features"))
    np.save(given, frames)
    told = runner.ask(frames=str(given), out=str(out))
    if "features" not in told:
        return failed(f"{name} of {clip.path}: {told.get('error', 'no features')}")
    return np.load(out).astype(np.float64)


def _notes(name: str, ours: Values, theirs: Values) -> list[str]:
    few, what = (FEW_VIDEOS, "videos") if name == "fvd" else (FEW_FRAMES, "frames")
    count = min(len(ours), len(theirs))
    if count >= few:
        return []
    return [f"{name} of {count} {what}: below {few} it says more of their number than of them"]


def _total(result: Result, n: int, asked: int) -> Total:
    whole = result.score if result.status == "ok" else None
    part = result.score if result.status == "partial" else None
    return Total(
        result.status, n, asked, whole, None, None, part, result.reason, tuple(result.notes)
    )
