"""An evaluation in a process of its own: the page goes on, and a file may crash its decoder.

What is asked is a line of JSON on its stdin, whose end ends it; what it tells are lines of JSON:
`{"done": 2, "of": 9, "doing": "color"}`, at last `{"report": …}` or `{"error": "…"}`. It calls what
`kinora eval` calls.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ...pipelines.errors import KinoraError
from .tied import end_with_stdin

SUITES = ("world", "fidelity", "flicker", "vbench")
_ENDING_S = 2.0  # for what it has started to end with it; then videos are left half scored


class ScoringError(KinoraError):
    """The process has ended without a report."""


class Scoring:
    """An evaluation under way, until it is closed."""

    def __init__(
        self, suite: str, videos: Sequence[Path], references: Sequence[Path], folder: Path
    ) -> None:
        """Begin it; paths in its report are those below `folder`."""
        asked = {
            "suite": suite,
            "videos": [str(it) for it in videos],
            "references": [str(it) for it in references],
            "folder": str(folder),
        }
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - until it is closed
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then it tells nothing, which is an error
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()

    def told(self) -> dict[str, Any]:
        """What it tells next. Raises `ScoringError` where it ended before its report."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        if status < 0:
            why = f"was ended by {signal.Signals(-status).name}"
            why += ", as by a system that is out of memory" if status == -signal.SIGKILL else ""
        else:
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip().splitlines()
            why = f"ended with status {status}: {' '.join(words[-1:])[:300]}"
        raise ScoringError(f"the process of the evaluation {why}")

    def end(self) -> None:
        """End it and what it has started, from any thread; `told` raises then."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """End it, and listen no more."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout, self._words):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def main() -> int:
    """The process itself."""
    asked = json.loads(sys.stdin.readline())
    # What libraries print is not for the one who listens.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        end_with_stdin()
        # Nothing is fetched because of a click: what VBench needs is there, or that is the reason.
        os.environ.setdefault("UV_OFFLINE", "1")
        try:
            for told in _telling(asked):
                _tell(out, told, asked["folder"])
        except KinoraError as error:
            _tell(out, {"error": str(error)}, asked["folder"])
        except KeyboardInterrupt:
            return 130
    return 0


def _tell(out: TextIO, told: dict[str, Any], folder: str) -> None:
    """Write a line; whoever reads the page need not know where files are on this machine."""
    line = json.dumps(told).replace(json.dumps(f"{folder}/")[1:-1], "")
    out.write(f"{line}\n")
    out.flush()


def _telling(asked: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    from ...eval.cache import default_path

    videos = [Path(it) for it in asked["videos"]]
    if asked["suite"] == "vbench":
        from ...eval.vbench.suite import Step
        from ...eval.vbench.suite import evaluate as by_vbench

        for event in by_vbench(videos, custom=True, cache=default_path()):
            if isinstance(event, Step):
                yield {"done": event.done, "of": event.of, "doing": event.dimension or ""}
            else:
                yield {"report": event.to_json()}
        return
    from ...eval.clips import References, find
    from ...eval.evaluate import Progress, evaluate

    pairs = asked["suite"] == "fidelity"
    clips, _ = find([Path(it) for it in asked["references"]])
    beside = References(Path("the gallery"), clips) if pairs else None
    for event in evaluate(
        videos, reference=beside, suites=(asked["suite"],), cache=default_path(), workers=0
    ):
        if isinstance(event, Progress):
            yield {"done": event.done, "of": event.of, "doing": event.path.name}
        else:
            yield {"report": event.to_json()}


if __name__ == "__main__":
    sys.exit(main())
