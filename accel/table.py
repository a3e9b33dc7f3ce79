"""A recipe as a table, as files and records hold it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def untitled(table: Mapping[str, Any]) -> dict[str, Any]:
    """All that it says but what it is called."""
    return {key: value for key, value in table.items() if key != "title"}


def effective(table: Mapping[str, Any]) -> dict[str, Any]:
    """All that it accelerates: nothing of the dense recipe, whatever that is called."""
    return {key: value for key, value in untitled(table).items() if key != "when"}
