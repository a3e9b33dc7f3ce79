"""Objects of single frames: where, how large, of which colour, and their outlines.

Lengths are in units of the frame's shorter side, the origin is the middle of the frame, y points
down, as in `pipelines.world.scene`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from ...pipelines.world.palette import COLOURS, LEAST_DELTA_E, lab
from .arrays import Array, Bytes, Labels, Mask, median
from .backdrop import Backdrop, to_lab
from .outlines import sample

# ΔE from the background from which on a pixel belongs to an object: half of the least there is.
FOREGROUND = LEAST_DELTA_E / 2
# Area in squared shorter sides from which on a blob counts: a quarter of the smallest object of the
# world (a star of radius 0.085), so that debris is no object and half an object is one.
LEAST_AREA = 0.0021
_LEAST_PIXELS = 6
# Largest share of a frame that objects cover: one of radius 0.27, the largest, covers 0.23.
LARGEST_COVER = 0.5
# Smooth noise rises over the background where it happens to peak, without plateau or edge. So
# foreground with a median ΔE below `LEAST_CONTRAST` is no object, nor is any beside which, beyond
# what it fades into, more than `LARGEST_HALO` of that is left on top of the background's own noise.
# At 64, objects stay above 41 and below 0.01, H.264 at crf 28 makes 35 and 0.11, noise of sigma 30
# makes 36 and 0.17, a blur of sigma 1.5 makes 34 and 0.06. Of 6000 frames of noise of amplitude 5
# to 40, blurred by 2 to 12 pixels and not used to choose these, 1404 had blobs, 6 are within both.
LEAST_CONTRAST, LARGEST_HALO = 32.0, 0.22
# More blobs than this in a frame are debris.
MOST_BLOBS = 8
# ΔE; a farther colour has no name in this world (colours are at least 40 apart). At 128, H.264 at
# crf 18 comes to 8, at crf 28 or a change of exposure by 15 % to 16, a blur of sigma 1.5 to 18, an
# autoencoder of 31 dB to 19. Where an object is thin, blur mixes its colour with the background.
FARTHEST_COLOUR, FARTHEST_THIN_COLOUR = 22.0, 30.0
_THIN_PX = 4.0  # depth of its deepest pixel below which a blob is thin
# A blob is split where a second palette colour holds at least this share of its inside.
_LEAST_SHARE = 0.2
# Parts of each side of the frame for which the background's colour is kept.
GRID = 4
# Pixels around a blob in which its outline fades out.
_FADE_PX = 2

_PALETTE: Array = np.array([lab(rgb) for rgb in COLOURS.values()], np.float32)


@dataclass(frozen=True, slots=True)
class Blob:
    """One object in one frame.

    `radius` is that of the circle of equal area; `colour` is None where no name is near;
    `off_colour` the mean ΔE of its core to the nearest colour; `outline` the polar coverage
    `[RADII, ANGLES]`.
    """

    frame: int
    x: float
    y: float
    radius: float
    radius_px: float
    lab: Array
    colour: str | None
    off_colour: float
    outline: Array


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame taken apart; `reason` says why there is nothing to see, else it is empty.

    `behind` `[H, W]` marks pixels of the background, `off_backdrop` is their mean ΔE to it; `grid`
    `[GRID, GRID, 3]` is the mean Lab of the background, completed behind the objects.
    """

    backdrop: Backdrop
    blobs: tuple[Blob, ...]
    behind: Mask
    off_backdrop: float
    grid: Array
    reason: str = ""


def take_apart(image: Bytes, index: int, backdrop: Backdrop) -> Frame:
    """Find the objects in frame number `index`, `[H, W, 3]`, before its `backdrop`."""
    height, width = image.shape[:2]
    if not backdrop.known:
        reason = f"no background: {backdrop.residual:.0f} ΔE of noise"
        nothing, grid = np.zeros((height, width), bool), np.zeros((GRID, GRID, 3), np.float32)
        return Frame(backdrop, (), nothing, backdrop.residual, grid, reason)
    smooth = to_lab(cv2.GaussianBlur(image, (3, 3), 0).astype(np.uint8))
    off = backdrop.off(smooth)
    squares = np.einsum("hwc,hwc->hw", off, off)
    mask = cv2.medianBlur((squares > FOREGROUND**2).astype(np.uint8), 3)
    around = cv2.dilate(mask, np.ones((2 * _FADE_PX + 1, 2 * _FADE_PX + 1), np.uint8))
    behind = around == 0
    off_backdrop = float(np.sqrt(squares[behind]).mean()) if behind.any() else 100.0
    off *= behind[..., None]
    grid = cv2.resize(off, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.float32)
    grid += backdrop.grid(height, width, GRID)
    blobs: tuple[Blob, ...] = ()
    labels, boxes = _components(mask, smooth)
    reason = ""
    if mask.mean() > LARGEST_COVER:
        reason = "no background: covered by foreground"
    elif len(boxes) > MOST_BLOBS:
        reason = f"debris: {len(boxes)} blobs"
    elif not boxes:
        reason = "blank: no object"
    elif not _stands_out(squares, mask, around.astype(np.uint8, copy=False), off_backdrop):
        reason = "blank: no object that stands out"
    else:
        canvas = (image, backdrop, labels)
        blobs = tuple(_measure(index, label, box, canvas) for label, box in boxes.items())
    return Frame(backdrop, blobs, behind, off_backdrop, grid, reason)


def _stands_out(squares: Array, mask: Bytes, around: Bytes, noise: float) -> bool:
    """Whether foreground is clearly apart from what surrounds it, as smooth noise is not.

    `squares` `[H, W]` are ΔE² to the background, `around` is `mask` with what it fades into,
    `noise` the mean ΔE beyond.
    """
    contrast = float(median(squares[mask > 0], axis=0))
    ring = cv2.dilate(around, np.ones((3, 3), np.uint8)) - around
    halo = cv2.mean(squares, ring)[0] - noise**2
    return contrast >= LEAST_CONTRAST**2 and halo <= LARGEST_HALO**2 * contrast


_Box = tuple[int, int, int, int]
"""First column, first row, width, height."""


def _components(mask: Bytes, smooth: Array) -> tuple[Labels, dict[int, _Box]]:
    """Labels `[H, W]` and the box of each blob that is large enough, split where colours differ."""
    height, width = mask.shape
    least = max(LEAST_AREA * min(height, width) ** 2, _LEAST_PIXELS)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    boxes: dict[int, _Box] = {}
    free = count
    for label in range(1, count):
        x, y, w, h, area = (int(value) for value in stats[label])
        if area < least:
            continue
        region = (slice(y, y + h), slice(x, x + w))
        parts = _parts(labels[region] == label, smooth[region], least)
        if len(parts) == 1:
            boxes[label] = (x, y, w, h)
            continue
        for part in parts:
            labels[region][part] = free
            left, top, part_w, part_h = cv2.boundingRect(part.astype(np.uint8))
            boxes[free] = (x + left, y + top, part_w, part_h)
            free += 1
    return labels.astype(np.int32, copy=False), boxes


def _parts(blob: Mask, smooth: Array, least: float) -> list[Mask]:
    """A blob `[h, w]` as one part, or as one part for each palette colour that holds a good share.

    Only the core counts: towards the outline colours mix with the background and pass by others.
    """
    core, _ = _core(blob)
    colours = smooth[core]
    middle = median(colours, axis=0)
    if (((colours - middle) ** 2).sum(-1) < FOREGROUND**2).mean() > 1 - _LEAST_SHARE:
        return [blob]
    nearest = np.full(blob.shape, -1)
    nearest[core] = ((colours[:, None] - _PALETTE) ** 2).sum(-1).argmin(1)
    shares = np.bincount(nearest[core], minlength=len(_PALETTE)) / len(colours)
    seeds = np.flatnonzero(shares >= _LEAST_SHARE)
    if len(seeds) < 2:
        return [blob]
    away = [
        cv2.distanceTransform((nearest != seed).astype(np.uint8), cv2.DIST_L2, 3) for seed in seeds
    ]
    owner = np.where(blob, np.argmin(away, axis=0), -1)
    parts: list[Mask] = []
    for seed in range(len(seeds)):
        solid = cv2.medianBlur((owner == seed).astype(np.uint8), 3)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=4)
        parts += [labels == i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= least]
    return parts or [blob]


def _core(blob: Mask) -> tuple[Mask, float]:
    """The pixels at least half as deep in the blob as the deepest, and how deep that one is.

    Outwards, colours mix.
    """
    framed = cv2.copyMakeBorder(blob.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]
    deepest = float(depth.max())
    return depth >= 0.5 * deepest, deepest


def _measure(index: int, label: int, box: _Box, canvas: tuple[Bytes, Backdrop, Labels]) -> Blob:
    """The blob `label` of a frame given as image, background and labels."""
    height, width = canvas[0].shape[:2]
    left, top = max(box[0] - _FADE_PX - 1, 0), max(box[1] - _FADE_PX - 1, 0)
    region = (
        slice(top, min(box[1] + box[3] + _FADE_PX + 1, height)),
        slice(left, min(box[0] + box[2] + _FADE_PX + 1, width)),
    )
    image, labels = canvas[0][region], canvas[2][region]
    back = canvas[1].rgb(height, width, region)
    blob = labels == label
    inside, deepest = _core(blob)
    rgb = median(image[inside], axis=0) / np.float32(255)
    middle = to_lab(rgb[None, None])[0, 0]
    gaps = np.sqrt(((_PALETTE - middle) ** 2).sum(-1))
    nearest = int(gaps.argmin())
    named = gaps[nearest] <= (FARTHEST_COLOUR if deepest >= _THIN_PX else FARTHEST_THIN_COLOUR)
    off = np.sqrt(((to_lab(image[inside][None])[0] - _PALETTE[nearest]) ** 2).sum(-1))
    # sRGB mixes linearly at an outline, so the way from background to object is the coverage.
    step = rgb - back
    way = image.astype(np.float32) * np.float32(1 / 255) - back
    cover = np.einsum("hwc,hwc->hw", way, step) / np.maximum(
        np.einsum("hwc,hwc->hw", step, step), 1e-4
    )
    near = cv2.dilate(blob.astype(np.uint8), np.ones((2 * _FADE_PX + 1,) * 2, np.uint8)) > 0
    near &= blob | (labels == 0)
    cover = np.where(near, cover.clip(0, 1), 0).astype(np.float32)
    area = max(float(cover.sum()), 1.0)
    x = float((cover.sum(0) * np.arange(cover.shape[1])).sum()) / area
    y = float((cover.sum(1) * np.arange(cover.shape[0])).sum()) / area
    radius_px = math.sqrt(area / math.pi)
    short = min(height, width)
    return Blob(
        frame=index,
        x=(left + x + 0.5 - width / 2) / short,
        y=(top + y + 0.5 - height / 2) / short,
        radius=radius_px / short,
        radius_px=radius_px,
        lab=middle,
        colour=tuple(COLOURS)[nearest] if named else None,
        off_colour=float(off.mean()),
        outline=sample(cover, x, y, radius_px),
    )
