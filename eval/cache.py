"""Scores that are known already: lines of JSON, each under a hash of all that a score depends on.

A line is appended in one write, so that several evaluations may share a file; a line that is cut
short or no longer understood is as if it were not there. What failed is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from .clips import EvalError
from .result import Result


def default_path() -> Path:
    """`scores.jsonl` among the user's caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kinora" / "scores.jsonl"


class Cache:
    """Results by what they depend on. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        """Read what `path` holds. Raises `EvalError` if it can be neither read nor made."""
        self._path = path
        self._known: dict[str, Result] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                lines = file.read().split(b"\n")
                if lines[-1]:  # a write that was cut short: what follows is not to be part of it
                    file.write(b"\n")
        except OSError as error:
            why = error.strerror or error
            raise EvalError(f"{path} cannot keep scores ({why}): name another --cache") from None
        for line in lines:
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = Result.from_json(entry["result"])
            except (ValueError, TypeError, KeyError):
                continue

    def get(self, parts: Sequence[str]) -> Result | None:
        """The result for these, if it is known."""
        return self._known.get(_key(parts))

    def put(self, parts: Sequence[str], result: Result) -> None:
        """Keep a result. What failed may work next time."""
        if result.status == "failed" or self._path is None:
            return
        key = _key(parts)
        self._known[key] = result
        line = json.dumps({"key": key, "result": result.to_json()}) + "\n"
        try:
            with self._path.open("ab") as file:
                file.write(line.encode())
        except OSError as error:
            why = error.strerror or error
            raise EvalError(f"{self._path} cannot keep scores ({why})") from None


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
