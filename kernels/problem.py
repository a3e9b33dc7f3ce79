"""What a backend must know of an attention call to say whether it can do it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import BlockPlan, Tail, Tile
from .precision import INPUT, Precision


@dataclass(frozen=True, slots=True)
class Problem:
    """An attention call without its numbers.

    `batch` and `heads` are those of the tensors. `requires_grad`: any of queries, keys, values and
    the plan's bias does. `biased`: the plan weights its tiles. `masked`: it masks tokens within
    tiles. `merged`: keys are merged (`merging`), which no backend for tiles does; a tile is then
    one token.
    """

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    head_dim: int
    queries: int
    keys: int
    tile: Tile
    tail: Tail
    biased: bool
    requires_grad: bool
    precision: Precision = INPUT
    masked: bool = False
    merged: bool = False

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan,
        precision: Precision = INPUT,
    ) -> Problem:
        """The problem of a call."""
        return cls(
            device=q.device.type,
            dtype=q.dtype,
            batch=q.shape[0],
            heads=q.shape[1],
            head_dim=q.shape[-1],
            queries=plan.queries,
            keys=plan.keys,
            tile=plan.tile,
            tail=plan.tail,
            biased=plan.bias is not None,
            requires_grad=wants_gradients(q, k, v, plan.bias),
            precision=precision,
            masked=plan.within is not None,
        )

    def tensor_bytes(self, tokens: int) -> int:
        """Bytes of `[B, H, tokens, D]`."""
        return self.batch * self.heads * tokens * self.head_dim * self.dtype.itemsize


def wants_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients of any of these are recorded."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
