"""Dense attention by a kernel of choice: those of torch, and of other libraries where installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

DenseKernel = Literal["sdpa", "cudnn", "flash", "efficient", "flex", "xformers", "sage"]
DENSE_KERNELS: tuple[DenseKernel, ...] = get_args(DenseKernel)
"""`sdpa`: torch chooses. `cudnn`, `flash`, `efficient`: torch's attention by that backend. `flex`:
torch's FlexAttention, compiled. `xformers` and `sage` (SageAttention, INT8 queries and keys) are
libraries of their own."""

_PACKAGES = {"xformers": "xformers", "sage": "sageattention"}
_CUDA_ONLY = ("cudnn", "efficient", "xformers", "sage")
_LARGEST_HEADS = {"flash": 256, "sage": 128}


def refuses(
    name: DenseKernel, *, device: str, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why the kernel `name` cannot run there, as far as is known without trying, or None.

    Args:
        device: its type, such as "cuda".
        head_dim: `D`, where it is known.
    """
    if name in _CUDA_ONLY and device != "cuda":
        return "it is for CUDA devices"
    if name in ("flash", "flex") and device not in ("cuda", "cpu"):
        return "it is for CUDA devices and CPUs"
    package = _PACKAGES.get(name)
    if package and find_spec(package) is None:
        return f"{package} is not installed"
    half = dtype in (torch.float16, torch.bfloat16)
    if not half and (name in ("cudnn", "sage") or (name, device) == ("flash", "cuda")):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if name == "flex" and dtype == torch.float64:
        return "it takes no float64"
    largest = _LARGEST_HEADS.get(name) if device == "cuda" else None
    if largest and head_dim and head_dim > largest:
        return f"it takes heads of at most {largest}, not {head_dim}"
    return None


def fastest(q: torch.Tensor) -> DenseKernel | None:
    """The fastest exact kernel of self-attention of q `[B, H, L, D]`, where torch may take another.

    cuDNN's on GPUs from Hopper on: with 32,760 tokens and 12 heads of 128 channels on an H200 it
    takes 11.7 ms, FlashAttention 2, which torch may take, 18.5 (`benchmarks/vmoba_two_pass.py`).
    Elsewhere None.
    """
    if expected_fastest(device=str(q.device), dtype=q.dtype) is None:
        return None
    params = torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False)
    return "cudnn" if torch.backends.cuda.can_use_cudnn_attention(params) else None


def expected_fastest(*, device: str, dtype: torch.dtype) -> DenseKernel | None:
    """What `fastest` finds for most calls there, told before there are any.

    Args:
        device: such as "cuda" or "cuda:1".
    """
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return None
    return None if refuses("cudnn", device="cuda", dtype=dtype) else "cudnn"


def explain(
    name: DenseKernel, *, device: str, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """`refuses` as a sentence that also says what can run there."""
    reason = refuses(name, device=device, dtype=dtype, head_dim=head_dim)
    if reason is None:
        return None
    others = ", ".join(available(device=device, dtype=dtype, head_dim=head_dim))
    return f"the dense kernel {name} cannot run on {device}: {reason}; available are {others}"


def available(
    *, device: str, dtype: torch.dtype, head_dim: int | None = None
) -> tuple[DenseKernel, ...]:
    """The kernels that can run there, as far as is known without trying; `sdpa` always."""
    return tuple(
        name
        for name in DENSE_KERNELS
        if refuses(name, device=device, dtype=dtype, head_dim=head_dim) is None
    )


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kernel: DenseKernel,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over all keys, by that kernel and no other.

    Args:
        q, k, v: `[B, H, L, D]`, of one dtype and device, any strides.
        scale: of the logits; None is `D ** -0.5`.
        mask: as torch takes it; only `sdpa` does.

    Returns:
        `[B, H, L, D]`; laid out in memory as the kernel likes it.

    Raises:
        ValueError: a mask for another kernel than `sdpa`.
        RuntimeError, ImportError: from the kernel, where it cannot; see `refuses`.
    """
    if mask is not None and kernel != "sdpa":
        raise ValueError(f"the dense kernel {kernel} takes no mask, only sdpa does")
    if kernel == "sdpa":
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale
        )
    return _CALLS[kernel](q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


Call = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", float], "torch.Tensor"]


def _of_torch(backend: str) -> Call:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    return call


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return _compiled_flex()(q, k, v, scale=scale)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation for all lengths: layers of a UNet have many. Behind too many of other kinds an
    # error, not the way that writes down all logits.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, scale=scale).transpose(1, 2)


def _sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    attend = importlib.import_module("sageattention").sageattn
    return attend(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)


_CALLS: dict[DenseKernel, Call] = {
    "cudnn": _of_torch("CUDNN_ATTENTION"),
    "flash": _of_torch("FLASH_ATTENTION"),
    "efficient": _of_torch("EFFICIENT_ATTENTION"),
    "flex": _flex,
    "xformers": _xformers,
    "sage": _sage,
}
