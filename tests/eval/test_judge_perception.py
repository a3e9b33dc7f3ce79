"""Borderline pictures: no shape of the world, no background of the world, objects that touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from kinora.eval.world import judge, perceive
from kinora.eval.world.arrays import median
from kinora.eval.world.corruptions import blur, h264
from kinora.eval.world.tracks import LARGEST_STRETCH
from kinora.pipelines.world.palette import COLOURS
from kinora.pipelines.world.scene import LEAST_RADIUS, Body, Scene, Thing

Draw = Callable[[Scene, int, int, int], Any]
RED = COLOURS["red"]


def _paint(points: list[tuple[float, float]]) -> Any:
    """A red polygon on black, anti-aliased, one frame of 128."""
    image = np.full((512, 512, 3), 8, np.uint8)
    cv2.fillPoly(image, [np.array(points, np.int32)], RED)
    return cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA)[None]


def _ellipse(ratio: float) -> list[tuple[float, float]]:
    turns = [i * math.tau / 90 for i in range(90)]
    return [(256 + 110 * math.cos(t), 256 + 110 / ratio * math.sin(t)) for t in turns]


@pytest.mark.parametrize(
    "points",
    [
        _ellipse(1.7),
        _ellipse(22 / 16),
        _ellipse(20 / 17),
        [(176, 196), (336, 196), (336, 316), (176, 316)],
        [(136, 196), (376, 196), (376, 316), (136, 316)],
        [(136, 236), (376, 236), (376, 276), (136, 276)],
        [(156, 156), (216, 156), (216, 296), (356, 296), (356, 356), (156, 356)],
        _ellipse(1)[:45],
    ],
    ids=[
        *("long ellipse", "ellipse", "near circle", "near square"),
        *("rectangle", "bar", "corner", "half disc"),
    ],
)
def test_other_shapes_have_no_name(points: list[tuple[float, float]]) -> None:
    result = judge(_paint(points), "a red circle on a black background")
    assert (result["world.count"], result["world.color"], result["world.scene"]) == (1.0, 1.0, 1.0)
    assert perceive(_paint(points)).tracks[0].shapes == [None]
    assert result["world.object_class"] == result["world.all_correct"] == 0.0


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize("shape", ["triangle", "star"])
def test_turning_and_blur_stretch_nothing(draw: Draw, shape: str, side: int) -> None:
    for radius in (LEAST_RADIUS, 0.19):
        body = Body(Thing(shape, "red", "spinning"), 0.013, 0.007, radius, angle=0.3, spin=1.9)
        video = draw(Scene((body,), "black"), 17, side, side)
        half = video.copy()
        half[:, :, : side // 2] = blur(video, 1.5)[:, :, : side // 2]
        for drawn in (video, half, h264(video, 18)):
            stretch = perceive(drawn).tracks[0].stretch.max()
            assert stretch < (0.75 if side == 64 else 0.5) * LARGEST_STRETCH


def test_a_round_polygon_is_a_circle() -> None:
    result = judge(_paint(_ellipse(1)), "a red circle on a black background")
    assert result["world.all_correct"] == 1.0


def test_another_flat_background_is_no_scene(draw: Draw) -> None:
    scene = Scene((Body(Thing("star", "yellow"), 0.1, 0.1, 0.2),), "black")
    video = draw(scene, 3, 128, 128)
    flat = (np.abs(video.astype(int) - 8).sum(-1) < 8)[..., None]
    video = np.where(flat, np.array([70, 60, 0], np.uint8), video)
    for asked in ("black", "gray", "gradient"):
        result = judge(video, f"a yellow star on a {asked} background")
        assert result["world.scene"] == result["world.all_correct"] == 0.0
        assert result["world.object_class"] == result["world.count"] == 1.0


@pytest.mark.parametrize(
    ("rgb", "asked", "right"),
    [
        ((20, 20, 20), "black", 1.0),
        ((34, 34, 34), "black", 0.0),
        ((50, 50, 50), "black", 0.0),
        ((30, 8, 8), "black", 0.0),
        ((120, 120, 120), "gray", 1.0),
        ((95, 95, 95), "gray", 0.0),
        ((165, 165, 165), "gray", 0.0),
        ((142, 128, 114), "gray", 0.0),
        ((235, 235, 235), "white", 1.0),
        ((195, 195, 195), "white", 0.0),
        ((248, 240, 214), "white", 0.0),
    ],
)
def test_how_far_a_background_keeps_its_name(
    rgb: tuple[int, int, int], asked: str, right: float
) -> None:
    video = np.full((1, 128, 128, 3), rgb, np.uint8)
    video[:, 40:88, 40:88] = COLOURS["blue"]
    result = judge(video, f"a blue square on a {asked} background")
    assert (result["world.scene"], result["world.all_correct"]) == (right, right)
    assert result["world.count"] == result["world.color"] == 1.0


@pytest.mark.parametrize(
    ("rgb", "right"),
    [
        ((255, 90, 30), 0.0),
        ((160, 30, 40), 0.0),
        ((255, 60, 120), 0.0),
        ((205, 40, 45), 1.0),
        ((232, 40, 36), 1.0),
        ((198, 27, 36), 1.0),
    ],
)
def test_how_far_a_colour_keeps_its_name(rgb: tuple[int, int, int], right: float) -> None:
    video = np.full((1, 128, 128, 3), 8, np.uint8)
    video[:, 40:88, 40:88] = rgb
    result = judge(video, "a red square on a black background")
    assert (result["world.color"], result["world.all_correct"]) == (right, right)
    assert result["world.object_class"] == result["world.scene"] == 1.0


def test_what_is_seen_is_told_in_a_sentence(draw: Draw) -> None:
    bodies = (
        Body(Thing("square", "red"), -0.25, 0, 0.15, vx=0.1),
        Body(Thing("ring", "blue"), 0.25, 0, 0.15),
    )
    video = draw(Scene(bodies, "white"), 17, 128, 128)
    blue, red = "blue ring still (17 of 17 frames)", "red square moving right (17 of 17 frames)"
    told = f"{blue}, {red} on white"
    assert str(perceive(video)) == judge(video, "a red square").seen == told
    for motion in (" still", " moving right"):
        told = told.replace(motion, "").replace("17", "1")
    assert str(perceive(video[:1])) == told
    half_disc = _paint(_ellipse(1)[:45])
    assert str(perceive(half_disc)) == "red object of no known shape (1 of 1 frames) on black"
    inside = half_disc.max(-1, keepdims=True) > 100
    grayish = np.where(inside, np.array([210, 140, 140], np.uint8), np.uint8(8))
    assert "None" not in str(perceive(grayish)) and "oddly coloured" in str(perceive(grayish))


def test_objects_that_come_and_go_are_no_empty_sentence() -> None:
    video = np.full((12, 128, 128, 3), 8, np.uint8)
    for index in range(12):
        x = 40 * (index % 3)
        video[index, 8 * index : 8 * index + 20, x : x + 20] = list(COLOURS.values())[index % 6]
    assert str(perceive(video)) == "no lasting object on black"


def test_stripes_without_contrast_are_no_stripes(draw: Draw) -> None:
    scene = Scene((Body(Thing("star", "blue"), 0.1, 0.1, 0.2),), "striped")
    caption = "a blue star on a striped background"
    video = draw(scene, 1, 128, 128)
    assert judge(video, caption)["world.scene"] == 1.0
    flat = np.abs(video.astype(int) - (187, 179, 164)).max(-1, keepdims=True) < 25
    washed = np.where(flat, np.array([187, 179, 164], np.uint8), video)
    assert judge(washed, caption)["world.scene"] == 0.0


def test_objects_that_touch_are_two(draw: Draw) -> None:
    bodies = (
        Body(Thing("square", "red"), -0.15, 0.0, 0.2),
        Body(Thing("square", "blue"), 0.132, 0.0, 0.2),
    )
    result = judge(
        draw(Scene(bodies, "white"), 3, 128, 128),
        "a red square, left of a blue square on a white background",
    )
    assert result["world.all_correct"] == 1.0, result


def test_an_object_of_two_colours_is_not_one_object(draw: Draw) -> None:
    scene = Scene((Body(Thing("circle", "red"), 0.0, 0.0, 0.25),), "black")
    video = draw(scene, 3, 128, 128)
    blue = draw(Scene((Body(Thing("circle", "blue"), 0.0, 0.0, 0.25),), "black"), 3, 128, 128)
    video[:, :, 64:] = blue[:, :, 64:]
    result = judge(video, "a red circle on a black background")
    assert result["world.count"] == result["world.all_correct"] == 0.0


def test_going_to_and_fro_is_no_motion(draw: Draw) -> None:
    def at(x: float) -> Any:
        return draw(Scene((Body(Thing("square", "red"), x, 0.0, 0.15),), "black"), 1, 96, 96)[0]

    def judged(places: list[float], caption: str) -> float | None:
        return judge(np.stack([at(x) for x in places]), caption)["world.motion"]

    swing = [0.25 * math.sin(i / 32 * math.tau) for i in range(33)]
    sweep = [0.3 - 0.6 * i / 32 for i in range(33)]
    tremble = [0.01 * (i % 2) for i in range(33)]
    for motion in ("standing still", "moving left", "moving right"):
        assert judged(swing, f"a red square {motion}") == 0.0
    assert judged(sweep, "a red square moving left") == 1.0
    assert judged(tremble, "a red square standing still") == 1.0


def test_diagonal_headings_have_no_name(draw: Draw) -> None:
    for degrees, right in ((10, 1.0), (20, 1.0), (45, 0.0), (70, 0.0)):
        angle = math.radians(degrees)
        body = Body(
            Thing("ring", "cyan", "right"),
            -0.2,
            -0.2,
            0.15,
            vx=0.2 * math.cos(angle),
            vy=0.2 * math.sin(angle),
        )
        video = draw(Scene((body,), "gray"), 33, 96, 96)
        assert judge(video, "a cyan ring moving right")["world.motion"] == right


def test_frames_that_blink_out(draw: Draw) -> None:
    """Up to a tenth of the frames may fail; beyond, the clip does."""
    scene = Scene((Body(Thing("cross", "green"), 0.0, 0.0, 0.2),), "black")
    caption = "a green cross standing still on a black background"
    for gone, correct in ((2, 1.0), (5, 0.0)):
        video = draw(scene, 33, 96, 96)
        video[10 : 10 + gone] = 8
        result = judge(video, caption)
        assert result["world.all_correct"] == correct
        assert result["world.count"] == pytest.approx(1 - gone / 33)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_median(dtype: type, count: int) -> None:
    values = np.random.default_rng(0).uniform(0, 255, (3, count, 2)).astype(dtype)
    assert np.array_equal(median(values, 1), np.median(values, axis=1).astype(np.float32))
