"""Starts the runner, one dimension a child process, and reads what it left with suspicion."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..clips import EvalError
from ..result import Result, failed, skipped
from .spec import Dimension, WeightFile
from .stage import Staged

RUNNER = Path(__file__).with_name("runner.py")
LOCK = RUNNER.with_name(f"{RUNNER.name}.lock")
PYTHON_VARIABLE = "KINORA_VBENCH_PYTHON"
NO_ENVIRONMENT = (
    "there is no environment for VBench: install uv (pip install uv), or name an interpreter that "
    f"has vbench 0.1.5 with --vbench-python or {PYTHON_VARIABLE}"
)
DROPS = ("color",)
"""Dimensions that leave videos out by their definition: of those in which nothing has a colour."""


@dataclass(frozen=True, slots=True)
class Environment:
    """How the runner is started; `identity` changes with what it would run."""

    command: tuple[str, ...]
    identity: str

    def run(self, arguments: list[str], log: Path, timeout_s: float) -> int | None:
        """Exit status of the runner, None if it took too long. Output goes to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            child = subprocess.Popen(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                return child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # It starts processes itself: they go together, also when we are interrupted.
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def environment(python: str | None) -> Environment | None:
    """The interpreter that the user names, by argument or variable, else uv, else None.

    Raises `EvalError` for an interpreter that is not there.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            raise EvalError(f"{named} is no interpreter: give the path of a Python that has vbench")
        return Environment((found, str(RUNNER)), f"python {Path(found).absolute()}")
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        return None
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    command = (uv, "run", "--no-project", "--script", "--locked", str(RUNNER))
    return Environment(command, f"lock {lock}")


def about(where: Environment, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Versions there, and the path of the prompts. Raises `EvalError` if it does not run."""
    told = folder / "about.json"
    status = where.run(["about", "--out", str(told)], folder / "about.log", timeout_s)
    content = _read(told)
    if status == 0 and content is not None:
        return content
    why = "it took too long" if status is None else _last_line(folder / "about.log")
    raise EvalError(f"VBench's environment does not start: {(content or {}).get('error', why)}")


def cache_folder() -> Path:
    """Where the package looks for weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or "~/.cache/vbench").expanduser()


def missing_weights(dimension: Dimension) -> list[dict[str, str | None]]:
    """Files that are not there, each with address, size, licence and the command that gets it."""
    base = cache_folder()
    return [_missing(it, base) for it in dimension.files if not (base / it.path).exists()]


def _missing(file: WeightFile, base: Path) -> dict[str, str | None]:
    path = base / file.path
    command = f"curl -fL --create-dirs -o {path} {file.url}"
    if file.path.endswith(".py"):
        command = f"git clone {file.url} {path.parent}"
    elif file.url.endswith(".zip"):
        folder = path.parent.parent
        archive = folder / "models.zip"
        command = f"curl -fL --create-dirs -o {archive} {file.url} && unzip -d {folder} {archive}"
    return {
        "file": str(path),
        "address": file.url,
        "size": file.size,
        "licence": file.licence,
        "command": command,
    }


def without_weights(dimension: Dimension) -> Result | None:
    """Why a dimension cannot be scored, if weights are missing."""
    missing = missing_weights(dimension)
    if not missing:
        return None
    lines = [
        f"{it['file']} ({it['size'] or 'size not known'}, licence {it['licence'] or 'not known'}; "
        f"{it['command']})"
        for it in missing
    ]
    why = f"{dimension.name} needs {', and '.join(lines)}"
    return Result("skipped", reason=why, details={"missing_weights": missing})


def score(
    where: Environment,
    dimension: Dimension,
    staged: Staged,
    folder: Path,
    *,
    info: Path | None,
    timeout_s: float,
    device: str = "auto",
) -> Result:
    """Run one dimension over staged videos; with `info` in the standard way, else over any videos.

    What goes wrong is a result, with the last line that the package wrote and the log's path.
    """
    out, log = folder / "out", folder / "log.txt"
    given = ["score", "--dimension", dimension.name, "--videos", str(staged.folder)]
    given += ["--out", str(out), "--device", device]
    given += ["--mode", "custom_input" if info is None else "vbench_standard"]
    if info is None:
        prompts = {name: clip.prompt for name, clip in staged.links.items()}
        if all(prompts.values()):
            file = folder / "prompts.json"
            file.write_text(json.dumps(prompts))
            given += ["--prompts", str(file)]
    else:
        given += ["--info", str(info)]
    if dimension.packages:
        given += ["--packages", *dimension.packages]
    status = where.run(given, log, timeout_s)
    if status is None:
        return failed(f"{dimension.name} took more than {timeout_s / 60:g} minutes (log: {log})")
    told = _read(out / "runner.json") or {}
    if status == 2 and told.get("status") == "environment":
        return skipped(f"{dimension.name}: {told['error']}")
    if status != 0:
        why = told.get("error") or f"exit status {status}: {_last_line(log)}"
        return failed(f"{dimension.name}: {why} (log: {log})")
    return judged(dimension, staged, out, told)


def judged(dimension: Dimension, staged: Staged, out: Path, told: dict[str, Any]) -> Result:
    """What the files in `out` say, if they hold together.

    Partial where videos of a complete set were not there or not read; failed for NaN, for no videos
    and for videos that were not given.
    """
    name = dimension.name
    try:
        text = (out / f"{name}_eval_results.json").read_text()
        content: Any = json.loads(text, parse_constant=_not_finite)
        score, rows = float(content[name][0]), cast("list[dict[str, Any]]", content[name][1])
        videos = {Path(str(row["video_path"])).name: row["video_results"] for row in rows}
    except OSError:
        return failed(f"{name}: VBench left no results")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return failed(f"{name}: VBench's results are none: {' '.join(str(error).split())[:200]}")
    if not math.isfinite(score):
        return failed(f"{name}: VBench's score is {score}")
    strangers = sorted(set(videos) - set(staged.links))
    if strangers:
        return failed(f"{name}: VBench scored {strangers[0]!r:.80}, which it was not given")
    if not videos:
        return failed(f"{name}: VBench scored no video")
    details = {
        "videos": len(videos),
        "expected": staged.expected,
        "by_video": dict(sorted(videos.items())),
        **{key: told[key] for key in told if key != "status"},
    }
    notes = [dimension.note] if dimension.note else []
    if told.get("torchvision_shimmed"):
        notes.append("VBench ran beside a torchvision whose compiled operators are missing")
    unread = len(staged.links) - len(videos)
    if unread and name in DROPS:
        notes.append(f"{name} leaves out {unread} videos in which it saw no coloured object")
        unread = 0
    if staged.missing or unread:
        gone = f", the first that is missing: {staged.missing[0]!r:.80}" if staged.missing else ""
        why = f"{len(staged.links) - unread} of {staged.expected} videos{gone}"
        return Result("partial", score, why, tuple(notes), details=details)
    return Result("ok", score, notes=tuple(notes), details=details)


def _not_finite(constant: str) -> float:
    raise ValueError(f"a score is {constant}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None


def _last_line(log: Path) -> str:
    try:
        lines = [it for it in log.read_text(errors="replace").splitlines() if it.strip()]
    except OSError:
        return "it wrote nothing"
    return lines[-1].strip()[:200] if lines else "it wrote nothing"
