"""How near frames are to those of a reference: PSNR, SSIM, MS-SSIM, relative L1 and cosine.

Each function takes two clips `[F, height, width, 3]` uint8 of one shape and returns a value for
each frame `[F]` float64; a clip's score is their mean. Everything is computed in float64, so that
differences of 8-bit values do not wrap and those of squares do not cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import numpy.typing as npt

from .result import Result, failed, ok, skipped

Frames = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

HIGHEST_DB = 100.0
"""What equal frames score, whose PSNR is infinite."""
_PEAK = 255.0
_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the scales of MS-SSIM, finest first (Wang, Simoncelli and Bovik 2003)."""


def psnr(made: Frames, reference: Frames) -> Values:
    """PSNR in dB over all pixels and colours of a frame, at most `HIGHEST_DB`."""
    errors = np.array([_mean_square(a, b) for a, b in zip(made, reference, strict=True)])
    with np.errstate(divide="ignore"):
        return np.minimum(HIGHEST_DB, 10 * np.log10(_PEAK**2 / errors))


def ssim(made: Frames, reference: Frames) -> Values:
    """SSIM with a Gaussian window of 11 px and σ 1.5, where the window lies within the frame.

    Mean over positions and colours. Source: Wang et al. 2004, as `skimage.metrics` has it with
    `gaussian_weights=True, use_sample_covariance=False`.

    Raises:
        ValueError: a side is shorter than the window.
    """
    _check_sides(made, 1)
    pairs = zip(made, reference, strict=True)
    return np.array([_similarity(*_wide(a, b))[0].mean() for a, b in pairs])


def ms_ssim(made: Frames, reference: Frames) -> Values:
    """MS-SSIM: contrast and structure at each scale, luminance at the coarsest, weighted.

    Colours apart, then their mean. Negative terms count as 0. Where a side has no room for the
    window at all five scales (176 px), the finest ones that have are taken, their weights scaled to
    the sum 1; `scales` tells how many. Source: Wang, Simoncelli and Bovik 2003.

    Raises:
        ValueError: a side is shorter than the window.
    """
    count = scales(made)
    _check_sides(made, count)
    weights = np.array(_SCALES[:count]) / sum(_SCALES[:count])
    values: list[float] = []
    for pair in zip(made, reference, strict=True):
        a, b = _wide(*pair)
        product = np.ones(made.shape[-1])
        for scale, weight in enumerate(weights):
            whole, structure = _similarity(a, b)
            last = scale == count - 1
            term = (whole if last else structure).mean((0, 1))
            product *= np.maximum(term, 0) ** weight
            a, b = _halved(a), _halved(b)
        values.append(float(product.mean()))
    return np.array(values)


def relative_l1(made: Frames, reference: Frames) -> Values:
    """Sum of absolute differences over the sum of the reference's values; 0 is equal.

    Infinite where the reference is all 0 and the other is not.
    """
    axes = (1, 2, 3)
    whole = reference.sum(axes, dtype=np.float64)
    gaps = np.array([_sum_gap(a, b) for a, b in zip(made, reference, strict=True)])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gaps == 0, 0.0, gaps / whole)


def cosine(made: Frames, reference: Frames) -> Values:
    """Cosine of the angle between frames as vectors; 0 where only one of them is all 0."""
    values: list[float] = []
    for a, b in zip(made, reference, strict=True):
        one, other = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
        equal = 1.0 if np.array_equal(one, other) else 0.0
        values.append(float(one @ other) / lengths if lengths else equal)
    return np.minimum(np.array(values), 1.0)


FRAME_METRICS: Mapping[str, Callable[[Frames, Frames], Values]] = {
    "psnr": psnr,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
    "relative_l1": relative_l1,
    "cosine": cosine,
}


def scales(frames: Frames) -> int:
    """How many scales of MS-SSIM frames of this size have room for; 0 if none."""
    side = min(frames.shape[1:3])
    return sum(side >> scale >= _WINDOW for scale in range(len(_SCALES)))


def compare(made: Frames, reference: Frames, metric: str, *notes: str) -> Result:
    """A metric of `FRAME_METRICS`, with its values by frame in `details`."""
    if made.shape != reference.shape:
        return failed(f"{shape_words(made)} cannot be compared with {shape_words(reference)}")
    if metric in ("ssim", "ms_ssim") and not scales(made):
        return skipped(f"{metric} needs sides of at least {_WINDOW} px, not {shape_words(made)}")
    values = FRAME_METRICS[metric](made, reference)
    if not np.isfinite(values).all():
        black = int(np.flatnonzero(~np.isfinite(values))[0])
        return skipped(f"frame {black} of the reference is all black: relative to it says nothing")
    details: dict[str, object] = {"frames": [round(float(it), 6) for it in values]}
    if metric == "ms_ssim" and (count := scales(made)) < len(_SCALES):
        few = f"ms_ssim of {count} of its {len(_SCALES)} scales: no room for more under 176 px"
        notes = (*notes, few)
    return ok(float(values.mean()), *notes, **details)


def shape_words(frames: Frames) -> str:
    """Length and size in words."""
    count, height, width = frames.shape[:3]
    return f"{count} frame{'' if count == 1 else 's'} of {width}x{height}"


def _mean_square(a: Frames, b: Frames) -> float:
    return float(np.square(a.astype(np.float64) - b).mean())


def _sum_gap(a: Frames, b: Frames) -> float:
    return float(cv2.absdiff(a, b).sum(dtype=np.float64))


def _check_sides(frames: Frames, count: int) -> None:
    if not count or min(frames.shape[1:3]) < _WINDOW:
        raise ValueError(f"sides must be at least {_WINDOW} px, not {shape_words(frames)}")


def _wide(a: Frames, b: Frames) -> tuple[Values, Values]:
    return a.astype(np.float64), b.astype(np.float64)


def _kernel() -> Values:
    at = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-0.5 * (at / _SIGMA) ** 2)
    return weights / weights.sum()


def _blurred(image: Values) -> Values:
    """Gaussian means where the window lies within, `[height − 10, width − 10, channels]`."""
    edge = _WINDOW // 2
    kernel = _kernel()
    means = cv2.sepFilter2D(image, cv2.CV_64F, kernel, kernel)[edge:-edge, edge:-edge]
    return np.asarray(means, dtype=np.float64)


def _similarity(a: Values, b: Values) -> tuple[Values, Values]:
    """SSIM at each position and colour, and its part of contrast and structure."""
    mean_a, mean_b = _blurred(a), _blurred(b)
    product, both = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
    covariance = _blurred(a * b) - product
    variances = _blurred(a * a + b * b) - both
    structure = (2 * covariance + _C2) / (variances + _C2)
    return structure * (2 * product + _C1) / (both + _C1), structure


def _halved(image: Values) -> Values:
    """Means of 2×2 pixels; an odd last line is left out."""
    height, width = (side - side % 2 for side in image.shape[:2])
    even = image[:height, :width]
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
