"""The recipes that come with Kinora, by name. Needs no torch."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "recipes"
DENSE = "dense"
"""The one that accelerates nothing."""


def names() -> list[str]:
    """All of them."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))
