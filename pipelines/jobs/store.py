"""The line on disk: a SQLite database in the folder of the videos, whole whatever is killed.

    queued ─► running ─► done | failed | cancelled | interrupted ─► queued (retry)

Where a job stands is written before anybody is told. What came out is not here: it is in the
sidecar beside the video, whose presence is what makes a job done.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..batch.rows import Row
from ..errors import BusyError, OutputError

Status = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
STATUSES: tuple[Status, ...] = get_args(Status)
RETRIED: tuple[Status, ...] = ("failed", "cancelled", "interrupted")
"""Those from which a job can be put into the line again."""
MOST_QUEUED = 10_000
_VERSION = 1
_BUSY_S = 10.0
_TABLES = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    place INTEGER NOT NULL UNIQUE,  -- in the line; a retry gets a new one
    status TEXT NOT NULL,
    row TEXT NOT NULL,              -- the row of a batch as JSON
    attempt INTEGER NOT NULL DEFAULT 0,
    stopping INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, started REAL, ended REAL,
    kind TEXT, reason TEXT
) STRICT;
CREATE INDEX by_status ON jobs (status, place);
CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
_COLUMNS = "place, status, row, attempt, stopping, created, started, ended, kind, reason"


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands. Times are seconds since 1970.

    `place` orders the line. `stopping` counts how often it was asked to stop: within a step, then
    at once. `reason` says why it failed, or waits; `kind` is the class of the error.
    """

    place: int
    status: Status
    row: Row
    attempt: int
    stopping: int
    created: float
    started: float | None
    ended: float | None
    kind: str | None
    reason: str | None

    @property
    def id(self) -> str:
        """Sixteen hexadecimal digits."""
        return self.row.id

    @property
    def open(self) -> bool:
        """Whether more is to come."""
        return self.status in ("queued", "running")


class Store:
    """One such database. Calls come from any thread; readers wait for nobody.

    Raises `OutputError` where the disk is full or the file is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing_alone = threading.Lock()
        with self._failing():
            self._connection = self._connect()
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )

    def _prepare(self) -> None:
        found = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if found > _VERSION:
            raise OutputError(f"{self._path} was written by a newer Kinora: update Kinora")
        # What is committed outlives a power cut too.
        self._connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
        if found == 0:
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;"
            )

    def close(self) -> None:
        """Close the database."""
        with self._writing_alone:
            self._connection.close()

    @contextmanager
    def _failing(self) -> Generator[None, None, None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OutputError(f"{self._path} cannot be used: {error}") from error

    @contextmanager
    def _writing(self) -> Generator[sqlite3.Connection, None, None]:
        """One transaction: all of it or nothing."""
        with self._failing(), self._writing_alone:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._failing(), closing(self._connect()) as connection:
            return connection.execute(query, tuple(values)).fetchall()

    def add(self, rows: Sequence[Row]) -> list[Job]:
        """Put jobs at the end of the line, all or none. Raises `BusyError` where it is full."""
        now = time.time()
        with self._writing() as db:
            (queued,) = db.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()
            if queued + len(rows) > MOST_QUEUED:
                raise BusyError(
                    f"{queued:,} jobs wait already, {MOST_QUEUED:,} are the most: wait or cancel"
                )
            for row in rows:
                db.execute(
                    "INSERT INTO jobs (id, place, status, row, created) VALUES (?, "
                    "(SELECT coalesce(max(place), 0) + 1 FROM jobs), 'queued', ?, ?)",
                    (row.id, json.dumps(row.to_json()), now),
                )
        return self._jobs("WHERE created = ? ORDER BY place", (now,))

    def take(self) -> Job | None:
        """The first in the line, which is running from now on."""
        with self._writing() as db:
            found = db.execute(
                "UPDATE jobs SET status = 'running', attempt = attempt + 1, started = ?, "
                "ended = NULL, kind = NULL, reason = NULL WHERE place = "
                f"(SELECT min(place) FROM jobs WHERE status = 'queued') RETURNING {_COLUMNS}",
                (time.time(),),
            ).fetchall()
        return _job(found[0]) if found else None

    def end(
        self, id: str, status: Status, kind: str | None = None, reason: str | None = None
    ) -> None:
        """Note how a running job has ended; one that is running no more stays as it is."""
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET status = ?, ended = ?, kind = ?, reason = ?, stopping = 0 "
                "WHERE id = ? AND status = 'running'",
                (status, time.time(), kind, reason, id),
            )

    def put_back(self, id: str, reason: str) -> None:
        """Have a running job wait again, first in the line; this attempt counts for nothing."""
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET status = 'queued', attempt = attempt - 1, reason = ? "
                "WHERE id = ? AND status = 'running'",
                (reason, id),
            )

    def stop(self, id: str) -> None:
        """Cancel a job that waits, or ask a running one to stop."""
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET status = 'cancelled', ended = ? "
                "WHERE id = ? AND status = 'queued'",
                (time.time(), id),
            )
            db.execute(
                "UPDATE jobs SET stopping = min(stopping + 1, 2) WHERE id = ? "
                "AND status = 'running'",
                (id,),
            )

    def retry(self, id: str) -> bool:
        """Put a job that came to nothing at the end of the line; whether it was one."""
        with self._writing() as db:
            marks = ", ".join("?" for _ in RETRIED)
            return db.execute(
                "UPDATE jobs SET status = 'queued', place = (SELECT max(place) + 1 FROM jobs), "
                "started = NULL, ended = NULL, kind = NULL, reason = NULL "
                f"WHERE id = ? AND status IN ({marks})",
                (id, *RETRIED),
            ).rowcount > 0  # fmt: skip

    def remove(self, id: str) -> bool:
        """Forget a job; whether there was one that nobody is at."""
        with self._writing() as db:
            return (
                db.execute("DELETE FROM jobs WHERE id = ? AND status != 'running'", (id,)).rowcount
                > 0
            )

    def get(self, id: str) -> Job | None:
        """The job with this id."""
        found = self._jobs("WHERE id = ?", (id,))
        return found[0] if found else None

    def ahead(self, place: int) -> int:
        """How many jobs are made before the one at `place`."""
        query = (
            "SELECT count(*) FROM jobs WHERE status = 'running' OR status = 'queued' AND place < ?"
        )
        return self._read(query, (place,))[0][0]

    def jobs(
        self,
        *,
        statuses: Sequence[Status] = STATUSES,
        newest: bool = True,
        beyond: int | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Jobs in order of the line, from `beyond` that place on."""
        marks = ", ".join("?" for _ in statuses)
        values: list[Any] = [*statuses]
        further = ""
        if beyond is not None:
            further = f"AND place {'<' if newest else '>'} ?"
            values.append(beyond)
        order = "DESC" if newest else "ASC"
        return self._jobs(
            f"WHERE status IN ({marks}) {further} ORDER BY place {order} LIMIT ?",
            (*values, limit),
        )

    def note(self, name: str, value: str) -> None:
        """Keep a value beside the jobs."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    def noted(self, name: str) -> str | None:
        """What was kept."""
        found = self._read("SELECT value FROM notes WHERE name = ?", (name,))
        return found[0][0] if found else None

    def _jobs(self, rest: str, values: Iterable[Any]) -> list[Job]:
        return [_job(it) for it in self._read(f"SELECT {_COLUMNS} FROM jobs {rest}", values)]


def _job(columns: tuple[Any, ...]) -> Job:
    place, status, row, *rest = columns
    return Job(place, status, Row.from_json(json.loads(row)), *rest)
