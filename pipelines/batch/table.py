"""All rows of a batch: on disk as JSON Lines, in memory some thirty bytes each."""

from __future__ import annotations

import json
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import KinoraError, ManifestError
from ..request import Request, recipe_table
from . import manifest
from .manifest import Refused
from .rows import Group, Reader, Row

SCHEMA = "kinora.batch/1"


@dataclass(eq=False)
class Table:
    """Rows in the order of the manifest. `file` has a header, then a line for each row.

    Index `i` below is a row's place in that order; `refused` are rows that cannot run.
    """

    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    ids: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    group_of: array[int] = field(default_factory=lambda: array("L"))
    groups: list[Group] = field(default_factory=list[Group])
    refused: list[Refused] = field(default_factory=list[Refused])

    def __post_init__(self) -> None:
        weakref.finalize(self, self.file.close)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> Row:
        """Row `i`, read from disk."""
        self.file.seek(self.offsets[i])
        return Row.from_json(json.loads(self.file.readline()))

    def id(self, i: int) -> str:
        """The id of row `i`."""
        return f"{self.ids[i]:016x}"

    def order(self) -> list[int]:
        """Indices, those of one group after another."""
        return sorted(range(len(self)), key=lambda i: self.group_of[i])

    def write(self, target: IO[bytes], header: Mapping[str, Any]) -> None:
        """Write all of it, as `read_header` and `read_ids` read it."""
        refused = [asdict(it) for it in self.refused]
        head = {"schema": SCHEMA, **header, "rows": len(self), "refused": refused}
        target.write(json.dumps(head).encode() + b"\n")
        self.file.seek(0)
        while block := self.file.read(2**20):
            target.write(block)


def build(path: Path, defaults: Mapping[str, Any], seeds: Sequence[int]) -> Table:
    """Read the manifest `path`.

    Raises `ManifestError` where it is none, or has no rows at all, `RecipeError` where the recipe
    of `defaults` is none; rows that cannot run are in `Table.refused`.
    """
    recipe_table(Request(prompt="any", **defaults))
    table, reader = Table(), Reader(defaults, seeds, path.parent)
    lines: dict[int, int] = {}
    groups: dict[Group, int] = {}
    for found in manifest.entries(path):
        if isinstance(found, Refused):
            table.refused.append(found)
            continue
        try:
            rows = list(reader.rows(found))
        except KinoraError as error:
            table.refused.append(Refused(found.line, str(error)))
            continue
        for row in rows:
            number = int(row.id, 16)
            if number in lines:
                first = lines[number]
                told = f"it asks for the same as line {first}" if first != row.line else (
                    f"it asks for seed {row.request.seed} twice"
                )  # fmt: skip
                table.refused.append(Refused(row.line, f"{told}: leave it out"))
                continue
            lines[number] = row.line
            table.ids.append(number)
            table.offsets.append(table.file.tell())
            table.group_of.append(groups.setdefault(row.group, len(groups)))
            table.file.write(json.dumps(row.to_json()).encode() + b"\n")
    table.groups = list(groups)
    if not table and not table.refused:
        raise ManifestError(f"{path} has no rows: write at least one")
    return table


def read_header(file: IO[bytes]) -> dict[str, Any] | None:
    """What `Table.write` was given for a header, with `rows` and `refused`; None if it is none."""
    try:
        head = json.loads(file.readline())
    except ValueError:
        return None
    return head if isinstance(head, dict) and head.get("schema") == SCHEMA else None


def read_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The rows after the header, as plain values."""
    for line in file:
        yield json.loads(line)
