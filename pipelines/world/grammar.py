"""Captions of the world: many phrasings out (`phrase`), one meaning in (`parse`).

    caption    = [ "on a" background "background," ] objects [ "over a" background "background" ]
    objects    = object [ "and" object [ "," "the" name relation "the" name ] ]
               | object "," relation object
    object     = "a" name [ motion ]
    name       = colour shape

The background stands in one place at most, the two names of the last clause in either order;
`parse(phrase(d)) == d` for every description `d`.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from .palette import BACKGROUNDS, COLOURS
from .scene import Description, Thing
from .shapes import SHAPES

_Value = TypeVar("_Value")
_Match = tuple[_Value, int]
"""A meaning and the index of the token after it."""

_TOKEN = re.compile(r"[a-z]+|,")

# The first phrase of each is the canonical one. No phrase is the beginning of another one's
# continuation in the grammar, so that every caption has a single reading.
_MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    **{
        heading: (
            f"moving {heading}",
            f"sliding {heading}",
            f"going {heading}",
            f"drifting {heading}",
            f"that moves {heading}",
        )
        for heading in ("left", "right", "up", "down")
    },
    "still": ("standing still", "resting", "that does not move", "staying in place"),
    "growing": ("growing", "getting bigger", "that grows", "becoming larger"),
    "shrinking": ("shrinking", "getting smaller", "that shrinks", "becoming smaller"),
    "spinning": ("spinning", "rotating", "that spins", "turning around"),
}
_MOTION_PHRASES["left"] += ("moving to the left",)
_MOTION_PHRASES["right"] += ("moving to the right",)
_MOTION_PHRASES["up"] += ("moving upwards",)
_MOTION_PHRASES["down"] += ("moving downwards",)

_RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPPOSITE = {
    **{"left of": "right of", "right of": "left of"},
    **{"above": "below", "below": "above"},
}
_BACKGROUND_NAMES: dict[str, tuple[str, ...]] = {
    name: (("gray", "grey") if name == "gray" else (name,)) for name in BACKGROUNDS
}
_BACKGROUND_FRAMES = (
    "over a {} background",
    "on a {} background",
    "in front of a {} background",
    "against a {} backdrop",
)
_SHAPE_WORDS = {name: (name,) for name in SHAPES}
_COLOUR_WORDS = {name: (name,) for name in COLOURS}
_A = {None: ("a", "an")}
_AND = {None: ("and",)}
_COMMA = {None: (",",)}
_THE = {None: ("the",)}
_IS = {None: ("is",)}
_BACKGROUND_PHRASES = {
    name: tuple(frame.format(word) for frame in _BACKGROUND_FRAMES for word in words)
    for name, words in _BACKGROUND_NAMES.items()
}


def words() -> tuple[str, ...]:
    """Every word (and the comma) that a caption can hold, sorted."""
    tables: Sequence[Mapping[None, Sequence[str]] | Mapping[str, Sequence[str]]] = (
        *(_A, _AND, _COMMA, _THE, _IS, _SHAPE_WORDS, _COLOUR_WORDS),
        *(_MOTION_PHRASES, _RELATION_PHRASES, _BACKGROUND_PHRASES),
    )
    phrases = (phrase for table in tables for options in table.values() for phrase in options)
    return tuple(sorted({token for phrase in phrases for token in _TOKEN.findall(phrase)}))


def phrase(description: Description, rng: random.Random | None = None) -> str:
    """A caption of `description`: the canonical one, or with `rng` one of its phrasings."""

    def pick(options: Sequence[str]) -> str:
        return rng.choice(options) if rng else options[0]

    def name(thing: Thing) -> str:
        return f"{thing.colour} {thing.shape}"

    def told(thing: Thing) -> str:
        article = "an" if thing.colour[0] in "aeiou" else "a"
        motion = f" {pick(_MOTION_PHRASES[thing.motion])}" if thing.motion else ""
        return f"{article} {name(thing)}{motion}"

    backdrop = ""
    if description.background:
        backdrop = pick(_BACKGROUND_PHRASES[description.background])
    first = description.things[0]
    if len(description.things) == 1:
        objects, clause = told(first), ""
    else:
        second = description.things[1]
        objects, clause = f"{told(first)} and {told(second)}", ""
        if description.relation:
            relation = pick(_RELATION_PHRASES[description.relation])
            if rng and rng.random() < 0.5:
                objects = f"{told(first)}, {relation} {told(second)}"
            else:
                clause = f", the {name(first)} is {relation} the {name(second)}"
    if backdrop and rng and rng.random() < 0.25:
        return f"{backdrop}, {objects}{clause}"
    return f"{objects} {backdrop}".rstrip() + clause


def parse(caption: str) -> Description:
    """The description that `caption` states.

    Raises:
        ValueError: the caption is not of this grammar (the message names the first word that does
            not fit and the nearest known one), or what it describes is not in this world.
    """
    tokens = _tokens(caption)
    reader = _Reader(tokens)
    readings = {meaning for meaning, end in reader.caption() if end == len(tokens)}
    if len(readings) == 1:
        return readings.pop()
    if readings:
        raise ValueError(f"{caption!r} can be read in {len(readings)} ways")
    at = reader.furthest
    where = f"at {tokens[at]!r}" if at < len(tokens) else "at its end"
    raise ValueError(
        f"{caption!r} does not follow the world's grammar {where}; "
        f"an example: {phrase(Description((Thing('circle', 'red', 'left'),), None, 'black'))!r}"
    )


def _tokens(caption: str) -> list[str]:
    text = caption.lower().strip().rstrip(".")
    known = words()
    for word in re.findall(r"[^\s,]+", text):
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0)
            raise ValueError(f"{word!r} is no word of this world; the nearest is {near[0]!r}")
    return _TOKEN.findall(text)


class _Reader:
    """A backtracking reader: each method yields every way to read its part from `start` on."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.furthest = 0

    def caption(self) -> Iterator[_Match[Description]]:
        for background, start in self._optional(_BACKGROUND_PHRASES, 0):
            if background is not None:
                for _, after in self._one_of(_COMMA, start):
                    yield from self._objects(after, background)
            else:
                yield from self._objects(start, None)

    def _objects(self, start: int, leading: str | None) -> Iterator[_Match[Description]]:
        for first, after_first in self._thing(start):
            for background, end in self._trailing(after_first, leading):
                yield Description((first,), None, background), end
            for _, after_and in self._one_of(_AND, after_first):
                for second, after_second in self._thing(after_and):
                    yield from self._pair((first, second), after_second, leading)
            for _, after_comma in self._one_of(_COMMA, after_first):
                for relation, after_relation in self._one_of(_RELATION_PHRASES, after_comma):
                    for second, after_second in self._thing(after_relation):
                        for background, end in self._trailing(after_second, leading):
                            yield Description((first, second), relation, background), end

    def _pair(
        self, things: tuple[Thing, Thing], start: int, leading: str | None
    ) -> Iterator[_Match[Description]]:
        for background, after in self._trailing(start, leading):
            yield Description(things, None, background), after
            for relation, end in self._clause(things, after):
                yield Description(things, relation, background), end

    def _clause(self, things: tuple[Thing, Thing], start: int) -> Iterator[_Match[str]]:
        """`, the red circle is left of the blue square`; the relation is first to second, also
        where the clause names the second thing first."""

        def named(thing: Thing) -> dict[None, tuple[str]]:
            return {None: (f"{thing.colour} {thing.shape}",)}

        for one, other in (things, things[::-1]):
            before = (_COMMA, _THE, named(one), _IS)
            for after_is in self._sequence(before, start):
                for said, after_relation in self._one_of(_RELATION_PHRASES, after_is):
                    relation = said if one is things[0] else _OPPOSITE[said]
                    for end in self._sequence((_THE, named(other)), after_relation):
                        yield relation, end

    def _thing(self, start: int) -> Iterator[_Match[Thing]]:
        for _, after_article in self._one_of(_A, start):
            for colour, after_colour in self._one_of(_COLOUR_WORDS, after_article):
                for shape, after_shape in self._one_of(_SHAPE_WORDS, after_colour):
                    for motion, end in self._optional(_MOTION_PHRASES, after_shape):
                        yield Thing(shape, colour, motion), end

    def _trailing(self, start: int, leading: str | None) -> Iterator[_Match[str | None]]:
        if leading is not None:
            yield leading, start
        else:
            yield from self._optional(_BACKGROUND_PHRASES, start)

    def _sequence(
        self, tables: Sequence[Mapping[None, Sequence[str]]], start: int
    ) -> Iterator[int]:
        if not tables:
            yield start
            return
        for _, after in self._one_of(tables[0], start):
            yield from self._sequence(tables[1:], after)

    def _optional(
        self, table: Mapping[str, Sequence[str]], start: int
    ) -> Iterator[_Match[str | None]]:
        yield from self._one_of(table, start)
        yield None, start

    def _one_of(
        self, table: Mapping[_Value, Sequence[str]], start: int
    ) -> Iterator[_Match[_Value]]:
        for value, options in table.items():
            for option in options:
                wanted = _TOKEN.findall(option)
                length = 0
                for given, expected in zip(self.tokens[start:], wanted, strict=False):
                    if given != expected:
                        break
                    length += 1
                self.furthest = max(self.furthest, start + length)
                if length == len(wanted):
                    yield value, start + length
