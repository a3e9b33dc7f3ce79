"""Attention methods by the name that recipes use; one file each."""

from __future__ import annotations

from ..method import AttentionMethod
from .blade import Blade
from .hierarchical import Hierarchical
from .kv_merge import KvMerge
from .neighborhood import Neighborhood
from .paro import Paro
from .permuted_blocks import PermutedBlocks
from .sliding_tile import SlidingTile
from .threshold_blocks import ThresholdBlocks
from .top_blocks import TopBlocks
from .vmoba import VMoBA
from .x_attention import XAttention

METHODS: dict[str, type[AttentionMethod]] = {
    method.name: method
    for method in (
        TopBlocks,
        ThresholdBlocks,
        XAttention,
        SlidingTile,
        Neighborhood,
        Blade,
        Hierarchical,
        Paro,
        PermutedBlocks,
        VMoBA,
        KvMerge,
    )
}

__all__ = [
    "METHODS",
    "Blade",
    "Hierarchical",
    "KvMerge",
    "Neighborhood",
    "Paro",
    "PermutedBlocks",
    "SlidingTile",
    "ThresholdBlocks",
    "TopBlocks",
    "VMoBA",
    "XAttention",
]
