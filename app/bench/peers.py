"""Other implementations of attention, timed beside ours where they are installed.

Each entry gets a case and gives a call without arguments that computes the output `[1, H, L, D]`,
or raises `Absent` with the reason why it cannot. What is done before the call is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.dense import DenseKernel, dense_attention, refuses
from ...kernels.plan import BlockPlan, Tile, tile_lengths
from .cases import Case

Call = Callable[[], torch.Tensor]


class Absent(Exception):  # noqa: N818 - an answer, not an error
    """Why an implementation cannot take a case here."""


@dataclass(frozen=True, slots=True)
class Peer:
    """An implementation; a dense one attends to everything, whatever the plan."""

    prepare: Callable[[Case], Call]
    dense: bool = False


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{package} is not installed ({error})") from None


def _dense(kernel: DenseKernel) -> Callable[[Case], Call]:
    """One of the dense kernels that recipes can name."""

    def prepare(case: Case) -> Call:
        q, k, v = case.tensors
        reason = refuses(kernel, device=q.device.type, dtype=q.dtype, head_dim=q.shape[-1])
        if reason:
            raise Absent(reason)
        return lambda: dense_attention(q, k, v, kernel=kernel)

    return prepare


def _whole_tiles(case: Case, *sizes: Tile) -> None:
    plan = case.plan
    if plan.tail != "none":
        raise Absent("it has no tail")
    if plan.tile not in sizes:
        told = ", ".join(map(str, sizes))
        raise Absent(f"it takes tiles of {told}")


def _flex(case: Case) -> Call:
    """FlexAttention, compiled, with the plan's lists as whole blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = case.tensors
    plan = case.plan
    if plan.tail != "none":
        raise Absent("it has no tail")
    if min(plan.queries, plan.keys) < max(plan.tile.query, plan.tile.key):
        raise Absent("on fewer tokens than a tile it ends the process")

    def inside(b: Any, h: Any, i: Any, j: Any) -> Any:
        del b, h
        return (i < plan.queries) & (j < plan.keys)

    # Its lists are as wide as there are tiles.
    indices = torch.zeros(*plan.indices.shape[:3], plan.columns, dtype=torch.int32, device=q.device)
    indices[..., : plan.indices.shape[-1]] = plan.indices
    ragged = plan.queries % plan.tile.query or plan.keys % plan.tile.key
    lists = (plan.counts, indices)
    none = (torch.zeros_like(plan.counts), torch.zeros_like(indices))
    mask = BlockMask.from_kv_blocks(
        *(lists if ragged else none),
        *(none if ragged else lists),
        BLOCK_SIZE=(plan.tile.query, plan.tile.key),
        mask_mod=inside,
        seq_lengths=(plan.queries, plan.keys),
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def of_each_head(plan: BlockPlan, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and counts for kernels that read a list for each head, also where all share one."""
    indices, counts = (x.expand(*q.shape[:2], *x.shape[2:]) for x in (plan.indices, plan.counts))
    return indices.contiguous(), counts.contiguous()


def _fastvideo(case: Case) -> Call:
    """fastvideo-kernel's block-sparse attention in Triton."""
    if not case.tensors[0].is_cuda:
        raise Absent("it is for CUDA devices")
    _whole_tiles(case, Tile(64, 64))
    plan = case.plan
    if plan.keys % 64 or plan.queries != plan.keys:
        raise Absent("it takes whole tiles of as many queries as keys")
    attend = _module("fastvideo_kernel.block_sparse_attn", "fastvideo-kernel")
    q, k, v = (x.contiguous() for x in case.tensors)
    lengths = tile_lengths(plan.keys, 64, q.device).to(torch.int32)
    lists = (*of_each_head(plan, q), lengths)
    return lambda: attend.block_sparse_attn_triton(q, k, v, *lists)[0]


def _flash4(case: Case) -> Call:
    """FlashAttention 4's block sparsity, in CuTe."""
    if not case.tensors[0].is_cuda:
        raise Absent("it is for CUDA devices")
    _whole_tiles(case, Tile(128, 128))
    plan = case.plan
    if plan.keys % 128 or plan.queries % 128:
        raise Absent("whole tiles only")
    attend = _module("flash_attn.cute.interface", "flash-attn-4")
    sparsity = _module("flash_attn.cute.block_sparsity", "flash-attn-4")
    q, k, v = (x.transpose(1, 2) for x in case.tensors)
    indices, counts = of_each_head(plan, case.tensors[0])
    lists = sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(128, 128),
    )
    return lambda: attend.flash_attn_func(q, k, v, block_sparse_tensors=lists)[0].transpose(1, 2)


PEERS: dict[str, Peer] = {
    "sdpa": Peer(_dense("sdpa"), dense=True),  # what torch chooses by itself
    "sdpa-cudnn": Peer(_dense("cudnn"), dense=True),
    "sdpa-flash": Peer(_dense("flash"), dense=True),
    "sdpa-efficient": Peer(_dense("efficient"), dense=True),
    "xformers": Peer(_dense("xformers"), dense=True),
    "sage": Peer(_dense("sage"), dense=True),
    "flex": Peer(_flex),
    "fastvideo": Peer(_fastvideo),
    "flash4": Peer(_flash4),
}
