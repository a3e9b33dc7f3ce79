"""`python -m kinora.app.ui.tied ARGUMENTS`: `kinora ARGUMENTS`, which ends when its stdin does.

However the page ends, a process that it has started for itself does not outlive it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

_ENDING_S = 2.0  # for what it has started to end with it


def end_with_stdin() -> None:
    """From now on, end this process and its group, which is its own, at the end of its stdin."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    # The file itself: a reader of `sys.stdin` would hold its lock when Python ends.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_ENDING_S)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the command line; returns its exit status."""
    from ..__main__ import main as run

    end_with_stdin()
    return run()


if __name__ == "__main__":
    sys.exit(main())
