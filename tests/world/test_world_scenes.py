"""Palette, scenes and the renderer."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from kinora.pipelines.world.palette import (
    BACKGROUNDS,
    COLOURS,
    LEAST_DELTA_E,
    RGB,
    delta_e,
    lab,
)
from kinora.pipelines.world.render import background, paint, render
from kinora.pipelines.world.scene import (
    FPS,
    HEADINGS,
    LEAST_RADIUS,
    MARGIN,
    Body,
    Description,
    Scene,
    Thing,
    sample_description,
    sample_scene,
)
from kinora.pipelines.world.shapes import RING_INNER_RADIUS, SHAPES, signed_distance

# Of radius 1: half the corners times the sine of their angle; the star has corners at two radii.
AREAS = {
    "circle": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 5 * 0.42 * math.sin(math.radians(36)),
    "cross": 8 * 0.3 * math.sqrt(1 - 0.3**2) - 4 * 0.3**2,
    "ring": math.pi * (1 - RING_INNER_RADIUS**2),
}


def test_colours_are_far_apart() -> None:
    assert min(delta_e(a, b) for a, b in combinations(COLOURS.values(), 2)) >= LEAST_DELTA_E
    for backdrop in BACKGROUNDS.values():
        for step in range(65):
            mixed = [
                round(a + (b - a) * step / 64)
                for a, b in zip(backdrop.first, backdrop.second, strict=True)
            ]
            behind: RGB = (mixed[0], mixed[1], mixed[2])
            assert min(delta_e(behind, c) for c in COLOURS.values()) >= LEAST_DELTA_E


def test_lab_agrees_with_published_values() -> None:
    # scikit-image computes Lab independently of us.
    color: Any = pytest.importorskip("skimage.color")
    for rgb in (*COLOURS.values(), (0, 0, 0), (255, 255, 255), (1, 2, 3)):
        expected = color.rgb2lab([[[channel / 255 for channel in rgb]]])[0][0]
        assert lab(rgb) == pytest.approx(tuple(expected), abs=0.05)


@pytest.mark.parametrize("aspect", [1 / 3, 0.6, 1.0, 16 / 9, 3.0])
@pytest.mark.parametrize("frames", [1, 2, 17, 33, 129])
def test_scenes_hold_what_they_promise(aspect: float, frames: int) -> None:
    rng = random.Random(f"{aspect} {frames}")
    half_width, half_height = max(aspect, 1.0) / 2, max(1 / aspect, 1.0) / 2
    for _ in range(60):
        description = sample_description(rng)
        scene = sample_scene(rng, description, frames=frames, aspect=aspect)
        assert scene.description == description
        for moment in range(frames):
            time = moment / FPS
            places = [(b.x + b.vx * time, b.y + b.vy * time) for b in scene.bodies]
            for body, (x, y) in zip(scene.bodies, places, strict=True):
                reach = body.radius * math.exp(body.growth * time) + MARGIN - 1e-9
                assert abs(x) + reach <= half_width and abs(y) + reach <= half_height
            if scene.relation:
                (ax, ay), (bx, by) = places
                gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}
                # Apart along the axis by more than both radii: they never touch either.
                radii = sum(b.radius * math.exp(b.growth * time) for b in scene.bodies)
                assert gap[scene.relation] >= radii + 2 * MARGIN - 1e-9
        for body in scene.bodies:
            _check_motion(body, (frames - 1) / FPS)


def _check_motion(body: Body, seconds: float) -> None:
    motion = str(body.thing.motion)
    dx, dy = HEADINGS.get(motion, (0, 0))
    assert (math.copysign(1, body.vx) if body.vx else 0, body.vy and math.copysign(1, body.vy)) == (
        dx,
        dy,
    )
    travel = math.hypot(body.vx, body.vy) * seconds
    grown, turned = body.growth * seconds, abs(body.spin) * seconds
    assert travel >= (min(0.16 * seconds, 0.19) if motion in HEADINGS else 0)
    assert (grown > 0) == (motion == "growing" and seconds > 0)
    assert (grown < 0) == (motion == "shrinking" and seconds > 0)
    if motion in ("growing", "shrinking"):
        assert abs(grown) >= math.log(1.6) * min(seconds / 2, 1) - 1e-9
    assert turned >= (math.radians(65) * min(seconds, 2) - 1e-9 if motion == "spinning" else 0)
    assert (body.spin != 0) == (motion == "spinning")


def test_open_atoms_are_filled_and_scenes_repeat() -> None:
    open_one = Description((Thing("ring", "red"), Thing("star", "blue")))
    scenes = [sample_scene(random.Random(i), open_one) for i in range(40)]
    assert scenes == [sample_scene(random.Random(i), open_one) for i in range(40)]
    assert len({scene.bodies[1].thing.motion for scene in scenes}) >= 6
    assert "spinning" not in {scene.bodies[0].thing.motion for scene in scenes}
    assert len({scene.background for scene in scenes}) == len(BACKGROUNDS)
    assert {scene.relation for scene in scenes} == {None}


@pytest.mark.parametrize(("frames", "aspect"), [(0, 1.0), (33, 0.3), (33, 3.1)])
def test_scenes_out_of_range(frames: int, aspect: float) -> None:
    with pytest.raises(ValueError, match=rf"frames {frames}, aspect {aspect:.2f}"):
        sample_scene(
            random.Random(0), Description((Thing("star", "red"),)), aspect=aspect, frames=frames
        )


def _one(shape: str, radius: float = 0.3, angle: float = 0.0) -> Scene:
    return Scene((Body(Thing(shape, "yellow"), 0.01, -0.02, radius, angle),), "black")


def _coverage(video: torch.Tensor) -> torch.Tensor:
    """Share of the yellow object in each pixel of the first frame, from the green channel."""
    low, high = 8 / 255, COLOURS["yellow"][1] / 255
    return (video[0, 1, 0] - low) / (high - low)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_each_shape(shape: str) -> None:
    video = render([_one(shape, angle=0.3)], frames=1, height=200, width=240)
    area = float(_coverage(video).sum())
    assert area == pytest.approx(AREAS[shape] * (0.3 * 200) ** 2, rel=0.01)


@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.symmetry])
def test_turning_by_the_symmetry_changes_nothing(shape: str) -> None:
    turn = math.radians(SHAPES[shape].symmetry)
    angles = (0.2, 0.2 + turn, 0.2 + turn / 2)
    still, turned, half = (
        render([_one(shape, angle=angle)], frames=1, height=96, width=96) for angle in angles
    )
    assert torch.allclose(still, turned, atol=1e-3)
    assert (still - half).abs().max() > 0.3


def test_turns_are_clockwise_and_y_points_down() -> None:
    body = Body(Thing("triangle", "yellow"), 0.0, 0.25, 0.2, math.pi / 2)
    cover = _coverage(render([Scene((body,), "black")], frames=1, height=100, width=100))
    rows, columns = torch.where(cover > 0.5)
    assert rows.float().mean() > 70  # below the middle
    assert (
        columns.max() - 50 > 50 - columns.min() + 5
    )  # the tip that was at the top is at the right


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_is_one(shape: str) -> None:
    axis = torch.linspace(-1.5, 1.5, 151, dtype=torch.float64)
    x, y = axis[None].expand(151, -1), axis[:, None].expand(-1, 151)
    distance = signed_distance(SHAPES[shape], x, y)
    # Never changes faster than the way, and is positive outside of the unit circle.
    assert (distance.diff(dim=0).abs() <= 0.02 + 1e-9).all()
    assert (distance.diff(dim=1).abs() <= 0.02 + 1e-9).all()
    assert (distance[torch.hypot(x, y) > 1 + 1e-6] > 0).all()
    assert distance.dtype == torch.float64 and bool((distance < 0).any())


def _scenes(count: int) -> list[Scene]:
    rng = random.Random(1)
    return [sample_scene(rng, sample_description(rng), frames=9) for _ in range(count)]


def test_a_batch_equals_its_parts() -> None:
    scenes = _scenes(6)
    together = render(scenes, frames=9, height=48, width=64)
    assert together.shape == (6, 3, 9, 48, 64) and together.dtype == torch.float32
    assert float(together.min()) >= 0 and float(together.max()) <= 1
    for scene, video in zip(scenes, together, strict=True):
        assert torch.equal(render([scene], frames=9, height=48, width=64)[0], video)


def test_a_video_is_its_objects_laid_over_its_background() -> None:
    scenes = _scenes(6)
    video = render(scenes, frames=9, height=48, width=64)
    objects, cover = paint(scenes, frames=9, height=48, width=64)
    assert objects.shape == video.shape and cover.shape == (6, 1, 9, 48, 64)
    assert objects.dtype == cover.dtype == torch.float32
    assert float(cover.min()) == 0 and float(cover.max()) == 1
    behind = torch.stack([background(scene.background, 48, 64) for scene in scenes])[:, :, None]
    assert torch.allclose(video, behind * (1 - cover) + objects, atol=1e-6)
    assert bool((objects[(cover == 0).expand_as(objects)] == 0).all())


def test_objects_that_do_not_overlap_cover_their_union() -> None:
    scenes = [scene for scene in _scenes(12) if len(scene.bodies) == 2]
    assert scenes
    objects, cover = paint(scenes, frames=9, height=48, width=64)
    parts = ([replace(s, bodies=s.bodies[i : i + 1]) for s in scenes] for i in range(2))
    alone = [paint(part, frames=9, height=48, width=64) for part in parts]
    assert not bool(((alone[0][1] > 0) & (alone[1][1] > 0)).any())
    assert torch.allclose(cover, torch.maximum(alone[0][1], alone[1][1]), atol=1e-6)
    assert torch.allclose(objects, alone[0][0] + alone[1][0], atol=1e-6)


def test_later_objects_lie_over_earlier_ones() -> None:
    below, above = _one("square").bodies[0], _one("circle", radius=0.2).bodies[0]
    above = replace(above, thing=Thing("circle", "blue"))
    scene = Scene((below, above), "white")
    objects, cover = paint([scene], frames=1, height=48, width=64)
    alone, top = paint([replace(scene, bodies=(above,))], frames=1, height=48, width=64)
    under, wide = paint([replace(scene, bodies=(below,))], frames=1, height=48, width=64)
    assert torch.allclose(objects, under * (1 - top) + alone, atol=1e-6)
    assert torch.allclose(cover, 1 - (1 - wide) * (1 - top), atol=1e-6)


def test_resolutions_agree() -> None:
    scenes = _scenes(6)
    small = render(scenes, frames=3, height=128, width=128)
    large = render(scenes, frames=3, height=256, width=256)
    reduced = torch.nn.functional.avg_pool3d(large, (1, 2, 2))
    assert (small - reduced).abs().mean() < 0.002
    # Anti-aliasing differs by a fraction of a pixel at corners, nowhere more.
    assert ((small - reduced).abs() > 0.15).float().mean() < 1e-3


@pytest.mark.parametrize(("height", "width", "frames"), [(1, 1, 1), (33, 47, 1), (7, 90, 3)])
def test_any_size_and_length(height: int, width: int, frames: int) -> None:
    video = render(_scenes(2), frames=frames, height=height, width=width)
    assert video.shape == (2, 3, frames, height, width)
    assert bool(torch.isfinite(video).all())


def test_frames_do_not_depend_on_length_but_on_the_rate() -> None:
    scenes = _scenes(3)
    long = render(scenes, frames=9, height=40, width=40)
    assert torch.equal(long[:, :, :4], render(scenes, frames=4, height=40, width=40))
    slow = render(scenes, frames=5, height=40, width=40, fps=FPS / 2)
    assert torch.allclose(long[:, :, ::2], slow, atol=1e-5)


def test_backgrounds_fill_the_frame() -> None:
    for name, backdrop in BACKGROUNDS.items():
        picture = background(name, 96, 130) * 255
        first, second = torch.tensor(backdrop.first), torch.tensor(backdrop.second)
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        assert torch.allclose(picture.amin((1, 2)), low.float(), atol=1.0), name
        assert torch.allclose(picture.amax((1, 2)), high.float(), atol=1.0), name


@pytest.mark.parametrize("things", [1, 2])
def test_no_body_is_ever_too_small_to_tell(things: int) -> None:
    rng = random.Random(things)
    for frames in (9, 33, 97):
        duration_s = (frames - 1) / FPS
        for _ in range(150):
            scene = sample_scene(rng, sample_description(rng, things=things), frames=frames)
            for body in scene.bodies:
                end = body.radius * math.exp(body.growth * duration_s)
                assert min(body.radius, end) >= LEAST_RADIUS - 1e-9
