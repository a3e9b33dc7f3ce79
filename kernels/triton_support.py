"""What every launch of a Triton kernel needs."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device; decided before it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def padded(size: int) -> int:
    """The next power of two, at least 16, as matrix products need."""
    return max(16, 1 << (size - 1).bit_length())


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
