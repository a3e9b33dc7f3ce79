"""The embedded model `kinora-tiny`: a stock diffusers `WanPipeline` trained by this repository."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Where the shipped model lies."""
