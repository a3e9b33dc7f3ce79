"""Shapes told apart in polar coordinates, whatever their size and however they are turned.

A soft coverage is sampled around its centroid on `RADII` × `ANGLES` points, with radii in units of
the circle of equal area, so size drops out; the best circular shift over the angles, found by FFT,
makes rotation drop out. Every shape of the world has its centroid at its origin.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
import torch

from ...pipelines.world.shapes import SHAPES, Shape, signed_distance
from .arrays import Array, ArrayC

RADII, ANGLES = 16, 72
# Reaches the tips of the star, which of all shapes has its corners farthest out: 1.60.
REACH = 1.75
# Radii in pixels for which templates are drawn: an outline of one pixel is soft on a small object.
_SIZES_PX = (3.0, 4.2, 6.0, 8.5, 12.0, 17.0, 24.0, 48.0)
# Blurs for which they are drawn, sigma in pixels: what bilinear sampling does to a sharp video, and
# what an autoencoder does besides.
_BLURS_PX = (0.4, 0.8, 1.3)
_DRAWN_PX = 32  # radius of a template while it is drawn


def _grid() -> tuple[Array, Array]:
    radii = (np.arange(RADII) + 0.5) * REACH / RADII
    angles = np.arange(ANGLES) * 2 * math.pi / ANGLES
    x, y = np.outer(radii, np.cos(angles)), np.outer(radii, np.sin(angles))
    return x.astype(np.float32), y.astype(np.float32)


_X, _Y = _grid()
_SQUARES = (_X**2 + _Y**2).astype(np.float32)
# Share of the disc that a sample at each radius stands for.
_WEIGHT = (2 * np.arange(RADII) + 1).astype(np.float32)[:, None] / (RADII**2 * ANGLES)


def sample(coverage: Array, x_px: float, y_px: float, radius_px: float) -> Array:
    """Coverage `[h, w]` on the polar grid around a centroid, `[RADII, ANGLES]`.

    `x_px, y_px` are counted from the middle of the first pixel; `radius_px` is that of the circle
    of equal area.
    """
    return cv2.remap(
        coverage,
        _X * np.float32(radius_px) + np.float32(x_px),
        _Y * np.float32(radius_px) + np.float32(y_px),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    ).astype(np.float32)


@lru_cache(maxsize=1)
def _templates() -> tuple[ArrayC, Array]:
    """Spectra `[sizes, S, RADII, ANGLES / 2 + 1]`, energies `[sizes, S]`; `S` = blurs × shapes."""
    drawn = [
        [_draw(shape, size, blur) for blur in _BLURS_PX for shape in SHAPES.values()]
        for size in _SIZES_PX
    ]
    samples = np.array(drawn, np.float32)
    energy = (samples**2 * _WEIGHT).sum((-1, -2)).astype(np.float32)
    return np.fft.rfft(samples, axis=-1).astype(np.complex64), energy


def _draw(shape: Shape, size_px: float, blur_px: float) -> Array:
    """The polar samples of a shape of `size_px` (radius of equal area) after a blur."""
    half = 4 * _DRAWN_PX
    axis = torch.arange(2 * half) - half + 0.5
    x, y = axis[None].expand(2 * half, -1), axis[:, None].expand(-1, 2 * half)
    scale = half / 2  # pixels to a radius of the shape, while its area is measured
    inside = signed_distance(shape, x / scale, y / scale) < 0
    scale *= _DRAWN_PX / math.sqrt(float(inside.sum()) / math.pi)
    soft = _DRAWN_PX / size_px  # so many drawn pixels stand for one
    distance = signed_distance(shape, x / scale, y / scale).numpy() * scale / soft
    cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    cover = cv2.GaussianBlur(cover, (0, 0), blur_px * soft).astype(np.float32)
    # Full coverage is what the object's middle shows, as in a video.
    cover = np.clip(cover / np.median(cover[cover > 0.75 * cover.max()]), 0, 1)
    return sample(cover, half - 0.5, half - 0.5, math.sqrt(float(cover.sum()) / math.pi))


def _overlap(one: ArrayC, other: ArrayC) -> Array:
    """Largest weighted correlation over all turns of spectra `[..., RADII, ANGLES / 2 + 1]`."""
    product = np.einsum("...rk,...rk,r->...k", one, np.conj(other), _WEIGHT[:, 0])
    return np.fft.irfft(product, n=ANGLES, axis=-1).max(-1).astype(np.float32)


def match(samples: Array, radius_px: Array) -> tuple[Array, Array]:
    """Soft Dice `2ab / (a² + b²)` of coverages with every shape of the world at its best turn.

    Args:
        samples: `[N, RADII, ANGLES]` from `sample`.
        radius_px: `[N]`, of the circle of equal area.

    Returns:
        Two of `[N, shapes]`, 1 for a perfect match, in the order of `SHAPES`: with templates as
        sharp or blurred as fits best, which names the shape, and with sharp ones, which tells
        clarity.
    """
    spectra, energies = _templates()
    sizes = np.log(np.array(_SIZES_PX))
    row = np.abs(np.log(np.maximum(radius_px, 1e-3))[:, None] - sizes).argmin(1)
    own = (samples**2 * _WEIGHT).sum((-1, -2))
    seen = np.fft.rfft(samples, axis=-1).astype(np.complex64)
    overlap = _overlap(seen[:, None], spectra[row])
    dice = 2 * overlap / np.maximum(own[:, None] + energies[row], 1e-6)
    dice = dice.reshape(len(samples), len(_BLURS_PX), len(SHAPES)).astype(np.float32)
    return dice.max(1), dice[:, 0]


def likeness(one: Array, other: Array) -> Array:
    """Soft Dice of coverages `[N, RADII, ANGLES]` with others, pair by pair, at the best turn."""
    spectra = [np.fft.rfft(samples, axis=-1).astype(np.complex64) for samples in (one, other)]
    energy = ((one**2 + other**2) * _WEIGHT).sum((-1, -2))
    return (2 * _overlap(spectra[0], spectra[1]) / np.maximum(energy, 1e-6)).astype(np.float32)


def stretch(samples: Array) -> Array:
    """How far coverages `[N, RADII, ANGLES]` are from equally wide in all directions, `[N]`.

    `(a² - b²) / (a² + b²)` of the ellipse `a : b` with the same second moments. All shapes of the
    world look the same after some turn of at most 120°, which makes it 0 for them.
    """
    turning = np.exp(2j * np.arange(ANGLES) * 2 * math.pi / ANGLES).astype(np.complex64)
    spread = samples * _WEIGHT * _SQUARES
    widths = np.maximum(spread.sum((-1, -2)), 1e-6)
    return (np.abs((spread * turning).sum((-1, -2))) / widths).astype(np.float32)


def turn(samples: Array, shape: str) -> Array:
    """Orientation of coverages `[N, RADII, ANGLES]` in radians, modulo the symmetry of `shape`.

    The phase of the harmonic that has the shape's symmetry, compared with the template's; clockwise
    on the screen. Zeros for shapes that look the same however they are turned.
    """
    symmetry = SHAPES[shape].symmetry
    if not symmetry:
        return np.zeros(len(samples), np.float32)
    harmonic = round(360 / symmetry)
    template = _templates()[0][-1, list(SHAPES).index(shape)]
    seen = np.fft.rfft(samples, axis=-1)[..., harmonic]
    product = (seen * np.conj(template[:, harmonic]) * _WEIGHT[:, 0]).sum(-1)
    return (-np.angle(product) / harmonic).astype(np.float32)
