"""VBench's prompts: which belong to a dimension, and the videos that are to be made of them.

The list is the package's own file `VBench_full_info.json`, read from the environment that runs it
or from a path; none of it is copied here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ...pipelines.errors import nearest
from ..clips import EvalError
from .suites import VBENCH, Suite


@dataclass(frozen=True, slots=True)
class Prompts:
    """The list: each prompt with its dimensions, in the file's order, and the file's hash.

    `images` are the names of those that videos of a prompt are made from.
    """

    entries: tuple[tuple[str, frozenset[str]], ...]
    sha256: str
    images: Mapping[str, str] = field(default_factory=dict[str, str])

    def of(self, dimensions: Sequence[str]) -> list[str]:
        """The prompts of any of `dimensions`, each once."""
        wanted = set(dimensions)
        return list(dict.fromkeys(prompt for prompt, its in self.entries if wanted & its))


def read(file: Path, suite: Suite = VBENCH) -> Prompts:
    """Read the list of `suite`. Raises `EvalError` where it is none, or of another one."""
    try:
        text = file.read_bytes()
        content: Any = json.loads(text)
        entries = tuple(
            (str(it["prompt_en"]), frozenset(cast("list[str]", it["dimension"]))) for it in content
        )
        images = {str(it["prompt_en"]): str(it["image_name"]) for it in content
                  if "image_name" in it}  # fmt: skip
    except OSError as error:
        raise EvalError(f"{file} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{file} is no {suite.listed}: prompts with their dimensions") from None
    if not entries:
        raise EvalError(f"{file} holds no prompts")
    if not all(its & set(suite.dimensions) for _, its in entries):
        told = f"holds other prompts than those of {suite.title}: give its {suite.listed}"
        raise EvalError(f"{file} {told}")
    return Prompts(entries, hashlib.sha256(text).hexdigest(), images)


def only(file: Path, prompts: Sequence[str], out: Path) -> Path:
    """Write the entries of `prompts` to `out`, as the package's list has them."""
    wanted = set(prompts)
    content: list[dict[str, Any]] = json.loads(file.read_bytes())
    out.write_text(json.dumps([it for it in content if it["prompt_en"] in wanted]), "utf-8")
    return out


def dimensions_of(names: Sequence[str], suite: Suite = VBENCH) -> tuple[str, ...]:
    """The dimensions of `suite` called so, all without any.

    The package would load models before it looks. Raises `EvalError` for a name that is not known.
    """
    known = suite.dimensions
    for name in names:
        if name not in known:
            close = nearest(name, known, 1)
            told = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise EvalError(f"{suite.title} has no dimension {name!r}: {told}")
    return tuple(it for it in known if it in names or not names)


def manifest(
    prompts: Prompts,
    dimensions: Sequence[str],
    *,
    suite: Suite = VBENCH,
    samples: int | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """What to generate, video by video: sample i of a prompt has seed `seed` + i.

    `samples` are the suite's if not given; a prompt of several dimensions gets the most of theirs.
    Rows name the image to begin with where the suite has one.
    """
    its_dimensions: dict[str, set[str]] = {}
    for prompt, its in prompts.entries:
        its_dimensions.setdefault(prompt, set()).update(its)
    for prompt in prompts.of(dimensions):
        image = {"image": prompts.images[prompt]} if prompt in prompts.images else {}
        asked = its_dimensions[prompt].intersection(dimensions)
        count = max(suite.samples_in(it) for it in asked)
        for index in range(count if samples is None else samples):
            yield {"prompt": prompt, "seed": seed + index, **image}
