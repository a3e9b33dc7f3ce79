"""Speed against quality as an inline SVG: no library, no file, colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 120, 16, 44
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe: how many times as fast, its score, and the ends of the score's interval."""

    name: str
    gain: float
    score: float
    low: float
    high: float


def plot(points: Sequence[Point], *, score: str, rule: float | None) -> str:
    """The points with their intervals; `score` names the axis, `rule` is where the rule lies.

    Raises `ValueError` without points.
    """
    if not points:
        raise ValueError("0 points make no plot: give at least one")
    marks = [it for point in points for it in (point.low, point.high, point.score)]
    low, high = _span([*marks, *([] if rule is None else [rule])])
    left, right = _span([1.0, *(it.gain for it in points)])

    def x(gain: float) -> float:
        return _LEFT + (gain - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Speed against {escape(score)}">'
    ]
    end, foot = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{end}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    parts += [
        f'<text class="tick" x="{x(gain):.1f}" y="{foot + 18}" '
        f'text-anchor="middle">{gain:g}×</text>'
        for gain in ticks(left, right)
    ]
    parts.append(
        f'<text class="tick" x="{(_LEFT + end) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"times as fast as dense</text>"
        f'<text class="tick" transform="translate(14 {(_TOP + foot) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(score)}</text>'
    )
    if rule is not None:
        parts.append(
            f'<path class="rule" d="M{_LEFT} {y(rule):.1f}H{end}"/>'
            f'<text class="tick" x="{_LEFT + 4}" y="{y(rule) + 14:.1f}">99 % of dense</text>'
        )
    placed: list[tuple[float, float]] = []
    for it in points:
        at = x(it.gain)
        label = y(it.score) - 8
        while any(abs(at - a) < 90 and abs(label - b) < 13 for a, b in placed):
            label += 13  # below its neighbour's
        placed.append((at, label))
        parts.append(
            f"<g><title>{escape(it.name)}: {it.gain:.2f}×, {it.score:.4f} "
            f"({it.low:.4f} to {it.high:.4f})</title>"
            f'<path class="span" d="M{at:.1f} {y(it.low):.1f}V{y(it.high):.1f}"/>'
            f'<circle cx="{at:.1f}" cy="{y(it.score):.1f}" r="5"/>'
            f'<text x="{at + 9:.1f}" y="{label:.1f}">{escape(it.name)}</text></g>'
        )
    return "".join((*parts, "</svg>"))


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers, evenly from `low` to `high`, which differ."""
    wide = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(wide))
    step = next(it for it in (unit, 2 * unit, 5 * unit, 10 * unit) if it >= wide)
    first, last = math.ceil(low / step), math.floor(high / step)
    # Digits beyond the step's are of the division.
    digits = max(0, -math.floor(math.log10(step)))
    return [round(k * step, digits) + 0.0 for k in range(first, last + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """What an axis covers: all values, and a little more."""
    low, high = min(values), max(values)
    more = 0.08 * (high - low) or 0.05 * (abs(high) or 1.0)
    return low - more, high + more
