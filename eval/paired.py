"""Differences between two settings, prompt by prompt, and what may be said of them.

Means of two groups say little: over prompts PSNR to dense spreads by more than 10 dB. Pairs of the
same prompt, seed and noise say more, so everything here takes differences of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
KEPT_SHARE = 0.99
"""Of the dense mean that an acceleration must reach: the rule of MLPerf for Wan2.2-T2V-A14B."""
_ROUNDING = 1e-12  # 0.99 times a mean is not exact


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean of `n` paired differences, and its 95 % interval `low … high`."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a score keeps `share` of its dense mean, and how sure that is.

    `kept` compares the means, as the rule says. `difference` is paired; `sure` says whether its
    interval lies wholly on the side that `kept` names. Without pairs, or with a dense mean that is
    not above 0, there is no verdict: `kept` is None and `reason` says why.
    """

    kept: bool | None
    sure: bool
    share: float
    ratio: float | None
    dense: float | None
    fast: float | None
    difference: Paired | None
    reason: str = ""


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the mean of `values` over resampled ones (percentile bootstrap).

    Of paired differences it is the interval of the mean difference over prompts.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    given = np.asarray(values, dtype=np.float64)
    if not len(given):
        raise ValueError("0 values were given: an interval needs at least one")
    if not np.isfinite(given).all():
        raise ValueError("a value is not finite: leave those without a score out")
    rng = np.random.default_rng(seed)
    means = given[rng.integers(len(given), size=(RESAMPLES, len(given)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def paired(fast: Sequence[float], dense: Sequence[float], seed: int = 0) -> Paired:
    """`fast` less `dense`, pair by pair.

    Raises:
        ValueError: no pairs, lengths that differ, or values that are not finite.
    """
    if len(fast) != len(dense):
        raise ValueError(f"{len(fast)} scores cannot be paired with {len(dense)}: give one for one")
    differences = [a - b for a, b in zip(fast, dense, strict=True)]
    low, high = mean_interval(differences, seed)
    return Paired(len(differences), math.fsum(differences) / len(differences), low, high)


def verdict(
    fast: Sequence[float], dense: Sequence[float], *, share: float = KEPT_SHARE, seed: int = 0
) -> Verdict:
    """Whether the mean of `fast` is at least `share` of that of `dense`, for scores where more is
    better.

    Raises:
        ValueError: lengths that differ, or values that are not finite.
    """
    if not fast and not dense:
        return Verdict(None, False, share, None, None, None, None, "there are no pairs")
    difference = paired(fast, dense, seed)
    means = math.fsum(fast) / len(fast), math.fsum(dense) / len(dense)
    if means[1] <= 0:
        why = f"the dense mean is {means[1]:g}: a share of it says nothing"
        return Verdict(None, False, share, None, means[1], means[0], difference, why)
    kept = means[0] >= share * means[1] - _ROUNDING
    # The rule as a paired difference: fast − share·dense is not below 0.
    low, high = mean_interval([a - share * b for a, b in zip(fast, dense, strict=True)], seed)
    sure = low >= -_ROUNDING if kept else high < 0
    return Verdict(kept, sure, share, means[0] / means[1], means[1], means[0], difference)
