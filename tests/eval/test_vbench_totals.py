"""VBench's totals: published rows, and None where a dimension is missing."""

from __future__ import annotations

import math

import pytest

from kinora.eval.vbench.spec import DIMENSIONS, DIMENSIONS_2, I2V_DIMENSIONS
from kinora.eval.vbench.totals import i2v, t2v, vbench2

ORDER = (
    *("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects"),
    *("human_action", "color", "spatial_relationship", "scene", "appearance_style"),
    *("temporal_style", "overall_consistency"),
)
# Total, quality, semantic and the 16 raw scores in %, as the leaderboard had them in February 2025
# (table 1 of FlashVideo, arXiv 2502.05179).
PUBLISHED = {
    "Vchitect-2.0 (VEnhancer)": """82.24 83.54 77.06 96.83 96.66 98.57 98.98 63.89 60.41 65.35
        86.61 68.84 97.20 87.04 57.55 56.57 23.73 25.01 27.57""",
    "CogVideoX-1.5": """82.17 82.78 79.76 96.87 97.35 98.88 98.31 50.93 62.79 65.02
        87.47 69.65 97.20 87.55 80.25 52.91 24.89 25.19 27.30""",
    "CogVideoX-5B": """81.61 82.75 77.04 96.23 96.52 98.66 96.92 70.97 61.98 62.90
        85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59""",
    "CogVideoX-2B": """81.57 82.51 77.79 96.42 96.53 98.45 97.76 58.33 61.47 65.60
        87.81 69.35 97.00 86.87 54.64 57.51 24.93 25.56 28.01""",
    "Mochi-1": """80.13 82.64 70.08 96.99 97.28 99.40 99.02 61.85 56.94 60.64
        86.51 50.47 94.60 79.73 69.24 36.99 20.33 23.65 25.15""",
}


def raw_of(row: str) -> tuple[list[float], dict[str, float]]:
    values = [float(it) / 100 for it in row.split()]
    return values[:3], dict(zip(ORDER, values[3:], strict=True))


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_rows(row: str) -> None:
    (total, quality, semantic), raw = raw_of(row)
    found = t2v(raw).scores
    # Raw scores are published in hundredths, which leaves as much in doubt.
    assert found["quality"] == pytest.approx(quality, abs=1.5e-4)
    assert found["semantic"] == pytest.approx(semantic, abs=1.5e-4)
    assert found["total"] == pytest.approx(total, abs=1.5e-4)


def test_ranges_span_0_to_1() -> None:
    assert tuple(DIMENSIONS) == ORDER
    lowest = t2v({name: it.low for name, it in DIMENSIONS.items()}).scores
    highest = t2v({name: it.high for name, it in DIMENSIONS.items()}).scores
    assert list(lowest.values()) == pytest.approx([0, 0, 0])
    assert list(highest.values()) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("gone", [None, math.nan])
@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_missing_dimension_is_not_zero(name: str, gone: float | None) -> None:
    raw: dict[str, float | None] = {**raw_of(PUBLISHED["CogVideoX-5B"])[1], name: gone}
    found = t2v(raw)
    assert found.scores["total"] is None and found.scores[DIMENSIONS[name].group] is None
    other = "semantic" if DIMENSIONS[name].group == "quality" else "quality"
    assert found.scores[other] is not None
    assert found.missing == (name,) and name in found.why


def test_i2v_and_vbench2() -> None:
    names = ("i2v_subject", "i2v_background", "camera_motion", *ORDER[:2], *ORDER[3:7])
    raw: dict[str, float | None] = {**dict.fromkeys(names, 1.0), "motion_smoothness": 0.9975}
    assert i2v(raw).scores == pytest.approx({"i2v": 1.0, "quality": 1.0, "total": 1.0})
    # The weight of camera motion is a tenth: 2 of 2.1.
    assert i2v({**raw, "camera_motion": 0.0}).scores["i2v"] == pytest.approx(2 / 2.1)
    assert i2v({**raw, "dynamic_degree": 0.0}).scores["quality"] == pytest.approx(5 / 5.5)
    assert i2v({**raw, "camera_motion": None}).scores["total"] is None
    assert set(I2V_DIMENSIONS) == {*names, "temporal_flickering"}  # which is in no total
    assert i2v({**raw, "temporal_flickering": 0.0}).scores["total"] == pytest.approx(1.0)
    assert len(DIMENSIONS_2) == 18
    whole: dict[str, float | None] = dict.fromkeys(DIMENSIONS_2, 0.5)
    whole |= {"Diversity": 1.0}
    # Categories weigh alike, however many dimensions they have.
    assert vbench2(whole).scores["total"] == pytest.approx((0.75 + 4 * 0.5) / 5)
    assert vbench2({**whole, "Material": None}).scores["total"] is None
