"""The rows that one worker has, and whose fault it was that it ended: the same for all engines."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

from ...errors import OutputError
from ..attempt import Ended
from ..schedule import Turn
from ..store import Store
from .engine import Heard, Job

LANES = 2
"""Rows that a worker has at a time: one has the model while the files of the other are written."""


@dataclass(eq=False)
class Held:
    """Those of worker `number`."""

    job: Job
    number: int
    _held: dict[int, Turn] = field(default_factory=dict[int, Turn])
    _began: dict[int, float] = field(default_factory=dict[int, float])

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Turn]:
        return iter(list(self._held.values()))

    def take(self) -> Turn | None:
        """One more, where the worker can have it and there is one."""
        if len(self._held) >= LANES or any(turn.alone for turn in self._held.values()):
            return None
        turn = self.job.schedule.take(self.number, idle=not self._held)
        if turn is not None:
            self._held[turn.index] = turn
            self._began[turn.index] = time.perf_counter()
        return turn

    def heard(self, index: int, ended: Ended) -> Heard:
        """Have the schedule know how a turn ended. Raises `OutputError` where none could go on."""
        turn = self._held.pop(index)
        del self._began[index]
        if ended.blocked:
            raise OutputError(ended.reason or "the output cannot be written")
        if ended.status == "failed":
            again = self.job.schedule.failed(turn) if ended.again else False
            ended = ended.retried() if again else ended
        elif ended.status == "stopped":
            self.job.schedule.lost(turn, suspected=False)
        return Heard(index, ended)

    def lost(self, why: str, *, ill: bool, ending: bool) -> Generator[Heard, None, None]:
        """The worker has ended. Of several rows, or of one that was `ill`, none is known to blame.

        Where it was `ending`, none is.
        """
        suspected = len(self._held) > 1 or ill
        for turn in list(self._held.values()):
            if suspected or ending:
                del self._held[turn.index], self._began[turn.index]
                self.job.schedule.lost(turn, suspected=suspected)
                continue
            row, seconds = turn.row, round(time.perf_counter() - self._began[turn.index], 3)
            ended = Ended(row.id, row.line, row.name, "failed", turn.attempt, seconds,
                          kind="WorkerCrash", reason=why, again=True)  # fmt: skip
            # Its files may be in place, and it could not say so.
            if Store(self.job.folder).has(row.name, f".{row.request.format}"):
                path = f"{row.name}.{row.request.format}"
                ended = replace(ended, status="done", kind=None, reason=None, path=path)
            yield self.heard(turn.index, ended)
