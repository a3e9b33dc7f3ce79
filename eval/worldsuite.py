"""The world's judge as metrics: `world.*` of a clip by its prompt."""

from __future__ import annotations

from ..pipelines.world.grammar import parse
from .clips import Clip
from .fidelity import Frames
from .result import Result, ok, skipped
from .world import ALL_CORRECT, WorldScores, judge
from .world.scores import NOT_ASKED

NO_PROMPT = "no prompt is known: give --prompts, or videos with Kinora's sidecar"


def measure(clip: Clip, frames: Frames, metrics: tuple[str, ...]) -> dict[str, Result]:
    """Scores of `frames` by the clip's prompt; skipped where that is none of the world's."""
    if clip.prompt is None:
        return dict.fromkeys(metrics, skipped(NO_PROMPT))
    try:
        caption = parse(clip.prompt)
        scores = judge(frames, caption)
    except ValueError as error:
        return dict.fromkeys(metrics, skipped(" ".join(str(error).split())))
    return {name: _result(scores, name) for name in metrics}


def _result(scores: WorldScores, name: str) -> Result:
    value, why = scores[name], scores.reasons.get(name, "")
    if value is not None:
        return ok(value)
    if name == ALL_CORRECT:  # garbage never improves the headline
        return ok(0.0, f"counted as 0: {why}")
    return skipped(why, applies=why != NOT_ASKED)
