"""Attention methods by the name that recipes use; one file each."""

from __future__ import annotations

from ..method import AttentionMethod
from .paro import Paro
from .top_blocks import TopBlocks

METHODS: dict[str, type[AttentionMethod]] = {method.name: method for method in (Paro, TopBlocks)}

__all__ = ["METHODS", "Paro", "TopBlocks"]
