"""Attention methods by the name that recipes use; one file each."""

from __future__ import annotations

from ..method import AttentionMethod
from .paro import Paro
from .threshold_blocks import ThresholdBlocks
from .top_blocks import TopBlocks
from .x_attention import XAttention

METHODS: dict[str, type[AttentionMethod]] = {
    method.name: method for method in (TopBlocks, ThresholdBlocks, XAttention, Paro)
}

__all__ = ["METHODS", "Paro", "ThresholdBlocks", "TopBlocks", "XAttention"]
