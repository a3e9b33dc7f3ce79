"""What runs the rows of a batch, here or on several machines."""

from __future__ import annotations

from .engine import ENGINES, Engine, Heard, Job, Step, find

__all__ = ["ENGINES", "Engine", "Heard", "Job", "Step", "find"]
