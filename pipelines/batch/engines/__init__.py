"""What runs the rows of a batch: `local` is a process for each GPU of this machine."""

from __future__ import annotations

from .engine import ENGINES, Engine, Heard, Job, Step, find

__all__ = ["ENGINES", "Engine", "Heard", "Job", "Step", "find"]
