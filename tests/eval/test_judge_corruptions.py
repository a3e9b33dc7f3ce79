"""Known damage: it lowers the scores that it should, the more the stronger, and no others."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest

from kinora.eval.world import SCORES, WorldScores, judge, summary
from kinora.eval.world.corruptions import SCENE_CORRUPTIONS, VIDEO_CORRUPTIONS
from kinora.pipelines.world.scene import Scene

Clips = list[tuple[Scene, Any]]
Draw = Callable[..., Any]

# Corruption → strength, the scores that fall by at least 0.03, those that may fall with them. All
# the others stay within 0.02 of the ground truth's.
VIDEO_CASES: dict[str, tuple[float, set[str], set[str]]] = {
    "h264": (18, {"imaging_quality"}, {"subject_consistency"}),
    "blur": (1.5, {"imaging_quality"}, {"subject_consistency"}),
    "noise": (10, {"imaging_quality", "temporal_flickering"}, {"subject_consistency"}),
    "reverse": (1, {"motion", "all_correct"}, set()),
    "freeze": (1, {"motion", "all_correct", "dynamic_degree"}, set()),
    "mirror": (1, {"motion", "spatial_relationship", "all_correct"}, set()),
    # Shaken by more than it moves in a frame, an object no longer moves steadily.
    "jitter": (4, {"motion_smoothness"}, {"dynamic_degree", "motion", "all_correct"}),
    "flicker": (
        0.15,
        {"background_consistency", "temporal_flickering", "subject_consistency"},
        {"imaging_quality"},
    ),
}
SCENE_CASES: dict[str, tuple[set[str], set[str]]] = {
    "recolour": ({"color", "multiple_objects", "all_correct"}, set()),
    "reshape": ({"object_class", "multiple_objects", "all_correct"}, set()),
    "remove": (
        {"object_class", "color", "count", "multiple_objects", "motion", "all_correct"},
        {"spatial_relationship", "dynamic_degree"},
    ),
    "add": ({"count", "all_correct"}, set()),
}


def _means(judged: list[WorldScores]) -> dict[str, float]:
    means = {name[6:]: one.mean for name, one in summary(judged).items()}
    return {name: value for name, value in means.items() if value is not None}


@pytest.fixture(scope="module")
def sound(truth: Clips) -> list[WorldScores]:
    return [judge(video, scene.description) for scene, video in truth]


def _compare(
    sound: list[WorldScores], hurt: list[WorldScores], hit: set[str], may: set[str]
) -> None:
    before, after = _means(sound), _means(hurt)
    for name in hit:
        assert after[name] <= before[name] - 0.03, name
    for name in set(before) - hit - may:
        assert abs(after[name] - before[name]) <= 0.02, name


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_damaged_videos(truth: Clips, sound: list[WorldScores], name: str) -> None:
    strength, hit, may = VIDEO_CASES[name]
    damage = VIDEO_CORRUPTIONS[name]
    hurt = [judge(damage(video, strength), scene.description) for scene, video in truth]
    _compare(sound, hurt, hit, may)


@pytest.mark.parametrize("name", SCENE_CASES)
def test_changed_scenes(truth: Clips, sound: list[WorldScores], draw: Draw, name: str) -> None:
    hit, may = SCENE_CASES[name]
    # The only object removed leaves a blank: see below.
    kept = [i for i, (scene, _) in enumerate(truth) if name != "remove" or len(scene.bodies) > 1]
    kept = kept[-6:]
    hurt: list[WorldScores] = []
    for i in kept:
        scene = truth[i][0]
        changed = SCENE_CORRUPTIONS[name](scene, random.Random(i))
        hurt.append(judge(draw(changed, 33, 128, 128), scene.description))
    _compare([sound[i] for i in kept], hurt, hit, may)


def test_a_mirrored_relation_is_the_wrong_way_round(truth: Clips) -> None:
    mirror = VIDEO_CORRUPTIONS["mirror"]
    for scene, video in truth:
        if scene.relation:
            value = judge(mirror(video, 1), scene.description)["world.spatial_relationship"]
            assert value == float(scene.relation in ("above", "below"))


@pytest.mark.parametrize(
    ("name", "strengths", "score"),
    [
        ("blur", (0, 0.7, 1, 1.5, 2, 3), "imaging_quality"),
        ("noise", (0, 5, 10, 20, 30), "imaging_quality"),
        ("noise", (0, 5, 10, 20, 30), "temporal_flickering"),
        ("noise", (0, 5, 10, 20, 30), "subject_consistency"),
        ("jitter", (0, 1, 2, 4, 6), "motion_smoothness"),
        ("flicker", (0, 0.03, 0.06, 0.12), "background_consistency"),
        ("flicker", (0, 0.03, 0.06, 0.12), "temporal_flickering"),
        ("h264", (18, 28, 38), "imaging_quality"),
    ],
)
def test_stronger_damage_scores_lower(
    truth: Clips, name: str, strengths: tuple[float, ...], score: str
) -> None:
    means: list[float] = []
    for strength in strengths:
        damaged = ((scene, VIDEO_CORRUPTIONS[name](video, strength)) for scene, video in truth[:4])
        scores = [judge(video, scene.description)[f"world.{score}"] for scene, video in damaged]
        means.append(statistics.mean(value or 0.0 for value in scores))
    assert all(later < earlier for earlier, later in pairwise(means)), means


@pytest.mark.parametrize(
    ("name", "reason"), [("gray_frames", "blank"), ("static", "no background")]
)
def test_nothing_to_judge_is_null_everywhere(truth: Clips, name: str, reason: str) -> None:
    for scene, video in truth[:4]:
        result = judge(VIDEO_CORRUPTIONS[name](video, 1), scene.description)
        assert set(result.scores) == set(SCORES)
        assert all(value is None for value in result.scores.values())
        assert all(said.startswith(reason) for said in result.reasons.values())


@pytest.mark.parametrize("side", [64, 128, 512])
def test_noise_of_any_kind_is_null(side: int) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    for video in (
        rng.integers(0, 256, (3, side, side, 3), np.uint8),
        np.kron(coarse, np.ones((1, side // 16, side // 16, 1), np.uint8)),
    ):
        result = judge(video, "a red circle")
        assert all(value is None for value in result.scores.values()), result.seen


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("level", [0, 128, 170, 255])
@pytest.mark.parametrize("still", [True, False])
def test_smooth_noise_of_low_contrast_is_null(level: int, still: bool, colours: int) -> None:
    rng = np.random.default_rng(level)
    for sigma, amplitude in itertools.product((2, 3, 5, 8, 12), (5, 10, 20, 30, 40)):
        grain = rng.standard_normal((1 if still else 3, 128, 128, colours), np.float32)
        smooth = np.stack([cv2.GaussianBlur(it, (0, 0), sigma) for it in grain])
        smooth = smooth.reshape(*grain.shape) * (amplitude / smooth.std())
        video = (level + smooth.repeat(3 // colours, -1).repeat(3 if still else 1, 0)).clip(0, 255)
        result = judge(video.astype(np.uint8), "a red circle")
        assert all(value is None for value in result.scores.values()), (sigma, amplitude, result)
        assert all("\n" not in reason for reason in result.reasons.values())


def test_damage_in_part_of_a_clip(truth: Clips, draw: Draw) -> None:
    """What changes half-way is inconsistent, and no longer correct."""
    scene, video = truth[0]
    for name, drop in (("recolour", 0.2), ("reshape", 0.05), ("remove", 0.3)):
        changed = SCENE_CORRUPTIONS[name](scene, random.Random(0))
        mixed = np.concatenate([video[:17], draw(changed, 33, 128, 128)[17:]])
        result = judge(mixed, scene.description)
        consistency = result["world.subject_consistency"]
        assert consistency is not None and consistency < 1 - drop, name
        assert result["world.all_correct"] == 0.0
