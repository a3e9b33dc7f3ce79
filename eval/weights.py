"""Files of weights that nobody fetches for the user: where they belong, and what brings them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Missing: TypeAlias = dict[str, str | None]
"""File, address, size, licence and command of one that is not there."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file, its path in the folder of weights; `size` and `licence` are None if not known."""

    path: str
    url: str
    size: str | None
    licence: str | None


def missing_in(base: Path, files: Sequence[WeightFile]) -> list[Missing]:
    """Those of `files` that are not in `base`."""
    return [_missing(it, base) for it in files if not (base / it.path).exists()]


def need_of(name: str, missing: Sequence[Missing]) -> str:
    """What `name` needs, in a line."""
    lines = [
        f"{it['file']} ({it['size'] or 'size not known'}, licence {it['licence'] or 'not known'}; "
        f"{it['command']})"
        for it in missing
    ]
    return f"{name} needs {', and '.join(lines)}"


def _missing(file: WeightFile, base: Path) -> Missing:
    path = base / file.path
    return {
        "file": str(path),
        "address": file.url,
        "size": file.size,
        "licence": file.licence,
        "command": _command(file.url, path),
    }


def _command(url: str, path: Path) -> str:
    """What brings `path`, or the folder that it is in, from there."""
    if path.suffix == ".py":
        return f"git clone {url} {path.parent}"
    if "drive.google.com/drive" in url:
        return f"gdown --folder {url} -O {path.parent}"
    if "drive.google.com" in url:
        return f"gdown --fuzzy '{url}' -O {path}"
    if path.name == "config.json":
        name = url.removeprefix("https://huggingface.co/")
        return f"hf download {name} --local-dir {path.parent}"
    if url.endswith(".zip") and path.suffix != ".zip":  # one is loaded as it is
        folder = path.parent.parent
        archive = folder / "models.zip"
        return f"curl -fL --create-dirs -o {archive} {url} && unzip -d {folder} {archive}"
    return f"curl -fL --create-dirs -o {path} {url}"
