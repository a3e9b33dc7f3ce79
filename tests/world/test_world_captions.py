"""Captions and their meaning, and the splits made of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from kinora.pipelines.world.grammar import parse, phrase, words
from kinora.pipelines.world.palette import BACKGROUNDS, COLOURS
from kinora.pipelines.world.scene import (
    MOTIONS,
    RELATIONS,
    Description,
    Thing,
    sample_description,
)
from kinora.pipelines.world.shapes import SHAPES
from kinora.pipelines.world.split import SPLITS, is_held_out, sample_split, split_of


def _opened(description: Description, rng: random.Random) -> Description:
    """The same with each atom left open by chance."""
    things = tuple(
        replace(thing, motion=rng.choice((None, thing.motion))) for thing in description.things
    )
    return Description(
        things,
        rng.choice((None, description.relation)),
        rng.choice((None, description.background)),
    )


def test_every_phrasing_means_what_was_said() -> None:
    rng = random.Random(0)
    seen: set[str] = set()
    for _ in range(1500):
        description = _opened(sample_description(rng), rng)
        caption = phrase(description, rng)
        assert parse(caption) == description, caption
        assert parse(phrase(description)) == description
        assert parse(caption.capitalize() + ".") == description
        seen |= set(caption.replace(",", " , ").split())
    assert seen == set(words())


def test_phrasings_vary_and_the_canonical_one_does_not() -> None:
    description = parse("a red circle moving left over a black background")
    rng = random.Random(0)
    assert len({phrase(description, rng) for _ in range(300)}) >= 20
    assert phrase(description) == "a red circle moving left over a black background"


def test_words_are_sorted_and_name_everything() -> None:
    known = words()
    assert list(known) == sorted(set(known))
    assert {*SHAPES, *COLOURS, *BACKGROUNDS} <= set(known)
    assert {"grey", "gray", ",", "a", "an", "left", "above"} <= set(known)


def test_a_relation_may_be_told_from_the_second_thing() -> None:
    both = "a red circle and a blue square over a black background, "
    opposites = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for relation, opposite in opposites.items():
        told = parse(f"{both}the blue square is {relation} the red circle")
        assert told == parse(f"{both}the red circle is {opposite} the blue square")
        assert told.relation == opposite and told.things[0].colour == "red"
        canonical = f"{both}the red circle is {opposite} the blue square"
        assert phrase(told) == canonical


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("", "does not follow"),
        ("a red", "at its end"),
        ("a red circle moving", "at its end"),
        ("red circle", "at 'red'"),
        ("a red circle and a red square", "two red objects; their colours must differ"),
        ("a red ring, above a red star", "two red objects; their colours must differ"),
        ("a red circle over a black background moving left", "at 'moving'"),
        ("a red circle spinning", "looks the same when it spins"),
        ("a red circel", "'circel' is no word of this world; the nearest is 'circle'"),
        ("a red circle and a blue star, the red circle is above the blue ring", "does not follow"),
    ],
)
def test_other_captions_are_refused(caption: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        parse(caption)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Thing("blob", "red"), "blob"),
        (lambda: Thing("star", "mauve"), "mauve"),
        (lambda: Thing("star", "red", "hopping"), "hopping"),
        (lambda: Thing("ring", "red", "spinning"), "looks the same"),
        (lambda: Description(()), "0 objects"),
        (lambda: Description((Thing("star", "red"),), "above"), "needs two"),
        (lambda: Description((Thing("star", "red"), Thing("ring", "red"))), "must differ"),
        (lambda: Description((Thing("star", "red"),), None, "plaid"), "plaid"),
        (lambda: sample_split(random.Random(0), "validation"), "validation"),
        (lambda: sample_split(random.Random(0), "held-out", still_image=True), "no held-out"),
    ],
)
def test_what_does_not_exist_cannot_be_described(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=said):
        make()


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8 and len(BACKGROUNDS) >= 5
    assert set(MOTIONS) == {
        *("left", "right", "up", "down", "still", "growing", "shrinking", "spinning")
    }
    assert set(RELATIONS) == {"left of", "right of", "above", "below"}


def test_training_shows_every_pair_and_no_held_out_triple() -> None:
    triples = [
        Thing(shape, colour, motion)
        for shape, colour, motion in itertools.product(SHAPES, COLOURS, MOTIONS)
        if motion != "spinning" or SHAPES[shape].symmetry
    ]
    shown = [thing for thing in triples if not is_held_out(thing)]
    share = 1 - len(shown) / len(triples)
    assert 0.05 < share < 0.15
    for pair in (
        lambda t: (t.shape, t.colour),
        lambda t: (t.shape, t.motion),
        lambda t: (t.colour, t.motion),
    ):
        assert {pair(thing) for thing in shown} == {pair(thing) for thing in triples}


def test_splits_are_disjoint_and_repeatable() -> None:
    drawn: dict[str, set[Description]] = {}
    for split in SPLITS:
        drawn[split] = {sample_split(random.Random(i), split) for i in range(150)}
        assert drawn[split] == {sample_split(random.Random(i), split) for i in range(150)}
        assert {split_of(description) for description in drawn[split]} == {split}
        held_out = [any(map(is_held_out, one.things)) for one in drawn[split]]
        assert all(held_out) if split == "held-out" else not any(held_out)
    assert not drawn["train"] & drawn["test"]
    # A checkpoint's numbers depend on the split, so it must not differ between processes.
    captions = ("a red star moving left", "a blue star spinning", "a blue star moving left")
    assert [split_of(parse(caption)) for caption in captions] == ["test", "train", "held-out"]
    # The README's first command asks for what training has seen.
    assert split_of(parse("a red circle moving left over a black background")) == "train"


def test_the_rest_of_a_split_is_a_tenth() -> None:
    rng = random.Random(0)
    known = [one for one in (sample_description(rng) for _ in range(3000))]
    splits = [split_of(one) for one in known]
    tested, trained = splits.count("test"), splits.count("train")
    assert 0.07 < tested / (tested + trained) < 0.13
