"""From entries of a manifest to rows: one video each, nothing left open, a name of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...accel.table import untitled
from .. import cards
from ..cards import Card
from ..errors import ManifestError, RequestError, explain_invalid, nearest, shortened
from ..files import slug
from ..request import MAX_VIDEOS, Request, Resolved, recipe_table, resolve, size_of
from .manifest import Entry

_ELSEWHERE = {
    "output": "the folder is that of the batch (--output)",
    "device": "workers have devices (--device)",
    "force": "it holds for all rows (--force)",
}
FIELDS = (*(it for it in Request.model_fields if it not in _ELSEWHERE), "size")
"""What a row can set."""
MAX_SEEDS = 100_000
# Where a row runs and where its files lie are no part of what it is; of an image the content is.
_NOT_ITS_OWN = {"output", "device", "force", "num_videos", "settings", "image"}
_ID_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Group:
    """What rows have in common that follow each other at no cost: nothing is loaded or compiled."""

    model: str
    width: int
    height: int
    frames: int
    steps: int
    dtype: str
    recipe: str
    """The table as JSON; `{}` is the stock pipeline."""

    @property
    def work(self) -> int:
        """What a row costs, for shares of the whole: pixels times steps."""
        return self.width * self.height * self.frames * self.steps


@dataclass(frozen=True, slots=True)
class Row:
    """One video. `id` is 16 digits of SHA-256 over its resolved request; `name` ends with it."""

    id: str
    line: int
    name: str
    request: Resolved

    @property
    def group(self) -> Group:
        """Whom it can follow at no cost."""
        it = self.request
        recipe = json.dumps(it.recipe, sort_keys=True)
        return Group(it.model, it.width, it.height, it.frames, it.steps, it.dtype, recipe)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes it again."""
        request = self.request.model_dump()
        return {"id": self.id, "line": self.line, "name": self.name, "request": request}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Row:
        """The row that `to_json` was called on."""
        request = Resolved.model_validate(content["request"])
        return cls(content["id"], content["line"], content["name"], request)


@dataclass
class Reader:
    """Makes rows of entries; `defaults` are fields of a request for what entries leave out.

    Paths of images that entries give are relative to `folder`. A row without a seed is made with
    each of `seeds`. One that names a recipe takes no default settings: those were meant for
    another.
    """

    defaults: Mapping[str, Any]
    seeds: Sequence[int] = ()
    folder: Path = Path()
    _cards: dict[str, Card] = field(default_factory=dict[str, Card])
    _recipes: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])

    def rows(self, entry: Entry) -> Iterator[Row]:
        """One for each seed and video. Raises `KinoraError` saying what no run could do."""
        given = dict(entry.fields)
        for name in given:
            _check_name(name)
        if "size" in given:
            if {"width", "height"} & set(given):
                raise ManifestError("it has a size beside a width or a height: leave one out")
            given |= size_of(str(given.pop("size")), "size")
        if isinstance(given.get("image"), str):
            given["image"] = str(self.folder / os.path.expanduser(given["image"]))
        recipe = given.get("recipe", {})
        if not isinstance(recipe, str | dict):
            told = shortened(json.dumps(recipe, default=str))
            raise ManifestError(f"recipe must be a name or a table, not {told}")
        defaults = dict(self.defaults)
        if "recipe" in given:
            defaults.pop("settings", None)
        try:
            request = Request.model_validate({**defaults, **given})
        except ValidationError as error:
            raise ManifestError(explain_invalid(error)) from None
        if not 1 <= request.num_videos <= MAX_VIDEOS:
            asked = shortened(request.num_videos)
            raise RequestError(f"num_videos must be 1 to {MAX_VIDEOS}, not {asked}")
        recipe = self._table(request)
        request = request.model_copy(update={"recipe": {}, "settings": ()})
        firsts = [request.seed] if "seed" in given or not self.seeds else self.seeds
        card = self._card(request.model)
        for seed in (first + k for first in firsts for k in range(request.num_videos)):
            one = request.model_copy(update={"seed": seed, "num_videos": 1})
            resolved = resolve(one, card).model_copy(update={"recipe": recipe})
            digest = identity(resolved)
            name = f"{slug(resolved.prompt)}-s{seed}-{digest}"
            yield Row(digest, entry.line, name, resolved)

    def _card(self, model: str) -> Card:
        if model not in self._cards:
            self._cards[model] = cards.find(model)
        return self._cards[model]

    def _table(self, request: Request) -> dict[str, Any]:
        """The recipe that is asked for, which is looked up and checked once for all rows."""
        key = json.dumps([request.recipe, request.settings], sort_keys=True, default=str)
        if key not in self._recipes:
            self._recipes[key] = recipe_table(request)
        return self._recipes[key]


def identity(resolved: Resolved) -> str:
    """The id of a row: 16 hexadecimal digits, of everything that makes the request what it is.

    Fields that have their default do not count, so that new ones change no id, nor does what a
    recipe is called.
    """
    unnamed = resolved.model_copy(update={"recipe": untitled(resolved.recipe)})
    content = unnamed.model_dump(exclude=_NOT_ITS_OWN, exclude_defaults=True)
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_ID_DIGITS]


def seeds_of(text: str) -> list[int]:
    """`0-4`, `7` or `0-2,10` as numbers. Raises `RequestError`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})\s*(?:-\s*([0-9]{1,19})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise RequestError(f"--seeds must be such as 0-4 or 0-2,10, not {shortened(text)!r}")
        if len(found) + last - first >= MAX_SEEDS:
            raise RequestError(f"--seeds {shortened(text)} are more than {MAX_SEEDS:,}")
        found += range(first, last + 1)
    return found


def _check_name(name: object) -> None:
    if name in _ELSEWHERE:
        raise ManifestError(f"{name} cannot be set by a row: {_ELSEWHERE[str(name)]}")
    if name not in FIELDS:
        close = nearest(str(name), FIELDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"a row can set {', '.join(FIELDS)}"
        raise ManifestError(f"{shortened(str(name))!r} is no field of a row: {hint}")
