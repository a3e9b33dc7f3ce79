"""Names for numpy arrays and the check of what the judge is given."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
ArrayC: TypeAlias = npt.NDArray[np.complex64]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.bool_]

LEAST_SIDE, LARGEST_SIDE = 64, 512
_SLACK = 1e-3  # of a pixel over its range: rounding, as of a resize
_TAKES = (
    "the judge takes uint8 [frames, height, width, 3], or floating point from 0 to 1, "
    f"sides {LEAST_SIDE} to {LARGEST_SIDE}"
)


def median(values: Array | Bytes, axis: int) -> Array:
    """`np.median` without its checks for NaN, which take longer than short medians."""
    count = values.shape[axis]
    low, high = (count - 1) // 2, count // 2
    ordered = np.partition(values, (low, high), axis=axis)
    below, above = (ordered.take(i, axis).astype(np.float32) for i in (low, high))
    return (below + above) / 2


def as_frames(video: Any) -> Bytes:
    """A numpy or torch video as a contiguous uint8 array `[F, H, W, 3]`.

    Floating point of any precision is scaled by 255 and rounded.

    Raises:
        ValueError: other values, layout or size; one line with what was given and the remedy.
    """
    given = str(getattr(video, "dtype", "")).removeprefix("torch.")
    if hasattr(video, "detach"):
        video = video.detach().cpu()
        # numpy has no bfloat16.
        video = (video.float() if video.is_floating_point() else video).numpy()
    if not isinstance(video, np.ndarray):
        raise ValueError(
            f"a {type(video).__name__} was given; {_TAKES}, as a numpy array or torch tensor: "
            "stack the frames with np.stack"
        )
    given += f" {list(video.shape)}"
    floats = np.issubdtype(video.dtype, np.floating)
    if video.dtype != np.uint8 and not floats:
        raise ValueError(f"{given} was given; {_TAKES}; convert with video.astype('uint8')")
    if video.ndim != 4 or video.shape[-1] != 3:
        first = video.ndim == 4 and video.shape[1] == 3
        axes = "0, 2, 3, 1" if first else "…"
        remedy = f"move the colours last with video.transpose({axes})"
        if video.ndim == 3 and video.shape[-1] == 3:
            remedy = "a single frame needs video[None]"
        raise ValueError(f"{given} was given; {_TAKES}; {remedy}")
    if not len(video):
        raise ValueError(f"{given} was given; {_TAKES}; there must be at least one frame")
    if min(video.shape[1:3]) < LEAST_SIDE or max(video.shape[1:3]) > LARGEST_SIDE:
        raise ValueError(f"{given} was given; {_TAKES}; resize with cv2.resize, INTER_AREA")
    if floats:
        least, most = float(video.min()), float(video.max())
        if not -_SLACK <= least <= most <= 1 + _SLACK:
            remedy = (
                f"its values are {least:g} to {most:g}: scale them to 0 to 1"
                if np.isfinite(video).all()
                else "it holds NaN or infinity: look for the step of the generation that made them"
            )
            raise ValueError(f"{given} was given; {_TAKES}; {remedy}")
        video = (video * 255).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(video)
