"""The Fréchet distance of two sets of features, as of Gaussians: what FID and FVD are.

Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Values: TypeAlias = npt.NDArray[np.float64]


def distance(one: Values, other: Values) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of features `[N, D]` and `[M, D]`.

    Raises:
        ValueError: fewer than two features of either, other numbers of values, or not finite ones.
    """
    for features in (one, other):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != one.shape[1]:
            raise ValueError(
                f"features are {list(one.shape)} and {list(other.shape)}: give at least two of "
                "each, of as many values"
            )
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite")
    gap = one.mean(0) - other.mean(0)
    # With centred features A and B over √(n − 1), Σ₁ = AᵀA and Σ₂ = BᵀB, and the trace of the root
    # of their product is the sum of the singular values of A Bᵀ: no root of a singular matrix.
    factors = [np.linalg.qr((it - it.mean(0)) / np.sqrt(len(it) - 1)).R
               for it in (one.astype(np.float64), other.astype(np.float64))]  # fmt: skip
    traces = sum(float((it**2).sum()) for it in factors)
    root = float(np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum())
    return max(0.0, float(gap @ gap) + traces - 2 * root)
