"""Starts the runner of a metric, once in a process, and asks it."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

from ..clips import EvalError
from ..result import Result, failed, skipped
from ..weights import missing_in, need_of
from .spec import LIBRARIES, Tools, weights_folder

RUNNER = Path(__file__).with_name("runner.py")
LOCK = RUNNER.with_name(f"{RUNNER.name}.lock")
PYTHON_VARIABLE = "KINORA_METRICS_PYTHON"
TIMEOUT_S = 3600.0
"""For one clip, or for making the environment."""


def command(metric: str, tools: Tools) -> tuple[str, ...] | None:
    """What starts the runner: the interpreter that the user names, else uv, else None.

    Raises `EvalError` for an interpreter that is not there.
    """
    rest = ("--metric", metric, "--weights", str(weights_folder()), "--device", tools.device)
    named = tools.python or os.environ.get(PYTHON_VARIABLE)
    if named:
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            needs = LIBRARIES[metric].package
            raise EvalError(f"{named} is no interpreter: give the path of a Python with {needs}")
        return (found, str(RUNNER), *rest)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        return None
    return (uv, "run", "--no-project", "--script", "--locked", str(RUNNER), *rest)


def identity(metric: str, tools: Tools) -> str:
    """Changes with what would be run."""
    given = command(metric, tools)
    if given is not None and given[1] == str(RUNNER):
        return f"python {given[0]}"
    return f"lock {hashlib.sha256(LOCK.read_bytes()).hexdigest()}"


def without(metric: str, tools: Tools) -> Result | None:
    """Why a metric cannot be taken at all: no weights, or no environment."""
    missing = missing_in(weights_folder(), LIBRARIES[metric].files)
    if missing:
        details = {"missing_weights": missing}
        return Result("skipped", reason=need_of(metric, missing), details=details)
    if command(metric, tools) is None:
        return skipped(
            f"there is no environment for {metric}: install uv (pip install uv), or name an "
            f"interpreter that has {LIBRARIES[metric].package} with --metrics-python or "
            f"{PYTHON_VARIABLE}"
        )
    return None


class Runner:
    """The runner of one metric. `unfit` says why it does not answer; None where it does."""

    def __init__(self, metric: str, given: tuple[str, ...]) -> None:
        """Start it, and wait until it is ready."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip
        self._rest = b""
        atexit.register(self.close)
        self.unfit: Result | None = None
        told = self._answer()
        if "environment" in told:
            self.unfit = skipped(f"{metric}: {told['environment']}")
        elif "ready" not in told:
            self.unfit = failed(f"{metric} does not start: {told.get('error', 'it wrote nothing')}")

    def ask(self, **request: str) -> dict[str, Any]:
        """Its answer; with `error` where it has none."""
        try:
            file = cast("IO[bytes]", self._child.stdin)
            file.write(json.dumps(request).encode() + b"\n")
            file.flush()
        except OSError:
            return {"error": self._ended()}
        return self._answer()

    @property
    def running(self) -> bool:
        """Whether it can be asked again."""
        return self._child.poll() is None

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._child.kill()
        self._child.wait()
        for file in (self._child.stdin, self._child.stdout, self._log):
            with suppress(OSError):
                cast("IO[bytes]", file).close()
        atexit.unregister(self.close)

    def _answer(self) -> dict[str, Any]:
        file = cast("IO[bytes]", self._child.stdout)
        while b"\n" not in self._rest:
            if not select.select([file], [], [], TIMEOUT_S)[0]:
                self._child.kill()
                return {"error": f"it took more than {TIMEOUT_S / 60:g} minutes"}
            block = os.read(file.fileno(), 2**16)
            if not block:
                return {"error": self._ended()}
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\n")
        return cast("dict[str, Any]", json.loads(line))

    def _ended(self) -> str:
        status = self._child.wait()
        self._log.seek(0)
        lines = [it for it in self._log.read().decode(errors="replace").splitlines() if it.strip()]
        return f"it ended with status {status}: {lines[-1].strip()[:200] if lines else 'no word'}"


_runners: dict[tuple[str, ...], Runner] = {}


def runner(metric: str, tools: Tools) -> Runner | Result:
    """The runner of this process, started if it does not run; else why it cannot be asked."""
    given = command(metric, tools)
    if given is None:
        return cast("Result", without(metric, tools))
    there = _runners.get(given)
    if there is None or (there.unfit is None and not there.running):
        if there is not None:
            there.close()
        there = _runners[given] = Runner(metric, given)
    return there.unfit or there


@cache
def scratch() -> Path:
    """A folder of this process for what is passed to the runner; gone with it."""
    folder = tempfile.mkdtemp(prefix="kinora-metrics-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
