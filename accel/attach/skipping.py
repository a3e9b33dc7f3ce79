"""What takes the place of a denoiser's result, and of what is beside it, in a skipped step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from ..errors import AccelerationError
from ..policies.skipping import relative_error
from .denoisers import Denoiser

_ROUNDING = 1e-2
"""Relative error that a sample may have gained between two steps: it may be cast to 16 bits."""


def instead(output: torch.Tensor, denoiser: Denoiser, given: Mapping[str, Any]) -> Any:
    """`output` for every item of a denoiser's batch, returned as the denoiser returns.

    Where pipelines take a leading part of what it returns (of channels, or of tokens), `output`
    stands there.
    """
    assert denoiser.kind is not None
    times = given[denoiser.family.latents].shape[0] // output.shape[0]
    whole = output.to(denoiser.dtype).repeat(times, *[1] * (output.ndim - 1))
    if whole.shape[1:] != denoiser.shape:
        padded = whole.new_zeros(len(whole), *denoiser.shape)
        padded[tuple(slice(size) for size in whole.shape)] = whole
        whole = padded
    return (whole,) if denoiser.kind is tuple else denoiser.kind(sample=whole)


def check_fits(output: torch.Tensor, denoiser: Denoiser, batch: int) -> None:
    """Raise AccelerationError where an `output` cannot be handed on through a denoiser's result.

    Args:
        batch: items of the denoiser's calls.
    """
    item = tuple(output.shape[1:])
    leading = len(item) == len(denoiser.shape) and all(
        a <= b for a, b in zip(item, denoiser.shape, strict=True)
    )
    if not leading or batch % output.shape[0]:
        raise AccelerationError(
            f"{denoiser.family.denoiser} returns {[batch, *denoiser.shape]}, of which its pipeline "
            f"makes {list(output.shape)}: run it without a step policy"
        )


def hollow(result: Any) -> Any:
    """Zeros in the form of `result`, whatever is in it; they take no memory."""
    if isinstance(result, torch.Tensor):
        return result.new_zeros(()).expand(result.shape)
    if isinstance(result, Mapping):
        items = cast("Mapping[str, Any]", result).items()
        return type(result)(**{key: hollow(value) for key, value in items})
    if isinstance(result, list | tuple):
        return type(result)(hollow(it) for it in cast("list[Any]", result))
    return result


def check_handed_on(output: torch.Tensor, predicted: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise AccelerationError where `output`, made of `predicted` in `dtype`, is something else."""
    expected = predicted.to(dtype).to(output.dtype)
    error = 8 * torch.finfo(dtype).eps
    if output.shape != expected.shape or not torch.allclose(output, expected, rtol=error, atol=0):
        raise AccelerationError(
            "the pipeline changed the output that stands for a skipped step: "
            "its guidance is not affine, run it without a step policy"
        )


def check_untouched(sample: torch.Tensor, left: torch.Tensor | None) -> None:
    """Raise AccelerationError where the `sample` of a step is not as the one before `left` it."""
    if left is None:
        return
    if sample.shape == left.shape and float(relative_error(left.float(), sample)) < _ROUNDING:
        return
    raise AccelerationError(
        "the pipeline changes the latents between its steps, as for inpainting: what a policy "
        "foretells would be of others, run it without a step policy"
    )
