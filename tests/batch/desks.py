"""Jobs of a folder for tests, made by the stand-in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standin import StandIn

from kinora.pipelines.jobs import Job, Jobs
from kinora.pipelines.request import Request

PATIENCE_S = 60


@dataclass
class Desk:
    """The jobs of a folder, closed and opened again at will."""

    folder: Path
    make: Any = StandIn
    opened: list[Jobs] = field(default_factory=list[Jobs])

    def open(self, *, start: bool = True) -> Jobs:
        """Begin."""
        jobs = Jobs(self.folder, make=self.make)
        self.opened.append(jobs)
        if start:
            jobs.start()
        return jobs

    def close(self) -> None:
        """End, as Ctrl-C does."""
        self.opened.pop().close()


def ask(prompt: str, **fields: Any) -> Request:
    """A request for the stand-in."""
    return Request(prompt=prompt, steps=3, device="cpu", **fields)


def wait(condition: Callable[[], object], what: str = "it") -> None:
    """Until something is so."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)


def ended(jobs: Jobs, *asked: Job) -> list[Job]:
    """The jobs once they have all ended."""
    wait(lambda: not any(it.open for it in standing(jobs, *asked)), "the end of the jobs")
    return standing(jobs, *asked)


def standing(jobs: Jobs, *asked: Job) -> list[Job]:
    """The jobs as they stand."""
    found = [jobs.get(job.id) for job in asked]
    return [job for job in found if job is not None]
