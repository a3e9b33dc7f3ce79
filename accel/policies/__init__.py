"""Step policies by the name that recipes use; one file each."""

from __future__ import annotations

from ..steps import StepPolicy
from .cache import CachePolicy
from .dbcache import DBCache
from .easy import Easy
from .faster_cache import FasterCache
from .first_block_cache import FirstBlockCache
from .mag_cache import MagCache
from .pattern import Pattern
from .pyramid_attention_broadcast import PyramidAttentionBroadcast
from .sada import Sada
from .sea_cache import SeaCache
from .shadow import Shadow
from .sign import Sign
from .skipping import SkipPolicy
from .taylor_seer import TaylorSeer

_SKIPPING: tuple[type[StepPolicy], ...] = (Pattern, Shadow, Sign, Easy, Sada)
_CACHES: tuple[type[CachePolicy], ...] = (
    FirstBlockCache,
    TaylorSeer,
    MagCache,
    SeaCache,
    PyramidAttentionBroadcast,
    FasterCache,
    DBCache,
)
POLICIES: dict[str, type[StepPolicy]] = {it.name: it for it in (*_SKIPPING, *_CACHES)}

__all__ = [
    "POLICIES",
    "CachePolicy",
    "DBCache",
    "Easy",
    "FasterCache",
    "FirstBlockCache",
    "MagCache",
    "Pattern",
    "PyramidAttentionBroadcast",
    "Sada",
    "SeaCache",
    "Shadow",
    "Sign",
    "SkipPolicy",
    "TaylorSeer",
]
