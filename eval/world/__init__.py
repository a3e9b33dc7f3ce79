"""The analytic judge: what a video of the world shows, against its caption, without any model.

Analysis by synthesis: each frame's background is one of the world's, found by comparison with
`pipelines.world.render.background`; what differs are objects; their outlines are compared with the
six shapes at every turn; objects are followed through the clip and their motion is named.

    judge(video, "a red circle moving left over a black background")["world.all_correct"]

Names resemble VBench's dimensions, whose questions these scores ask, but they are no VBench scores;
hence the prefix `world.`. Invalid input (blank, noise) scores None, with the reason.
"""

from .perceive import Perception, perceive
from .scores import ALL_CORRECT, SCORES, WorldScores, judge, score
from .summary import Aggregate, judge_many, summary

__all__ = [
    "ALL_CORRECT",
    "SCORES",
    "Aggregate",
    "Perception",
    "WorldScores",
    "judge",
    "judge_many",
    "perceive",
    "score",
    "summary",
]
