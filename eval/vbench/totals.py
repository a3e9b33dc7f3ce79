"""VBench's totals, by the published constants; None unless every dimension is there.

The project's own script puts 0 for a dimension that is missing, which makes a number that looks
like a total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .spec import DIMENSIONS, DIMENSIONS_2, I2V_DIMENSIONS, Dimension


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals by name, 0 to 1 or None; `missing` are the dimensions that have no score."""

    scores: dict[str, float | None]
    missing: tuple[str, ...]

    @property
    def why(self) -> str:
        """Why a total is None; empty where all are there."""
        if not self.missing:
            return ""
        return f"without a score: {', '.join(self.missing)}"


def t2v(raw: Mapping[str, float | None]) -> Totals:
    """Quality (7 dimensions), semantic (9) and total = (4 quality + semantic) / 5.

    Args:
        raw: the package's scores by dimension, 0 to 1.
    """
    quality, semantic = (_group(raw, DIMENSIONS, it) for it in ("quality", "semantic"))
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    scores = {"quality": quality, "semantic": semantic, "total": total}
    return Totals(scores, _missing(raw, DIMENSIONS))


def i2v(raw: Mapping[str, float | None]) -> Totals:
    """I2V (3 dimensions), quality (6) and total, their mean."""
    image, quality = (_group(raw, I2V_DIMENSIONS, it) for it in ("i2v", "quality"))
    total = None if image is None or quality is None else (image + quality) / 2
    scores = {"i2v": image, "quality": quality, "total": total}
    return Totals(scores, _missing(raw, I2V_DIMENSIONS))


def vbench2(raw: Mapping[str, float | None]) -> Totals:
    """The means of five categories, and total, theirs."""
    categories = dict.fromkeys(it.group for it in DIMENSIONS_2.values())
    scores = {it: _group(raw, DIMENSIONS_2, it) for it in categories}
    whole = [it for it in scores.values() if it is not None]
    scores["total"] = math.fsum(whole) / len(whole) if len(whole) == len(categories) else None
    return Totals(scores, _missing(raw, DIMENSIONS_2))


def _group(
    raw: Mapping[str, float | None], dimensions: Mapping[str, Dimension], group: str
) -> float | None:
    """The weighted mean of a group's dimensions, each from its lowest to its highest."""
    members = [it for it in dimensions.values() if it.group == group and it.weight]
    parts: list[float] = []
    for it in members:
        value = raw.get(it.name)
        if value is None or not math.isfinite(value):
            return None
        parts.append((value - it.low) / (it.high - it.low) * it.weight)
    return math.fsum(parts) / math.fsum(it.weight for it in members)


def _missing(
    raw: Mapping[str, float | None], dimensions: Mapping[str, Dimension]
) -> tuple[str, ...]:
    values = {name: raw.get(name) for name, it in dimensions.items() if it.weight}
    return tuple(name for name, it in values.items() if it is None or not math.isfinite(it))
