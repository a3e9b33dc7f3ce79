"""The rows that one worker has, and whose fault it was that it ended: the same for all engines."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace

from ...errors import OutputError
from ...events import Progress
from ..attempt import Ended
from ..schedule import Turn
from ..store import Store
from .engine import Heard, Job

LANES = 2
"""Rows that a worker has at a time: one has the model while the files of the other are written."""


def progress(event: Progress) -> tuple[float, str]:
    """How far its row is with this, from 0 to 1 of its denoising, and where it stands in words."""
    share = event.step / event.steps if event.steps else 0.0
    if event.stage in ("decode", "save"):
        share = 1.0
    step = f" step {event.step}/{event.steps}" if event.steps else ""
    return share, f"{event.doing}{step}"


@dataclass(eq=False)
class Turns:
    """Those of worker `number`."""

    job: Job
    number: int
    _held: dict[int, Turn] = field(default_factory=dict[int, Turn])
    _began: dict[int, float] = field(default_factory=dict[int, float])

    def __len__(self) -> int:
        return len(self._held)

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
