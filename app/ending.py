"""How a command ends: exit status, one line for whatever went wrong, the last line of `--json`."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer

from ..pipelines.errors import KinoraError

if TYPE_CHECKING:
    from rich.console import Console

    from ..pipelines.run import Output
    from ..pipelines.saving import Kept

EXIT_FAULT = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# The parent of every complaint about the command line. Typer has click inside, under a private name
# that depends on its version; BadParameter is its public child.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Left:
    """What a command has put on disk so far: videos, and latents that it was stopped decoding.

    `told` is what else the last line of `--json` says of a command that was stopped.
    """

    finished: list[Output] = field(default_factory=list["Output"])
    unfinished: list[Kept] = field(default_factory=list["Kept"])
    told: dict[str, Any] = field(default_factory=dict[str, Any])


def print_json(content: dict[str, Any]) -> None:
    """One line of JSON on stdout; ASCII, so that any stdout takes it."""
    print(json.dumps(content), flush=True)


def stdout() -> Console:
    """Where results are drawn; tables are not cut to 80 columns where that is a file or pipe."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


def ended(run: Callable[[], object], *, as_json: bool, hint: str, left: Left) -> int:
    """Run a command to its exit status; its exceptions become one line, a traceback on demand.

    `hint` tells where a mistake on the command line is explained; what `run` has `left` is named
    if it does not come to its end.
    """
    out, err = _Steady(sys.stdout), _Steady(sys.stderr)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast("TextIO", out), cast("TextIO", err)
    try:
        status = _guarded(run, as_json, hint, left)
        out.flush()
        if out.failure is not None and out.failure.errno != errno.EPIPE:
            print(f"kinora: stdout cannot be written ({out.failure.strerror})", file=sys.stderr)
            status = status or EXIT_REFUSED
        err.flush()
        return status
    finally:
        sys.stdout, sys.stderr = before


def _guarded(run: Callable[[], object], as_json: bool, hint: str, left: Left) -> int:
    def end(told: str, **content: object) -> None:
        print(told, file=sys.stderr)
        if as_json:
            outputs = [output.to_json() for output in left.finished]
            print_json({**content, **({"outputs": outputs} if outputs else {})})
        else:
            for output in left.finished:
                print(output.path)

    try:
        with _signals(_stopper()):
            status = run()
            return status if isinstance(status, int) else 0
    except (_Stopped, KeyboardInterrupt, typer.Abort) as error:
        with _signals(signal.SIG_IGN):
            told = "".join(f"; {it.remedy()}" for it in left.unfinished)
            paths = [str(it.path) for it in left.unfinished]
            latents = {"latents": paths[-1]} if paths else {}
            end(f"stopped{told}", **{"status": "stopped", **latents, **left.told})
            status = error.status if isinstance(error, _Stopped) else EXIT_INTERRUPTED
            _leave_the_worker(status)
            return status
    except _UsageError as error:
        message = " ".join(cast("Any", error).format_message().split()).removesuffix(".")
        # As newer releases of typer have it from pydantic.
        message = re.sub(
            r"Input should be ([^,]+)(, unable to parse .*)?$", r"it must be \1", message
        )
        told = f"kinora: {message}; {hint}"
        end(told, status="error", kind="UsageError", error=message)
        return EXIT_REFUSED
    except KinoraError as error:
        latents = None if error.latents is None else str(error.latents)
        kind = type(error).__name__
        end(f"kinora: {error}", status="error", kind=kind, error=str(error), latents=latents)
        return EXIT_REFUSED
    except Exception as error:
        if os.environ.get("KINORA_DEBUG"):
            traceback.print_exc()
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        told = f"kinora: a fault in Kinora: {message}; KINORA_DEBUG=1 shows where, please report it"
        end(told, status="error", kind=type(error).__name__, error=message)
        return EXIT_FAULT


class _Stopped(BaseException):
    """The process was asked to end. Not `KeyboardInterrupt`, which typer answers for itself."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


def _stopper() -> Callable[[int, object], None]:
    """A handler of Ctrl-C and SIGTERM: answer at once, then unwind, which may take a step."""
    told = False

    def stop(number: int, _: object) -> None:
        nonlocal told
        worker = sys.modules.get("kinora.pipelines.worker")  # not imported yet: nothing runs
        if not told and worker is not None and worker.running() and sys.__stderr__ is not None:
            hint = "; Ctrl-C again stops now" if number == signal.SIGINT else ""
            with suppress(OSError):  # past the stream, in which a write may be under way
                os.write(2, f"stopping after this step{hint}\n".encode())
        told = True
        raise _Stopped(EXIT_TERMINATED if number == signal.SIGTERM else EXIT_INTERRUPTED)

    return stop


@contextmanager
def _signals(handler: Any) -> Generator[None, None, None]:
    """Have Ctrl-C and SIGTERM handled so in the body; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: a job in the background is not meant by Ctrl-C.
    ours = [it for it in _SIGNALS if signal.getsignal(it) not in (signal.SIG_IGN, None)]
    before = [(number, signal.signal(number, handler)) for number in ours]
    try:
        yield
    finally:
        for number, earlier in before:
            signal.signal(number, earlier)


def _leave_the_worker(status: int) -> None:
    """End the process at once if a second Ctrl-C ended the wait for the worker.

    The interpreter must not go on to its own end: the worker's native code would abort it.
    """
    from ..pipelines.worker import running

    if running():
        from ..pipelines.files import withdraw_all

        withdraw_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Steady:
    """A text stream on which a failed write ends nothing: neither a run nor a report of it.

    The first failure is kept; whatever is written from then on is dropped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write what can be written."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        self._attempt("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, name: str, *args: str) -> None:
        if self._stream is None or self.failure is not None:
            return
        try:
            getattr(self._stream, name)(*args)
        except OSError as error:
            self.failure = error
            # What is buffered would fail again, and loudly, at the interpreter's end.
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
