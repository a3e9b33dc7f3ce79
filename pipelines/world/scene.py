"""Scenes as data: what a caption says (`Description`) and what is drawn (`Scene`).

Lengths are in units of the frame's shorter side, the origin is the middle of the frame, y points
down; times are in seconds at `FPS` frames a second.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from .palette import BACKGROUNDS, COLOURS
from .shapes import SHAPES

FPS = 16
MARGIN = 0.02
LEAST_RADIUS = 0.085
"""Of a body at any moment: 11 pixels at 128, where a ring still has a hole one can see."""

MOTIONS = ("left", "right", "up", "down", "still", "growing", "shrinking", "spinning")
RELATIONS = ("left of", "right of", "above", "below")
HEADINGS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}


def _known(kind: str, given: str | None, allowed: tuple[str, ...]) -> None:
    if given is not None and given not in allowed:
        raise ValueError(f"{kind} {given!r} is not in this world; it has {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class Thing:
    """An object as a caption names it; `motion=None` leaves the motion open."""

    shape: str
    colour: str
    motion: str | None = None

    def __post_init__(self) -> None:
        _known("shape", self.shape, tuple(SHAPES))
        _known("colour", self.colour, tuple(COLOURS))
        _known("motion", self.motion, MOTIONS)
        if self.motion == "spinning" and SHAPES[self.shape].symmetry == 0:
            raise ValueError(f"a {self.shape} looks the same when it spins; give it another motion")


@dataclass(frozen=True, slots=True)
class Description:
    """One or two things of different colours, their relation (first to second) and background."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _known("relation", self.relation, RELATIONS)
        _known("background", self.background, tuple(BACKGROUNDS))
        if not 1 <= len(self.things) <= 2:
            raise ValueError(f"{len(self.things)} objects given; this world shows one or two")
        if self.relation and len(self.things) != 2:
            raise ValueError(f"{self.relation!r} needs two objects, one is given")
        if len({thing.colour for thing in self.things}) < len(self.things):
            raise ValueError(f"two {self.things[0].colour} objects; their colours must differ")


@dataclass(frozen=True, slots=True)
class Body:
    """A thing with everything fixed: its state at time 0 and how it changes.

    `x, y` centre; `radius`; `angle` in radians, clockwise on the screen; `vx, vy` per second;
    `growth` per second of the logarithm of the radius; `spin` in radians a second.
    """

    thing: Thing
    x: float
    y: float
    radius: float
    angle: float = 0.0
    vx: float = 0.0
    vy: float = 0.0
    growth: float = 0.0
    spin: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What `render` draws: bodies, later ones over earlier ones, on a named background."""

    bodies: tuple[Body, ...]
    background: str
    relation: str | None = None

    @property
    def description(self) -> Description:
        """Everything that a caption could say of this scene."""
        things = tuple(body.thing for body in self.bodies)
        return Description(things, self.relation, self.background)


def sample_description(
    rng: random.Random, *, things: int | None = None, still_image: bool = False
) -> Description:
    """A description with every atom set; `things` is 1 or 2 or, when None, either.

    `still_image` leaves motions open, since one frame shows none.
    """
    count = things if things is not None else rng.choice((1, 2))
    colours = rng.sample(tuple(COLOURS), count)
    drawn: list[Thing] = []
    for colour in colours:
        shape = rng.choice(tuple(SHAPES))
        spins = SHAPES[shape].symmetry > 0
        motions = MOTIONS if spins else tuple(m for m in MOTIONS if m != "spinning")
        drawn.append(Thing(shape, colour, None if still_image else rng.choice(motions)))
    relation = rng.choice(RELATIONS) if count == 2 else None
    return Description(tuple(drawn), relation, rng.choice(tuple(BACKGROUNDS)))


def sample_scene(
    rng: random.Random, description: Description, *, frames: int = 33, aspect: float = 1.0
) -> Scene:
    """Fix what `description` leaves open so that it holds, inside the frame, for `frames` frames.

    Args:
        aspect: width / height of the frame, from 1/3 to 3.

    Raises:
        ValueError: `frames` below 1 or an aspect out of range.
    """
    if frames < 1 or not 1 / 3 <= aspect <= 3:
        raise ValueError(f"frames {frames}, aspect {aspect:.2f}: frames >= 1, aspect 1/3 to 3")
    described = _fill(rng, description)
    duration = max(frames - 1, 1) / FPS
    half_width, half_height = max(aspect, 1.0) / 2, max(1 / aspect, 1.0) / 2
    whole = (-half_width, -half_height, half_width, half_height)
    if len(described.things) == 1:
        bodies = (_place(rng, described.things[0], whole, duration),)
    else:
        first, second = _halves(whole, described.relation or rng.choice(RELATIONS))
        bodies = (
            _place(rng, described.things[0], first, duration),
            _place(rng, described.things[1], second, duration),
        )
    return Scene(bodies, described.background or "black", described.relation)


def _fill(rng: random.Random, description: Description) -> Description:
    def motion(thing: Thing) -> Thing:
        if thing.motion is not None:
            return thing
        spins = SHAPES[thing.shape].symmetry > 0
        return replace(thing, motion=rng.choice([m for m in MOTIONS if spins or m != "spinning"]))

    return replace(
        description,
        things=tuple(motion(thing) for thing in description.things),
        background=description.background or rng.choice(tuple(BACKGROUNDS)),
    )


_Box = tuple[float, float, float, float]


def _halves(box: _Box, relation: str) -> tuple[_Box, _Box]:
    """Where the first and the second thing stay, so that `relation` holds at every moment."""
    x0, y0, x1, y1 = box
    left, right = (x0, y0, 0.0, y1), (0.0, y0, x1, y1)
    top, bottom = (x0, y0, x1, 0.0), (x0, 0.0, x1, y1)
    return {
        "left of": (left, right),
        "right of": (right, left),
        "above": (top, bottom),
        "below": (bottom, top),
    }[relation]


def _place(rng: random.Random, thing: Thing, box: _Box, duration: float) -> Body:
    """A body that shows its motion and stays in `box` for `duration` seconds."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0 - 2 * MARGIN, y1 - y0 - 2 * MARGIN
    room = min(width, height)
    # Small enough that a motion across the narrow side still has as much room as the body.
    radius = rng.uniform(0.22, 0.26) * room if room < 0.6 else rng.uniform(0.11, 0.19)
    body = Body(thing, 0.0, 0.0, radius)
    reach = radius
    travel_x = travel_y = 0.0
    motion = thing.motion or "still"
    if motion in HEADINGS:
        dx, dy = HEADINGS[motion]
        free = (width if dx else height) - 2 * radius
        speed = min(rng.uniform(0.16, 0.26), rng.uniform(0.9, 1.0) * free / duration)
        body = replace(body, vx=dx * speed, vy=dy * speed)
        travel_x, travel_y = body.vx * duration, body.vy * duration
    elif motion in ("growing", "shrinking"):
        # 1.6 to 2 times as large after two seconds; longer clips change more slowly.
        change = math.log(rng.uniform(1.6, 2.0)) * min(duration / 2, 1.0)
        small = max(radius * math.exp(-change / 2), LEAST_RADIUS)
        large = min(small * math.exp(change), room / 2)
        rate = math.log(large / small) / duration
        start, growth = (small, rate) if motion == "growing" else (large, -rate)
        body = replace(body, radius=start, growth=growth)
        reach = large
    elif motion == "spinning":
        speed = math.radians(rng.uniform(65, 110)) * min(2 / duration, 1.0)
        turn = math.radians(SHAPES[thing.shape].symmetry)
        body = replace(body, spin=rng.choice((-1, 1)) * speed, angle=rng.uniform(0, turn))
    return replace(
        body,
        x=_start(rng, x0, x1, reach, travel_x),
        y=_start(rng, y0, y1, reach, travel_y),
    )


def _start(rng: random.Random, low: float, high: float, reach: float, travel: float) -> float:
    """A coordinate from which `travel` keeps a body of radius `reach` inside `low … high`."""
    low += reach + MARGIN - min(travel, 0.0)
    high -= reach + MARGIN + max(travel, 0.0)
    return rng.uniform(low, max(low, high))
