"""Which descriptions training may see.

`held-out`: a thing's (shape, colour, motion) is one of the combinations that training never shows,
although it shows every pair of the three. `test`: every combination is known, but this exact
description, a tenth of all, is kept from training. The rest is `train`.
"""

from __future__ import annotations

import hashlib
import random

from .grammar import phrase
from .palette import COLOURS
from .scene import MOTIONS, Description, Thing, sample_description
from .shapes import SHAPES

SPLITS = ("train", "test", "held-out")


def is_held_out(thing: Thing) -> bool:
    """True for an eleventh of all (shape, colour, motion); False when the motion is left open."""
    if thing.motion is None:
        return False
    shape, colour = tuple(SHAPES).index(thing.shape), tuple(COLOURS).index(thing.colour)
    return (3 * shape + 5 * colour + 7 * MOTIONS.index(thing.motion)) % 11 == 1


def split_of(description: Description) -> str:
    """The split of a description; images and videos of one description are in the same split."""
    if any(is_held_out(thing) for thing in description.things):
        return "held-out"
    digest = hashlib.blake2b(phrase(description).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def sample_split(
    rng: random.Random, split: str, *, things: int | None = None, still_image: bool = False
) -> Description:
    """A random description of one split, everything said; see `sample_description`.

    Raises:
        ValueError: an unknown split, or held-out still images, which do not exist.
    """
    if split not in SPLITS or (split == "held-out" and still_image):
        allowed = ", ".join(SPLITS)
        raise ValueError(f"split {split!r}; the splits are {allowed}, images: no held-out")
    while True:
        description = sample_description(rng, things=things, still_image=still_image)
        if split_of(description) == split:
            return description
