"""From what a pipeline or an autoencoder returns to 8-bit RGB frames, one way for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import GenerationError

if TYPE_CHECKING:
    from .media import Frames
    from .request import Resolved


def from_result(result: Any) -> Frames:
    """Frames `[F, height, width, 3]` of the first clip or image in a pipeline's output."""
    found = getattr(result, "frames", None)
    if found is None:
        found = getattr(result, "images", None)
    if isinstance(found, np.ndarray):
        last = torch.from_numpy(found)
        found = last.movedim(-1, -3)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"{type(result).__name__} holds no tensor of frames or images")
    return to_uint8(found[0] if found.ndim == 5 else found[:1])


def from_decoded(decoded: torch.Tensor, *, normalised: bool) -> Frames:
    """Frames of a decoder's output, `[1, 3, F, height, width]` or `[F, 3, height, width]`.

    Values are in [-1, 1], or in [0, 1] where `normalised` is False; as diffusers post-processes.
    """
    pictures = decoded[0].movedim(0, 1) if decoded.ndim == 5 else decoded
    return to_uint8((pictures * 0.5 + 0.5).clamp(0, 1) if normalised else pictures)


def to_uint8(pictures: torch.Tensor) -> Frames:
    """`[F, 3, height, width]` in [0, 1] to uint8 `[F, height, width, 3]`, rounded to nearest."""
    scaled = pictures.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return scaled.movedim(1, -1).contiguous().cpu().numpy()


def check_finite(tensors: Iterable[torch.Tensor], doing: str, dtype: str) -> None:
    """Raises `GenerationError` if `doing`, in precision `dtype`, gave infinities or NaN.

    They would not show in 8-bit frames: NaN is black there and infinity white.
    """
    bad = sum(int((~torch.isfinite(it)).sum()) for it in tensors)
    if bad:
        hint = "" if dtype == "float32" else "; try --dtype float32"
        raise GenerationError(f"{doing} gave {bad:,} values that are not finite numbers{hint}")


def changed_shape(frames: Frames, asked: Resolved, pipeline: str) -> str | None:
    """One line if `pipeline` has silently changed the size or the length, else None."""
    count, height, width = frames.shape[:3]
    if (count, height, width) == (asked.frames, asked.height, asked.width):
        return None
    return (
        f"{pipeline} made {count} frames of {width}x{height} where "
        f"{asked.frames} of {asked.width}x{asked.height} were asked for"
    )


def sha256(frames: Frames) -> str:
    """SHA-256 over shape and values."""
    digest = hashlib.sha256(f"{frames.shape}\n".encode())
    digest.update(np.ascontiguousarray(frames).tobytes())
    return digest.hexdigest()
