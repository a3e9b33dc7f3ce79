"""The shapes: polygons, a disc and a ring, all of radius 1 around the origin, y downwards.

A shape's radius is that of the smallest circle around it, so that turning never changes the room it
needs. `symmetry` is the angle in degrees after which a turned shape looks the same (0: always).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch

Point: TypeAlias = tuple[float, float]
RING_INNER_RADIUS = 0.55


@dataclass(frozen=True, slots=True)
class Shape:
    """A polygon through `corners` or, without corners, a disc with a hole of radius `hole`."""

    corners: tuple[Point, ...] = ()
    hole: float = 0.0
    symmetry: float = 0.0


def _around(count: int, *radii: float) -> tuple[Point, ...]:
    """Corners at equal angles, the first at the top, their distances taken from `radii` in turn."""
    turn = 2 * math.pi / count
    return tuple(
        (radii[i % len(radii)] * math.sin(i * turn), -radii[i % len(radii)] * math.cos(i * turn))
        for i in range(count)
    )


def _square() -> tuple[Point, ...]:
    h = math.sqrt(0.5)
    return (-h, -h), (h, -h), (h, h), (-h, h)


def _cross(half_width: float = 0.3) -> tuple[Point, ...]:
    a = half_width
    b = math.sqrt(1 - a * a)
    return (
        *((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)),
        *((a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)),
    )


SHAPES: dict[str, Shape] = {
    "circle": Shape(),
    "square": Shape(_square(), symmetry=90),
    "triangle": Shape(_around(3, 1.0), symmetry=120),
    "star": Shape(_around(10, 1.0, 0.42), symmetry=72),
    "cross": Shape(_cross(), symmetry=90),
    "ring": Shape(hole=RING_INNER_RADIUS),
}


def signed_distance(shape: Shape, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance of points to the outline of `shape`, negative inside.

    Args:
        x, y: coordinates in units of the shape's radius, of one shape `[...]`.

    Returns:
        `[...]`, in the same units and dtype.
    """
    if not shape.corners:
        radius = torch.hypot(x, y)
        outside = radius - 1
        return torch.maximum(outside, shape.hole - radius) if shape.hole else outside
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(
        shape.corners, shape.corners[1:] + shape.corners[:1], strict=True
    ):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey != 0:  # a ray to the right crosses this edge: toggle (even-odd rule)
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return torch.where(inside, -1.0, 1.0) * nearest.sqrt()
