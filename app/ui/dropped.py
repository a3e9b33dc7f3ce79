"""The folder where gradio puts what is uploaded: kept small, however an upload ends."""

from __future__ import annotations

import os
import stat
import time
from asyncio import get_running_loop
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_BYTES = 2 * 2**30
"""What may lie in it, with what is being received."""
AGE_S = 300.0
"""The page reads and removes a file as soon as it has arrived; one this old is left over."""


class Dropped:
    """That folder.

    What is being received lies in it directly. It is moved to a folder of its own, named by its
    hash, when all of its form has arrived. Which request a file belongs to is not to be seen: those
    left over go with the end of the last upload, and until then `MOST_BYTES` bounds them.

    For the event loop alone: gradio makes a folder and fills it without a pause between.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._receiving = 0
        self._bytes = 0

    @contextmanager
    def receiving(self) -> Generator[Callable[[int], bool], None, None]:
        """For the length of an upload: takes the bytes that come, says whether there is room."""
        self._sweep()
        self._receiving += 1
        try:
            yield self._take
        finally:
            self._receiving -= 1
            self._sweep()
            get_running_loop().call_later(AGE_S + 1, self._sweep)  # perhaps nobody reads it

    def _take(self, size: int) -> bool:
        self._bytes += size
        return self._bytes <= MOST_BYTES

    def _sweep(self) -> None:
        """Remove what is left over, and count the rest."""
        self._bytes = 0
        oldest = time.time() - AGE_S
        for folder, _, names in os.walk(self._folder, topdown=False):
            arrived = folder != str(self._folder)
            for name in names:
                path = os.path.join(folder, name)
                with suppress(OSError):  # the page removes them meanwhile
                    found = os.lstat(path)
                    if found.st_ctime < oldest if arrived else not self._receiving:
                        os.unlink(path)
                    elif stat.S_ISREG(found.st_mode):
                        self._bytes += found.st_size
            if arrived:
                with suppress(OSError):  # it holds something
                    os.rmdir(folder)
