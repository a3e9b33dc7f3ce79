"""Refuses what will not fit into memory or onto the disk, before a model is loaded.

`--force` turns a refusal into a notice.
"""

from __future__ import annotations

from collections.abc import Callable

from . import files, memory
from .errors import MemoryLimitError, OutputError
from .files import Destination
from .memory import Estimate, amount
from .request import Resolved

# Bounds for what a pixel takes in a file; noise takes 3.0, 1.4, 0.7 and 0.8 (9 frames of 128²).
_FILE_BYTES_PER_PIXEL = {"png": 3, "gif": 2, "mp4": 1, "webm": 1}


def check_memory(
    predicted: Estimate, resolved: Resolved, remedy: str, notice: Callable[[str], None]
) -> None:
    """Raises `MemoryLimitError` if `predicted` is above what the device of `resolved` has free.

    `remedy` is what the user could choose instead.
    """
    device = resolved.device
    free, needed = memory.free_bytes(device), predicted.peak
    if device != "cpu" and memory.host_free_bytes() < predicted.weights:
        # The weights pass through the host's memory on their way to the device.
        free, needed = memory.host_free_bytes(), predicted.weights
    if needed <= free:
        return
    told = (
        f"predicted peak memory {amount(needed)} ({predicted.explain()}) "
        f"is above the {amount(free)} free for {device}"
    )
    if not resolved.force:
        raise MemoryLimitError(f"{told}: choose {remedy}, or go on with --force")
    notice(f"{told}; going on, as --force asks")


def check_disk(
    destination: Destination, resolved: Resolved, latents: int, notice: Callable[[str], None]
) -> None:
    """Raises `OutputError` where the videos, and the latents of `latents` of them, may not fit."""
    pixels = resolved.frames * resolved.height * resolved.width
    videos = resolved.num_videos
    # Latents are less than one float a pixel.
    needed = (videos * _FILE_BYTES_PER_PIXEL[resolved.format] + latents * 4) * pixels
    free = files.free_disk_bytes(destination.folder)
    if needed <= free:
        return
    told = (
        f"{destination.folder} has {amount(free)} of disk free, "
        f"{'one video' if videos == 1 else f'{videos} videos'} may need {amount(needed)}"
    )
    if not resolved.force:
        raise OutputError(f"{told}: free space, choose another --output, or go on with --force")
    notice(f"{told}; going on, as --force asks")
