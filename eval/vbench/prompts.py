"""VBench's prompts: which belong to a dimension, and the videos that are to be made of them.

The list is the package's own file `VBench_full_info.json`, read from the environment that runs it
or from a path; none of it is copied here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...pipelines.errors import nearest
from ..clips import EvalError
from .spec import DIMENSIONS, SAMPLES


@dataclass(frozen=True, slots=True)
class Prompts:
    """The list: each prompt with its dimensions, in the file's order, and the file's hash."""

    entries: tuple[tuple[str, frozenset[str]], ...]
    sha256: str

    def of(self, dimensions: Sequence[str]) -> list[str]:
        """The prompts of any of `dimensions`, each once."""
        wanted = set(dimensions)
        return list(dict.fromkeys(prompt for prompt, its in self.entries if wanted & its))


def read(file: Path) -> Prompts:
    """Read the list. Raises `EvalError` where it is none."""
    try:
        text = file.read_bytes()
        content: Any = json.loads(text)
        entries = tuple(
            (str(it["prompt_en"]), frozenset(cast("list[str]", it["dimension"]))) for it in content
        )
    except OSError as error:
        raise EvalError(f"{file} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{file} is no VBench_full_info.json: prompts with their dimensions") from (
            None
        )
    if not entries:
        raise EvalError(f"{file} holds no prompts")
    return Prompts(entries, hashlib.sha256(text).hexdigest())


def dimensions_of(names: Sequence[str]) -> tuple[str, ...]:
    """The dimensions called so, all without any. Raises `EvalError` for a name that is not known.

    The package would load models before it looks.
    """
    for name in names:
        if name not in DIMENSIONS:
            close = nearest(name, DIMENSIONS, 1)
            told = f"did you mean {close[0]}?" if close else f"known are {', '.join(DIMENSIONS)}"
            raise EvalError(f"VBench has no dimension {name!r}: {told}")
    return tuple(it for it in DIMENSIONS if it in names or not names)


def manifest(
    prompts: Prompts, dimensions: Sequence[str], *, samples: int = SAMPLES, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """What to generate, video by video: sample i of a prompt has seed `seed` + i."""
    for prompt in prompts.of(dimensions):
        for index in range(samples):
            yield {"prompt": prompt, "seed": seed + index}
