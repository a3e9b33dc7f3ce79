"""Step policies by the name that recipes use; one file each."""

from __future__ import annotations

from ..steps import StepPolicy
from .easy import Easy
from .pattern import Pattern
from .sada import Sada
from .shadow import Shadow
from .sign import Sign
from .skipping import SkipPolicy

POLICIES: dict[str, type[StepPolicy]] = {
    policy.name: policy for policy in (Pattern, Shadow, Sign, Easy, Sada)
}

__all__ = ["POLICIES", "Easy", "Pattern", "Sada", "Shadow", "Sign", "SkipPolicy"]
