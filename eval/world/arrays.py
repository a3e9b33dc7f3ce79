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
_TAKES = f"the judge takes uint8 [frames, height, width, 3], sides {LEAST_SIDE} to {LARGEST_SIDE}"


def as_frames(video: Any) -> Bytes:
    """A numpy or torch video as a contiguous uint8 array `[F, H, W, 3]`.

    Raises:
        ValueError: another dtype, layout or size; one line with what was given and the remedy.
    """
    if hasattr(video, "detach"):
        video = video.detach().cpu().numpy()
    if not isinstance(video, np.ndarray):
        raise ValueError(
            f"a {type(video).__name__} was given; {_TAKES}, as a numpy array or torch tensor: "
            "stack the frames with np.stack"
        )
    given = f"{video.dtype} {list(video.shape)}"
    if video.dtype != np.uint8:
        floats = np.issubdtype(video.dtype, np.floating)
        broken = floats and not bool(np.isfinite(video).all())
        remedy = (
            "it holds NaN or infinity: the generation failed, look for the step that made them"
            if broken
            else "convert with (video * 255).round().clip(0, 255).astype('uint8')"
        )
        raise ValueError(f"{given} was given; {_TAKES}; {remedy}")
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
    return np.ascontiguousarray(video)
