"""VBench's totals, by the published constants; None unless every dimension is there.

The project's own script puts 0 for a dimension that is missing, which makes a number that looks
like a total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .spec import DIMENSIONS

# VBench-I2V: name → lowest, highest, weight.
_I2V = {
    "i2v_subject": (0.1462, 1.0, 1.0),
    "i2v_background": (0.2615, 1.0, 1.0),
    "camera_motion": (0.0, 1.0, 0.1),
}
_I2V_QUALITY = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)
# VBench-2.0: category → dimensions, all of equal weight and none normalised.
VBENCH2: dict[str, tuple[str, ...]] = {
    "creativity": ("Diversity", "Composition"),
    "commonsense": ("Motion_Rationality", "Instance_Preservation"),
    "controllability": (
        *("Dynamic_Spatial_Relationship", "Dynamic_Attribute", "Motion_Order_Understanding"),
        *("Human_Interaction", "Complex_Landscape", "Complex_Plot", "Camera_Motion"),
    ),
    "human_fidelity": ("Human_Anatomy", "Human_Identity", "Human_Clothes"),
    "physics": ("Mechanics", "Thermotics", "Material", "Multi-View_Consistency"),
}


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
    table = {it.name: (it.low, it.high, it.weight) for it in DIMENSIONS.values()}
    groups = {
        group: {name: table[name] for name, it in DIMENSIONS.items() if it.group == group}
        for group in ("quality", "semantic")
    }
    quality, semantic = (_weighted(raw, groups[it]) for it in ("quality", "semantic"))
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    scores = {"quality": quality, "semantic": semantic, "total": total}
    return Totals(scores, _missing(raw, table))


def i2v(raw: Mapping[str, float | None]) -> Totals:
    """I2V (3 dimensions), quality (6) and total, their mean."""
    table = {name: DIMENSIONS[name] for name in _I2V_QUALITY}
    quality_table = {name: (it.low, it.high, it.weight) for name, it in table.items()}
    image, quality = _weighted(raw, _I2V), _weighted(raw, quality_table)
    total = None if image is None or quality is None else (image + quality) / 2
    return Totals(
        {"i2v": image, "quality": quality, "total": total},
        _missing(raw, {**_I2V, **quality_table}),
    )


def vbench2(raw: Mapping[str, float | None]) -> Totals:
    """The means of five categories, and total, theirs."""
    scores: dict[str, float | None] = {
        category: _weighted(raw, dict.fromkeys(names, (0.0, 1.0, 1.0)))
        for category, names in VBENCH2.items()
    }
    whole = [it for it in scores.values() if it is not None]
    scores["total"] = math.fsum(whole) / len(whole) if len(whole) == len(VBENCH2) else None
    return Totals(scores, _missing(raw, {name: 0 for it in VBENCH2.values() for name in it}))


def _weighted(
    raw: Mapping[str, float | None], table: Mapping[str, tuple[float, float, float]]
) -> float | None:
    parts: list[float] = []
    for name, (low, high, weight) in table.items():
        value = raw.get(name)
        if value is None or not math.isfinite(value):
            return None
        parts.append((value - low) / (high - low) * weight)
    return math.fsum(parts) / math.fsum(weight for _, _, weight in table.values())


def _missing(raw: Mapping[str, float | None], names: Mapping[str, object]) -> tuple[str, ...]:
    values = {name: raw.get(name) for name in names}
    return tuple(name for name, it in values.items() if it is None or not math.isfinite(it))
