"""Reads manifests: JSON Lines, CSV, Parquet, or a plain list of prompts; rows are not checked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import ManifestError

LONGEST_LINE_BYTES = 2**20
INSTALL_PARQUET = 'pip install --editable ".[parquet]"'


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as it stands in a manifest: where, and what it sets.

    `line` is that of the file, from 1; of Parquet it is the number of the row.
    """

    line: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot run, and why; or several, of which `line` is the first."""

    line: int
    why: str
    rows: int = 1


def entries(path: Path) -> Iterator[Entry | Refused]:
    """The rows of `path`, by its ending; what a row leaves out or sets to null is not in `fields`.

    Raises `ManifestError` for a file that is no manifest.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        hint = " (one JSON object a line is .jsonl)" if path.suffix.lower() == ".json" else ""
        raise ManifestError(
            f"{path} is no manifest by its ending{hint}: use {', '.join(_READERS)}, where .txt has "
            f"a prompt a line"
        )
    with _opening(path):
        for found in reader(path):
            if isinstance(found, Entry):
                given = {name: it for name, it in found.fields.items() if it is not None}
                found = Entry(found.line, given)
            yield found


@contextmanager
def _opening(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except IsADirectoryError:
        raise ManifestError(f"{path} is a folder: give a manifest") from None
    except FileNotFoundError:
        raise ManifestError(f"there is no manifest {path}") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror or error})") from None


def _prompts(path: Path) -> Iterator[Entry | Refused]:
    for line, text in _lines(path):
        yield text if isinstance(text, Refused) else Entry(line, {"prompt": text})


def _json_lines(path: Path) -> Iterator[Entry | Refused]:
    for line, text in _lines(path):
        if isinstance(text, Refused):
            yield text
            continue
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield Refused(line, f"it is no JSON ({_wrong(error)})")
            continue
        if isinstance(content, dict):
            yield Entry(line, cast("dict[str, Any]", content))
        else:
            yield Refused(line, f"it is no JSON object but {text[:60]}")


def _wrong(error: Exception) -> str:
    """What is no JSON, and where; its line is that of the manifest."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: character {error.pos + 1}"
    return str(error)


def _lines(path: Path) -> Iterator[tuple[int, str | Refused]]:
    """Lines that are not blank, with their numbers."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE_BYTES):
            number += 1
            if len(raw) == LONGEST_LINE_BYTES and not raw.endswith(b"\n"):
                yield number, Refused(number, f"it is longer than {LONGEST_LINE_BYTES:,} bytes")
                while (more := file.readline(LONGEST_LINE_BYTES)) and not more.endswith(b"\n"):
                    pass
                continue
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, Refused(number, f"it is no UTF-8 text ({error.reason})")
                continue
            if text:
                yield number, text


def _csv(path: Path) -> Iterator[Entry | Refused]:
    """Cells are text; `settings` are parted by semicolons, a `recipe` may be a JSON object."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            names = [name.strip() for name in next(reader, [])]
            if wrong := _wrong_names(names):
                raise ManifestError(f"{path} {wrong}: its first line must name the columns")
            line = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield _cells(line, names, cells)
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            # Where the next row begins is not known.
            raise ManifestError(f"{path}, line {line}: the rest is no CSV ({error})") from None


def _wrong_names(columns: list[str]) -> str | None:
    """What is wrong with the names of columns, if anything is."""
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        return f"names {twice[0]!r} twice"
    return None if "prompt" in columns else "has no column prompt"


def _cells(line: int, names: list[str], cells: list[str]) -> Entry | Refused:
    if len(cells) != len(names):
        return Refused(line, f"it has {len(cells)} cells, the first line names {len(names)}")
    fields: dict[str, Any] = {
        name: cell for name, cell in zip(names, cells, strict=True) if cell.strip()
    }
    if "settings" in fields:
        fields["settings"] = [it.strip() for it in fields["settings"].split(";") if it.strip()]
    if fields.get("recipe", "").lstrip().startswith("{"):
        try:
            fields["recipe"] = json.loads(fields["recipe"])
        except (ValueError, RecursionError) as error:
            return Refused(line, f"recipe is no JSON ({_wrong(error)})")
    return Entry(line, fields)


def _parquet(path: Path) -> Iterator[Entry | Refused]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ManifestError(
            f"reading {path} needs pyarrow, which is not installed: `{INSTALL_PARQUET}` in the "
            f"clone brings it"
        ) from None
    with path.open("rb") as file:
        try:
            line, content = 0, parquet.ParquetFile(file)
            names = list(content.schema_arrow.names)
            if wrong := _wrong_names(names):
                raise ManifestError(f"{path} {wrong}: its columns are the fields of its rows")
            for batch in content.iter_batches(batch_size=1024):
                for cells in zip(*batch.columns, strict=True):
                    line += 1
                    yield _values(line, names, cells)
        except ArrowException as error:
            told = " ".join(str(error).split())
            raise ManifestError(f"{path} cannot be read as Parquet: {told}") from None


def _values(line: int, names: list[str], cells: Iterable[Any]) -> Entry | Refused:
    fields: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            fields[name] = cell.as_py()
        except (ValueError, OverflowError) as error:  # text of other bytes, years far away
            return Refused(line, f"{name} cannot be read ({error})")
    if isinstance(fields.get("recipe"), dict):
        fields["recipe"] = _without_nulls(fields["recipe"])
    return Entry(line, fields)


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that are there only as tables of other rows in the column have them."""
    return {
        key: _without_nulls(cast("dict[str, Any]", it)) if isinstance(it, dict) else it
        for key, it in table.items()
        if it is not None
    }


_READERS: dict[str, Callable[[Path], Iterator[Entry | Refused]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _prompts,
}
