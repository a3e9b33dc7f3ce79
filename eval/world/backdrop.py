"""Which background stands behind each frame.

Frames and the world's backgrounds are compared in Lab at a quarter of the resolution (less
noise), up to one small shift of the whole frame, by the median over the pixels: objects cover
less than half of a frame, so they do not move a median much.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from ...pipelines.world.palette import BACKGROUNDS
from ...pipelines.world.render import background
from .arrays import Array, Bytes, median

REDUCE = 4
# ΔE; the largest shift of a whole frame up to which a background is taken for the pattern behind
# the objects; gray, striped and white lie at least 19 apart in lightness.
LARGEST_SHIFT = 15.0
# ΔE, lightness and colour apart; the largest shifts with which a background keeps its name. Light
# ones may shift farther: `EXPOSURE` of L + 16 is a change of exposure by 13 %, `_DRIFT` the slack.
# H.264 at crf 18 stays below 1.3, an autoencoder of 31 dB below 1, noise of sigma 25 below 2.6;
# exposure changed by 15 % makes 13.0 of 15.4 on white, 7.7 of 11.0 on gray, 0.3 of 5.8 on black.
EXPOSURE, _DRIFT = 0.1, 4.0
LARGEST_CAST = 6.0
# ΔE, median after the shift: ground truth and H.264 at crf 18 stay below 1, noise of sigma 25 comes
# to 7, uniform noise to 13.6 and more.
LARGEST_RESIDUAL = 10.0
# Share of a pattern's contrast that must be there (and no more than its inverse).
LEAST_CONTRAST = 0.5
# A shift is worth this share of a residual when two backgrounds compete.
_SHIFT_COST = 0.2


def to_lab(frames: Bytes | Array) -> Array:
    """Lab (L 0 to 100) of an image `[h, w, 3]`, sRGB as bytes or as floats in 0 to 1."""
    if frames.dtype == np.uint8:
        frames = frames.astype(np.float32) * np.float32(1 / 255)
    return cv2.cvtColor(frames, cv2.COLOR_RGB2LAB).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Backdrop:
    """What lies behind one frame.

    `name` is None where it is none of the world's; `like` is the one that it still resembles, None
    where it is merely flat. `shift_lab` and `shift_rgb` (0 to 1) are added to that one's template;
    `residual` is the median ΔE that remains.
    """

    name: str | None
    like: str | None
    shift_lab: Array
    shift_rgb: Array
    residual: float

    @property
    def known(self) -> bool:
        """True if there is a background at all, of this world or flat; noise has none."""
        return self.residual <= LARGEST_RESIDUAL

    def off(self, lab: Array) -> Array:
        """What a frame in Lab `[height, width, 3]` has over the background."""
        if self.like is None:
            return lab - self.shift_lab
        off = lab - template(self.like, *lab.shape[:2])[0]
        off -= self.shift_lab
        return off

    def rgb(self, height: int, width: int, region: tuple[slice, slice]) -> Array:
        """A region of the background of a frame of that size, in sRGB (0 to 1)."""
        if self.like is None:
            return self.shift_rgb[None, None]
        return template(self.like, height, width)[1][region] + self.shift_rgb

    def grid(self, height: int, width: int, size: int) -> Array:
        """Mean Lab of the background over `size` by `size` parts of a frame, `[size, size, 3]`."""
        if self.like is None:
            return np.broadcast_to(self.shift_lab, (size, size, 3))
        return _grid(self.like, height, width, size) + self.shift_lab


@lru_cache(maxsize=64)
def template(name: str, height: int, width: int) -> tuple[Array, Array]:
    """A background of the world in Lab and in sRGB (0 to 1), each `[height, width, 3]`."""
    rgb = np.ascontiguousarray(background(name, height, width).permute(1, 2, 0).numpy())
    return to_lab(rgb), rgb


@lru_cache(maxsize=64)
def _grid(name: str, height: int, width: int, size: int) -> Array:
    lab = template(name, height, width)[0]
    return cv2.resize(lab, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)


@lru_cache(maxsize=16)
def _small_templates(height: int, width: int) -> tuple[Array, Array]:
    """All backgrounds at low resolution in Lab and sRGB, each `[backgrounds, pixels, 3]`."""
    reduced = [_reduce(template(name, height, width)[1]) for name in BACKGROUNDS]
    lab = np.stack([to_lab(image).reshape(-1, 3) for image in reduced])
    return lab, np.stack([image.reshape(-1, 3) for image in reduced])


def _reduce(image: Array) -> Array:
    size = (image.shape[1] // REDUCE, image.shape[0] // REDUCE)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)


def find_backdrops(frames: Bytes) -> list[Backdrop]:
    """The background of each of the frames `[F, H, W, 3]`."""
    labs, rgbs = _small_templates(frames.shape[1], frames.shape[2])
    return [_find(frame, labs, rgbs) for frame in frames]


def _find(frame: Bytes, labs: Array, rgbs: Array) -> Backdrop:
    small = _reduce(frame.astype(np.float32) * np.float32(1 / 255))
    lab, rgb = to_lab(small).reshape(-1, 3), small.reshape(-1, 3)
    off = lab - labs
    shift = median(off, axis=1)
    light, cast = np.abs(shift[:, 0]), np.hypot(shift[:, 1], shift[:, 2])
    slack = _DRIFT + EXPOSURE * (median(labs[..., 0], axis=1) + 16)
    keeps_name = (light <= slack) & (cast <= LARGEST_CAST)
    length = np.sqrt((shift**2).sum(-1, keepdims=True))
    shift *= np.minimum(1, LARGEST_SHIFT / np.maximum(length, 1e-6))
    off -= shift[:, None]
    errors = np.sqrt(np.einsum("bpc,bpc->bp", off, off))
    residuals = median(errors, axis=1)
    cost = residuals + _SHIFT_COST * np.minimum(length[:, 0], LARGEST_SHIFT)
    best = int(cost.argmin())
    residual = float(residuals[best])
    if residual <= LARGEST_RESIDUAL and _contrast_fits(lab, labs[best], errors[best]):
        like = tuple(BACKGROUNDS)[best]
        name = like if keeps_name[best] else None
        return Backdrop(name, like, shift[best], median(rgb - rgbs[best], axis=0), residual)
    flat = median(lab, axis=0)
    residual = float(median(np.sqrt(((lab - flat) ** 2).sum(-1)), axis=0))
    return Backdrop(None, None, flat, median(rgb, axis=0), residual)


def _contrast_fits(lab: Array, wanted: Array, errors: Array) -> bool:
    """Whether a pattern shows as much contrast in lightness as it should; True for flat ones."""
    behind = errors < 2 * LARGEST_RESIDUAL
    pattern = wanted[behind, 0] - wanted[behind, 0].mean()
    power = float((pattern**2).sum())
    if power < 1.0 * len(pattern):
        return True
    contrast = float((pattern * lab[behind, 0]).sum()) / power
    return LEAST_CONTRAST <= contrast <= 1 / LEAST_CONTRAST
