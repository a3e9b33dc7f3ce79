"""Which row a worker takes next, how often a failing one is tried, and when all will be done."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from .rows import Row
from .table import Table


@dataclass(frozen=True, slots=True)
class Turn:
    """One attempt at a row, from 1. `alone`: with no other row in its worker beside it."""

    index: int
    row: Row
    attempt: int
    alone: bool


class Turns(Protocol):
    """What an engine takes its turns from, and tells how they went."""

    @property
    def left(self) -> int:
        """Rows that nobody has taken; as long as there are some, engines go on."""
        ...

    def take(self, worker: Hashable, *, idle: bool = True) -> Turn | None:
        """A row for `worker`, or None where there is none for it now."""
        ...

    def unwanted(self, turn: Turn) -> Literal["stop", "kill"] | None:
        """Whether a turn is to end within a step, or at once with its process."""
        ...

    def failed(self, turn: Turn) -> bool:
        """An attempt has failed; whether the row will be tried again."""
        ...

    def lost(self, turn: Turn, *, suspected: bool) -> None:
        """A turn has come to no end: its process did; `suspected` that it brought it down."""
        ...


@dataclass
class _Queue:
    rows: array[int]
    next: int = 0
    takers: set[Hashable] = field(default_factory=set[Hashable])

    @property
    def left(self) -> int:
        return len(self.rows) - self.next


class Schedule:
    """The rows of a batch that are left.

    A worker stays with a group to its end. Then it takes one of the same model where there is one,
    of the fewest workers, of the most work.
    """

    def __init__(self, table: Table, pending: Iterable[int], retries: int) -> None:
        self._table, self._retries = table, retries
        self._queues: dict[int, _Queue] = {}
        self._again: deque[tuple[int, bool]] = deque()
        self._attempts: dict[int, int] = {}
        self._group_of: dict[Hashable, int] = {}
        self.total_work = 0
        for index in pending:
            group = table.group_of[index]
            self._queues.setdefault(group, _Queue(array("L"))).rows.append(index)
            self.total_work += table.groups[group].work

    @property
    def left(self) -> int:
        """Rows that nobody has taken."""
        return len(self._again) + sum(queue.left for queue in self._queues.values())

    def take(self, worker: Hashable, *, idle: bool = True) -> Turn | None:
        """A row for `worker`, or None where there is none for it now.

        Only an `idle` worker gets a row that is to be alone.
        """
        if self._again and (idle or not self._again[0][1]):
            index, alone = self._again.popleft()
            return self._turn(index, alone)
        queue = self._queue_for(worker)
        if queue is None:
            return None
        index = queue.rows[queue.next]
        queue.next += 1
        return self._turn(index, False)

    def unwanted(self, turn: Turn) -> None:
        """All rows are wanted as long as the batch is."""

    def failed(self, turn: Turn) -> bool:
        """Count an attempt that failed; whether the row will be tried again."""
        self._attempts[turn.index] = turn.attempt
        if turn.attempt > self._retries:
            return False
        self._again.append((turn.index, turn.alone))
        return True

    def lost(self, turn: Turn, *, suspected: bool) -> None:
        """Have a row made whose worker ended; of several the one to blame is not known.

        Each is made alone then, and this attempt counts for nothing.
        """
        self._again.append((turn.index, suspected))

    def work_of(self, index: int) -> int:
        """What row `index` costs, as `total_work` counts."""
        return self._table.groups[self._table.group_of[index]].work

    def _turn(self, index: int, alone: bool) -> Turn:
        return Turn(index, self._table.row(index), self._attempts.get(index, 0) + 1, alone)

    def _queue_for(self, worker: Hashable) -> _Queue | None:
        current = self._group_of.get(worker)
        if current is not None:
            if self._queues[current].left:
                return self._queues[current]
            self._queues[current].takers.discard(worker)
        groups = self._table.groups
        model = None if current is None else groups[current].model
        open_ = [group for group, queue in self._queues.items() if queue.left]
        if not open_:
            return None

        def cost(group: int) -> tuple[bool, int, int]:
            queue = self._queues[group]
            other = model is not None and groups[group].model != model
            return other, len(queue.takers), -queue.left * groups[group].work

        chosen = min(open_, key=cost)
        self._group_of[worker] = chosen
        self._queues[chosen].takers.add(worker)
        return self._queues[chosen]


@dataclass
class Pace:
    """How far a batch has come, by work: rows of different sizes count as what they cost."""

    total: int
    ended: int = 0
    under_way: dict[int, float] = field(default_factory=dict[int, float])
    """Work done so far, by row that is being made."""
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the batch began."""
        return time.perf_counter() - self.began

    @property
    def eta_s(self) -> float | None:
        """Seconds until it ends; None as long as nothing has been done."""
        made = self.ended + sum(self.under_way.values())
        return self.elapsed_s * (self.total - made) / made if made else None
