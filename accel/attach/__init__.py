"""Puts recipes on stock diffusers pipelines, and takes them off again."""

from __future__ import annotations

from .session import Session, accelerate

__all__ = ["Session", "accelerate"]
