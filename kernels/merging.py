"""Attention to fewer keys: keys that are alike are one, which weighs as many as it stands for.

Queries are untouched, so that the output has all tokens. Computed by torch's attention with the
weights as a mask, or without one where all weigh alike.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from .problem import Problem

KERNEL = "sdpa"
"""What computes it, as receipts name it."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyMerge:
    """Which keys of one attention call become one.

    Each cell of tokens makes one key and value, the means over its first token and those of the
    others that join it.

    Args:
        cells: `[C, width]` int64, numbers of tokens. What fills up a cell never joins.
        joins: `[B or 1, H or 1, C, width - 1]` bool, whether a token joins the first of its cell.
        alone: `[B or 1, H or 1, S]` int64, tokens with a key of their own: all that are no first
            one and do not join.
        keys: tokens in all.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """

    cells: torch.Tensor
    joins: torch.Tensor
    alone: torch.Tensor
    keys: int

    def __post_init__(self) -> None:
        if self.cells.ndim != 2 or 0 in self.cells.shape or self.cells.dtype != torch.int64:
            raise ValueError(
                f"cells {tuple(self.cells.shape)} of {self.cells.dtype}; [C, width] of int64 is "
                "needed"
            )
        count, width = self.cells.shape
        shape = (count, width - 1)
        if self.joins.ndim != 4 or self.joins.shape[2:] != shape or self.joins.dtype != torch.bool:
            raise ValueError(
                f"joins {tuple(self.joins.shape)} of {self.joins.dtype} for cells {(count, width)};"
                f" [B or 1, H or 1, {count}, {width - 1}] of bool is needed"
            )
        if self.alone.ndim != 3 or self.alone.dtype != torch.int64:
            raise ValueError(
                f"alone {tuple(self.alone.shape)} of {self.alone.dtype}; [B or 1, H or 1, S] of "
                "int64 is needed"
            )

    @property
    def left(self) -> int:
        """Keys that are left."""
        return self.cells.shape[0] + self.alone.shape[-1]

    @property
    def alike(self) -> bool:
        """Whether all keys that are left stand for as many tokens, seen from shapes alone."""
        return not self.alone.shape[-1] and self.cells.numel() == self.keys

    def sizes(self) -> torch.Tensor:
        """Tokens that each key stands for, `[B or 1, H or 1, left]` int64, cells first."""
        sizes = self.joins.sum(-1) + 1
        return torch.nn.functional.pad(sizes, (0, self.alone.shape[-1]), value=1)

    def density(self) -> torch.Tensor:
        """Keys that are left as a share of all, `[1, 1]` float32; a merged key counts as one."""
        return torch.full((1, 1), self.left / self.keys, device=self.cells.device)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Means over the tokens of each key, `[B, H, L, D]` to `[B, H, left, D]`; as `sizes`."""
        # Sums in float32 at least, and in the order of the cell: the same at every call.
        sums = x[:, :, self.cells[:, 0]].to(torch.promote_types(x.dtype, torch.float32))
        for token, joins in zip(self.cells.T[1:], self.joins.unbind(-1), strict=True):
            # What does not join must not reach the sum, were it NaN.
            sums += x[:, :, token].masked_fill(~joins[..., None], 0)
        means = sums / (self.joins.sum(-1) + 1)[..., None]
        alone = self.alone.expand(*x.shape[:2], -1)[..., None].expand(-1, -1, -1, x.shape[3])
        return torch.cat([means.to(x.dtype), x.gather(2, alone)], dim=2)

    def check(self) -> None:
        """Look at the numbers, which waits for the device; construction looks at shapes alone.

        Raises:
            ValueError: a token that is in no key, or in more than one.
        """
        shape = torch.broadcast_shapes(self.joins.shape[:2], self.alone.shape[:2])
        told = torch.zeros(*shape, self.keys, dtype=torch.int64, device=self.cells.device)
        tokens = [self.cells[:, 0].expand(*shape, -1), self.alone.expand(*shape, -1)]
        for x in tokens:
            told.scatter_add_(2, x, torch.ones_like(x))
        joined = self.joins.flatten(2).expand(*shape, -1).long()
        told.scatter_add_(2, self.cells[:, 1:].flatten().expand(*shape, -1), joined)
        if bool((told != 1).any()):
            token = int((told != 1).nonzero()[0, 2])
            raise ValueError(f"token {token} is not in one key; each must be in just one")

    def repeated(self, times: int) -> KeyMerge:
        """That of a batch that holds this one's items `times` times, one behind the other."""

        def several(x: torch.Tensor) -> torch.Tensor:
            return x if x.shape[0] == 1 else x.repeat(times, *[1] * (x.ndim - 1))

        return replace(self, joins=several(self.joins), alone=several(self.alone))

    def of_heads(self, heads: slice) -> KeyMerge:
        """That of these heads alone."""

        def some(x: torch.Tensor) -> torch.Tensor:
            return x if x.shape[1] == 1 else x[:, heads].contiguous()

        return replace(self, joins=some(self.joins), alone=some(self.alone))


def merged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    merge: KeyMerge,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of all queries to merged keys, the logarithms of their sizes on the logits.

    out_i = sum over keys g of n_g e^{s q_i k_g} v_g over the same with v = 1; k_g and v_g are means
    over n_g tokens. Where these are identical it is dense attention to rounding, that of log n_g to
    the dtype of q included. Differentiable, for a merge that is given.

    Args:
        q, k, v: `[B, H, L, D]` of one floating dtype and device, any strides; L is `merge.keys`.
        scale: s above; None is `D ** -0.5`.

    Returns:
        Like q.

    Raises:
        ValueError: tensors that do not fit the merge; with `KINORA_CHECK=1` in the environment also
            numbers that `KeyMerge.check` refuses.

    Source: proportional attention of ToMe (arXiv 2210.09461, 3.1).
    """
    told = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or not q.shape == k.shape == v.shape or k.shape[2] != merge.keys:
        raise ValueError(f"{told}; [B, H, {merge.keys}, D] is needed of each, as the merge is")
    for name, x in (("joins", merge.joins), ("alone", merge.alone)):
        for what, given, whole in zip(("B", "H"), x.shape, q.shape, strict=False):
            if given not in (1, whole):
                raise ValueError(f"{name} has {what} = {given}, the tensors {whole}; 1 or the same")
    if os.environ.get("KINORA_CHECK") == "1":
        merge.check()
    # A weight that all keys have cancels, and a mask would keep torch from its fastest kernels.
    bias = None
    if not merge.alike:
        sizes = merge.sizes().to(torch.promote_types(q.dtype, torch.float32))
        bias = sizes.log().to(q.dtype)[:, :, None]
    return torch.nn.functional.scaled_dot_product_attention(
        q, merge.of(k), merge.of(v), attn_mask=bias, scale=scale
    )


def efficiency(problem: Problem) -> float:
    """density x dense time / time, means and planning included.

    On a CPU the lower ones of those measured on one core with AVX-512, 4 heads of 64, half and a
    quarter of the keys, 576, 2304 and 9216 tokens. On an H200 .56 to .86, likewise, of 32,760
    tokens and more with 128 channels, which other GPUs are taken to be like. With 64 channels .26
    and .29; .2 stands for that and for what was not measured, so low a guess that no recipe for
    `faster` runs it, since torch's fastest kernels take no mask.
    """
    if problem.device != "cpu":
        large = problem.keys >= 32000 and problem.head_dim == 128
        return 0.55 if problem.device == "cuda" and large else 0.2
    return next(value for tokens, value in _EFFICIENCIES if problem.keys >= tokens)


_EFFICIENCIES = ((8192, 0.9), (2048, 0.7), (512, 0.5), (0, 0.1))


def workspace(problem: Problem) -> int:
    """The merged keys and values, at most as many as there were, and their sums in float32."""
    both = problem.tensor_bytes(2 * problem.keys)
    sums = 2 * problem.batch * problem.heads * problem.keys * problem.head_dim * 4
    return both + sums


def merge_bytes(problem: Problem, share: float) -> int:
    """Bytes of the merge of one item of a batch, where `share` of the keys are left."""
    return problem.heads * (problem.keys + round(8 * share * problem.keys))
