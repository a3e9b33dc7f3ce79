"""Motions that only look like the one asked for: two at once, paused, turned back, out of order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kinora.eval.world import judge, perceive
from kinora.eval.world.corruptions import blur, h264, noise
from kinora.eval.world.tracks import LARGEST_REST, LARGEST_RETURN, PACE, changes, pace, strengths
from kinora.pipelines.world.grammar import phrase
from kinora.pipelines.world.scene import FPS, Body, Description, Scene, Thing

Draw = Callable[[Scene, int, int, int], Any]
FRAMES, SIDE = 33, 128
SECONDS = (FRAMES - 1) / FPS

LEFT = Body(Thing("circle", "red", "left"), 0.2, 0.0, 0.12, vx=-0.2)
GROWING = Body(Thing("ring", "cyan", "growing"), 0.0, 0.0, 0.13, growth=0.3)
SPINNING = Body(Thing("star", "yellow", "spinning"), 0.0, 0.0, 0.2, spin=math.radians(70))
# The state's column that each changes.
BODIES = {"left": (LEFT, 0), "growing": (GROWING, 2), "spinning": (SPINNING, 3)}


def _still(body: Body) -> Body:
    return replace(body, vx=0.0, vy=0.0, growth=0.0, spin=0.0)


def _at(body: Body, time: float) -> Body:
    """The body as it stands at one time, in seconds."""
    return _still(
        replace(
            body,
            x=body.x + body.vx * time,
            y=body.y + body.vy * time,
            radius=body.radius * math.exp(body.growth * time),
            angle=body.angle + body.spin * time,
        )
    )


def _correct(video: Any, body: Body) -> float | None:
    return judge(video, Description((body.thing,), None, "black"))["world.all_correct"]


@pytest.fixture
def play(draw: Draw) -> Callable[..., Any]:
    """The video of a body on black with its moments shown in another order."""

    def played(body: Body, moments: Any = None) -> Any:
        if moments is None:
            return draw(Scene((body,), "black"), FRAMES, SIDE, SIDE)
        bodies = (_at(body, float(moment) * SECONDS) for moment in moments)
        return np.concatenate([draw(Scene((b,), "black"), 1, SIDE, SIDE) for b in bodies])

    return played


@pytest.mark.parametrize(
    "body",
    [
        Body(Thing("square", "red", "spinning"), 0.12, 0.0, 0.15, vx=-0.12, spin=1.9),
        Body(Thing("circle", "red", "growing"), 0.12, 0.0, 0.1, vx=-0.125, growth=0.3),
        Body(Thing("square", "red", "left"), 0.2, 0.0, 0.15, vx=-0.2, spin=1.0),
        Body(Thing("circle", "red", "up"), 0.0, 0.2, 0.1, vy=-0.2, growth=0.2),
        Body(Thing("cross", "red", "shrinking"), 0.0, 0.0, 0.2, growth=-0.3, spin=1.0),
    ],
    ids=lambda body: str(body.thing.motion),
)
def test_a_second_motion_fails(play: Callable[..., Any], body: Body) -> None:
    assert _correct(play(body), body) == 0.0
    motion = str(body.thing.motion)
    alone = _still(body)
    if motion in ("left", "up"):
        alone = replace(alone, vx=body.vx, vy=body.vy)
    elif motion == "spinning":
        alone = replace(alone, spin=body.spin)
    else:
        alone = replace(alone, growth=body.growth)
    assert _correct(play(alone), body) == 1.0


STEPS = np.linspace(0, 1, FRAMES)
_SWAPPED = STEPS.copy()
_SWAPPED[:-1] = STEPS[:-1].reshape(-1, 2)[:, ::-1].ravel()
UNSTEADY = {
    "turned back at three quarters": np.minimum(STEPS, 1.5 - STEPS),
    "second half frozen": np.minimum(STEPS, 0.5),
    "first half frozen": np.maximum(STEPS, 0.5),
    "last quarter frozen": np.minimum(STEPS, 0.75),
    "all in nine frames": np.clip((STEPS - 0.5) * 4 + 0.5, 0, 1),
    "in two leaps": np.round(STEPS * 2) / 2,
    "pairs exchanged": _SWAPPED,
}


@pytest.mark.parametrize("order", UNSTEADY)
@pytest.mark.parametrize("motion", BODIES)
def test_unsteady_motion_fails(play: Callable[..., Any], motion: str, order: str) -> None:
    body = BODIES[motion][0]
    video = play(body, UNSTEADY[order])
    assert _correct(video, body) == 0.0


@pytest.mark.parametrize("motion", BODIES)
def test_nearly_steady_motion_passes(play: Callable[..., Any], motion: str) -> None:
    """Slow starts, a repeated frame and a little damage are no other motion."""
    body, column = BODIES[motion]
    eased = STEPS - 0.09 * np.sin(math.tau * STEPS)  # from 0.43 to 1.57 of the speed
    stuck = STEPS.copy()
    stuck[12] = stuck[11]
    for moments in (STEPS, eased, stuck):
        assert _correct(play(body, moments), body) == 1.0
    for video in (h264(play(body), 18), blur(play(body), 1), noise(play(body), 10)):
        assert _correct(video, body) == 1.0
        track = perceive(video).tracks[0]
        slowest, fastest, back = pace(track, column)
        # Far from the limits: these hold with a margin of a half at least.
        assert slowest > (1 + PACE[0]) / 2 and fastest < (1 + PACE[1]) / 2
        assert back < LARGEST_RETURN / 2
        change, rest = changes(track, FRAMES)
        assert sorted(strengths(change))[1] < 0.5
        assert np.delete(rest, column).max() < LARGEST_REST / 2


def test_swaying_is_not_standing_still_nor_moving(play: Callable[..., Any], draw: Draw) -> None:
    still = Body(Thing("square", "red", "still"), 0.0, 0.0, 0.15)
    left = Body(Thing("square", "red", "left"), 0.2, 0.0, 0.15, vx=-0.2)
    for sway, correct in ((0.03, 1.0), (0.1, 0.0)):
        for body in (still, left):
            swaying = (
                replace(_at(body, s * SECONDS), y=sway * math.sin(math.tau * s)) for s in STEPS
            )
            frames = [draw(Scene((b,), "black"), 1, SIDE, SIDE) for b in swaying]
            assert _correct(np.concatenate(frames), body) == correct


def test_one_frame_cannot_show_a_motion(play: Callable[..., Any]) -> None:
    image = play(LEFT)[:1]
    asked = Description((LEFT.thing,), None, "black")
    result = judge(image, asked)
    assert result["world.all_correct"] is None
    assert "a still image cannot show the motion" in result.reasons["world.all_correct"]
    assert result["world.object_class"] == result["world.scene"] == 1.0
    open_one = Description((replace(LEFT.thing, motion=None),), None, "black")
    assert judge(image, open_one)["world.all_correct"] == 1.0
    assert judge(image, replace(open_one, background="gray"))["world.all_correct"] == 0.0
    assert judge(image, phrase(open_one))["world.all_correct"] == 1.0
