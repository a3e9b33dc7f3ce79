"""Attention methods by the name that recipes use; one file each."""

from __future__ import annotations

from ..method import AttentionMethod
from .blade import Blade
from .sliding_tile import SlidingTile
from .top_blocks import TopBlocks

METHODS: dict[str, type[AttentionMethod]] = {
    method.name: method for method in (TopBlocks, SlidingTile, Blade)
}

__all__ = ["METHODS", "Blade", "SlidingTile", "TopBlocks"]
