"""Scores of many videos: means with their uncertainty, nulls counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...pipelines.world.scene import Description
from ..paired import mean_interval
from .scores import ALL_CORRECT, SCORES, WorldScores, judge


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Mean of a score over `n` videos with its 95 % bootstrap interval `low … high`.

    `nulls` videos had no score: for `world.all_correct` they count as 0 and are among the `n` (so
    that garbage never improves it), for the others they are left out. All None if `n` is 0.
    """

    n: int
    nulls: int
    mean: float | None
    low: float | None
    high: float | None


def judge_many(pairs: Iterable[tuple[Any, str | Description]]) -> list[WorldScores]:
    """`judge` for each (video, caption); from a generator one video at a time is held."""
    return [judge(video, caption) for video, caption in pairs]


def summary(judged: Sequence[WorldScores], *, seed: int = 0) -> dict[str, Aggregate]:
    """Every score over all `judged` videos, with a bootstrap that `seed` fixes.

    Raises:
        ValueError: no videos.
    """
    if not judged:
        raise ValueError("0 scores were given; a summary needs at least one: judge a video first")
    return {name: _aggregate([one[name] for one in judged], name, seed) for name in SCORES}


def _aggregate(values: list[float | None], name: str, seed: int) -> Aggregate:
    nulls = values.count(None)
    if name == ALL_CORRECT:
        kept = [value or 0.0 for value in values]
    else:
        kept = [value for value in values if value is not None]
    if not kept:
        return Aggregate(0, nulls, None, None, None)
    low, high = mean_interval(kept, seed)
    return Aggregate(len(kept), nulls, math.fsum(kept) / len(kept), low, high)
