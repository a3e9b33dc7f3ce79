"""What training sees."""

from __future__ import annotations

import random

import torch

from kinora.pipelines.tiny.train.clips import Clip, caption, crowd, draw, sample_clips
from kinora.pipelines.world.grammar import parse
from kinora.pipelines.world.split import split_of

CLIP = Clip(5, 32, 48)


def test_only_scenes_of_the_training_split():
    scenes = sample_clips(random.Random(0), CLIP, 200)
    assert {split_of(scene.description) for scene in scenes} == {"train"}
    assert {len(scene.bodies) for scene in scenes} == {1, 2}


def test_images_tell_no_motion():
    for scene in sample_clips(random.Random(0), Clip(1, 32, 32), 20):
        assert all(body.thing.motion is None for body in scene.bodies)


def test_captions_say_nothing_that_is_not_there():
    rng = random.Random(0)
    told = 0
    for scene in sample_clips(rng, CLIP, 200):
        text = caption(rng, scene.description)
        if text:
            told += 1
            said, whole = parse(text), scene.description
            assert said.things == whole.things
            assert said.background in (None, whole.background)
            assert said.relation in (None, whole.relation)
    assert 150 < told < 200  # the others are empty, for guidance


def test_a_crowd_has_the_objects_of_its_guests():
    scenes = sample_clips(random.Random(1), CLIP, 6)
    plain, crowded = draw(scenes, CLIP, "cpu"), crowd(scenes, CLIP, "cpu")
    assert crowded.shape == plain.shape == (6, 3, 5, 32, 48)
    assert crowded.min() >= -1.001 and crowded.max() <= 1.001
    torch.testing.assert_close(crowd(scenes, CLIP, "cpu", guests=0), plain)
    changed = ((crowded - plain).abs() > 0.05).any(dim=1).float().mean(dim=(1, 2, 3))
    assert (changed > 0.02).all()
