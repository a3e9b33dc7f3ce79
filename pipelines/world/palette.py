"""The colours of objects and the backgrounds behind them.

Any two colours, and any colour and any background, lie at least `LEAST_DELTA_E` apart in CIE Lab
(CIE 1976 ΔE), so that a judge can name them after compression and mild noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

RGB: TypeAlias = tuple[int, int, int]
"""sRGB, 0 to 255 each."""

LEAST_DELTA_E = 40.0

COLOURS: dict[str, RGB] = {
    "red": (220, 30, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 230, 50),
    "green": (30, 160, 60),
    "cyan": (60, 215, 225),
    "blue": (35, 85, 235),
    "purple": (140, 35, 160),
    "pink": (255, 130, 190),
}


@dataclass(frozen=True, slots=True)
class Background:
    """A still backdrop: `first` where the pattern is 0, `second` where it is 1.

    `pattern` is `flat` (all 0), `vertical` (0 at the top edge, 1 at the bottom edge) or `stripes`
    (upright cosine stripes, `periods` of them across the shorter side, 0 in the frame's middle).
    """

    first: RGB
    second: RGB
    pattern: str = "flat"
    periods: int = 0


BACKGROUNDS: dict[str, Background] = {
    "black": Background((8, 8, 8), (8, 8, 8)),
    "white": Background((248, 248, 248), (248, 248, 248)),
    "gray": Background((128, 128, 128), (128, 128, 128)),
    "gradient": Background((20, 28, 44), (80, 86, 104), "vertical"),
    "striped": Background((168, 160, 146), (206, 198, 182), "stripes", periods=4),
}


def lab(rgb: RGB) -> tuple[float, float, float]:
    """CIE L*a*b* of an sRGB colour under D65."""

    def linear(channel: float) -> float:
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    def f(t: float) -> float:
        return math.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116

    r, g, b = (linear(channel) for channel in rgb)
    x = f((0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047)
    y = f(0.2126729 * r + 0.7151522 * g + 0.0721750 * b)
    z = f((0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def delta_e(one: RGB, other: RGB) -> float:
    """CIE 1976 colour difference."""
    return math.dist(lab(one), lab(other))
