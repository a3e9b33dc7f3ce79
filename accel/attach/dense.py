"""A dense call by the kernel that a recipe names."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.dense import DenseKernel, available, dense_attention
from ..errors import AccelerationError
from .routes import Call, unrouted
from .sites import NoSiteError, everywhere, unmasked


def by_kernel(call: Call, kernel: DenseKernel) -> Callable[[], torch.Tensor]:
    """What computes `call` by `kernel`, laid out as `call.laid_out` does.

    Masked text is left out of what kernels other than `sdpa` see. Raises `NoSiteError` where the
    kernel takes no such call; what is returned raises AccelerationError where it fails.
    """
    if not call.flags.plain or call.k.shape != call.q.shape:
        raise NoSiteError("because it is no plain self-attention")
    rows = None if kernel == "sdpa" else unmasked(call)
    mask = call.mask if kernel == "sdpa" else None

    def attend() -> torch.Tensor:
        q, k, v = (x if rows is None else x[:, :, rows] for x in (call.q, call.k, call.v))
        try:
            with unrouted():
                out = dense_attention(q, k, v, kernel=kernel, scale=call.scale, mask=mask)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, ValueError, TypeError, AssertionError) as error:
            known = available(device=q.device.type, dtype=q.dtype, head_dim=q.shape[-1])
            others = [it for it in known if it != kernel]
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise AccelerationError(
                f"the dense kernel {kernel} failed on q {tuple(q.shape)} {q.dtype}: {told[0]}; "
                f"others are {', '.join(others)}"
            ) from error
        return call.laid_out(everywhere(call, rows, out))

    return attend
