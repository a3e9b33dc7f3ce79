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
from ..result import Result, failed, ok, skipped
from ..weights import Missing, missing_in, need_of
from .spec import Dimension
from .stage import Staged
from .suites import Suite

RUNNER = Path(__file__).with_name("runner.py")
LOCK = RUNNER.with_name(f"{RUNNER.name}.lock")
PYTHON_VARIABLE = "KINORA_VBENCH_PYTHON"
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
                start_new_session=True, env=_alone(),
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


def _alone() -> dict[str, str]:
    """Our environment without what would make the package one of several processes.

    Those average by video, one alone by frame: other numbers under one name.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: it for name, it in os.environ.items() if name not in names}


def environment(python: str | None, suite: Suite) -> Environment:
    """The interpreter that the user names, by argument or variable, else uv.

    Raises `EvalError` for an interpreter that is not there, and where there is neither.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            package = suite.package
            raise EvalError(f"{named} is no interpreter: give the path of a Python with {package}")
        return Environment((found, str(RUNNER)), f"python {Path(found).absolute()}")
    wanted = f"name an interpreter that has it with --vbench-python or {PYTHON_VARIABLE}"
    if suite.supplied:
        raise EvalError(
            f"there is no environment for {suite.title}, and none can be made here (it pins CUDA "
            f"11.8 and torch 2.5): {wanted}"
        )
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise EvalError(
            f"there is no environment for {suite.title}: install uv (pip install uv), or {wanted}"
        )
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    command = (uv, "run", "--no-project", "--script", "--locked", str(RUNNER))
    return Environment(command, f"lock {lock}")


def about(where: Environment, suite: Suite, folder: Path, timeout_s: float) -> Path:
    """The path of the prompts there. Raises `EvalError` if it does not run, or has none."""
    told = folder / "about.json"
    given = ["about", "--suite", suite.name, "--out", str(told)]
    status = where.run(given, folder / "about.log", timeout_s)
    content = _read(told) or {}
    if status != 0 or "info" not in content:
        why = "it took too long" if status is None else _last_line(folder / "about.log")
        title = suite.title
        raise EvalError(f"{title}'s environment does not start: {content.get('error', why)}")
    if content["info"] is None:
        raise EvalError(
            f"{suite.title}'s package has no list of prompts: give --info {suite.listed} "
            f"(curl -fLO {suite.list_url})"
        )
    return Path(content["info"])


def cache_folder(suite: Suite) -> Path:
    """Where the package looks for weights."""
    variable, default = suite.caches
    return Path(os.environ.get(variable) or default).expanduser().absolute()


def missing_weights(dimension: Dimension, suite: Suite) -> list[Missing]:
    """Files that are not there, each with address, size, licence and the command that gets it."""
    return missing_in(cache_folder(suite), dimension.files)


def without_weights(dimension: Dimension, suite: Suite) -> Result | None:
    """Why a dimension cannot be scored, if weights are missing."""
    missing = missing_weights(dimension, suite)
    if not missing:
        return None
    why = need_of(dimension.name, missing)
    return Result("skipped", reason=why, details={"missing_weights": missing})


def score(
    where: Environment,
    dimension: Dimension,
    staged: Staged,
    folder: Path,
    *,
    suite: Suite,
    info: Path | None,
    images: Path | None = None,
    timeout_s: float,
    device: str = "auto",
) -> Result:
    """Run one dimension over staged videos; with `info` in the standard way, else over any videos.

    What goes wrong is a result, with the last line that the package wrote and the log's path.
    """
    out, log = folder / "out", folder / "log.txt"
    given = ["score", "--suite", suite.name, "--dimension", dimension.name]
    given += ["--videos", str(staged.folder), "--out", str(out), "--device", device]
    given += ["--caches", str(cache_folder(suite))]
    given += ["--mode", "custom_input" if info is None else "vbench_standard"]
    if info is None:
        prompts = {name: clip.prompt for name, clip in staged.links.items()}
        if all(prompts.values()):
            file = folder / "prompts.json"
            file.write_text(json.dumps(prompts))
            given += ["--prompts", str(file)]
    else:
        given += ["--info", str(info)]
    if images is not None:
        given += ["--images", str(images)]
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


def still(
    where: Environment, staged: Staged, folder: Path, *, suite: Suite, timeout_s: float, device: str
) -> Result:
    """Which of the staged videos the package's filter keeps: `details["still"]`, by name."""
    out, log = folder / "still", folder / "still.txt"
    given = ["still", "--suite", suite.name, "--videos", str(staged.folder), "--out", str(out)]
    given += ["--caches", str(cache_folder(suite)), "--device", device]
    status = where.run(given, log, timeout_s)
    told = _read(out / "runner.json") or {}
    if status is None:
        return failed(f"the filter took more than {timeout_s / 60:g} minutes (log: {log})")
    if status == 2 and told.get("status") == "environment":
        return skipped(f"the filter for still videos: {told['error']}")
    flags = told.get("still")
    if status != 0 or not isinstance(flags, dict) or set(flags) != set(staged.links):
        why = told.get("error") or f"exit status {status}: {_last_line(log)}"
        return failed(f"the filter for still videos: {why} (log: {log})")
    kept = cast("dict[str, bool]", flags)
    return ok(sum(kept.values()) / len(kept), still=kept)


def judged(dimension: Dimension, staged: Staged, out: Path, told: dict[str, Any]) -> Result:
    """What the files in `out` say, if they hold together.

    Partial where videos of a complete set were not there or not read; failed for NaN, for no videos
    and for videos that were not given.
    """
    name = dimension.name
    try:
        text = (out / f"{name}_eval_results.json").read_text()
        content: Any = json.loads(text)
        # Of camera_motion the means by kind stand between; those of kinds without videos are NaN.
        score, rows = float(content[name][0]), cast("list[dict[str, Any]]", content[name][-1])
        _check_finite([score, rows])
        videos = {Path(str(row["video_path"])).name: row["video_results"] for row in rows}
    except OSError:
        return failed(f"{name}: VBench left no results")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return failed(f"{name}: VBench's results are none: {' '.join(str(error).split())[:200]}")
    strangers = sorted(set(videos) - set(staged.links))
    if strangers:
        return failed(f"{name}: VBench scored {strangers[0]!r:.80}, which it was not given")
    if not videos:
        return failed(f"{name}: VBench scored no video")
    scored = len(videos)
    if dimension.by_prompt:  # rows are named by the first of a prompt's videos
        heads = {it.rpartition("-")[0] for it in videos}
        scored = sum(it.rpartition("-")[0] in heads for it in staged.links)
    details = {
        "videos": scored,
        "expected": staged.expected,
        "by_video": dict(sorted(videos.items())),
        **{key: told[key] for key in told if key != "status"},
    }
    notes = [dimension.note] if dimension.note else []
    if told.get("torchvision_shimmed"):
        notes.append("VBench ran beside a torchvision whose compiled operators are missing")
    unread = len(staged.links) - scored
    if unread and name in DROPS:
        notes.append(f"{name} leaves out {unread} videos in which it saw no coloured object")
        unread = 0
    if staged.missing or unread:
        gone = f", the first that is missing: {staged.missing[0]!r:.80}" if staged.missing else ""
        why = f"{len(staged.links) - unread} of {staged.expected} videos{gone}"
        return Result("partial", score, why, tuple(notes), details=details)
    return Result("ok", score, notes=tuple(notes), details=details)


def _check_finite(value: Any) -> None:
    """Raises `ValueError` for a value, or one in it, that is no number."""
    if isinstance(value, dict):
        value = list(cast("dict[str, Any]", value).values())
    if isinstance(value, list):
        for it in cast("list[Any]", value):
            _check_finite(it)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a score is {json.dumps(value)}")


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
