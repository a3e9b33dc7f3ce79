"""A job as the page sees it: what the store says, and what is known of it besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ...accel import recipe as recipes
from ...accel.table import untitled
from ...pipelines.events import Progress
from ...pipelines.jobs import Job, Jobs, Status
from ...pipelines.sidecar import Record
from . import wire

Phase = Literal["idle", "waiting", "running", "done", "cancelled", "failed"]
_PHASES: dict[Status, Phase] = {
    "queued": "waiting",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "cancelled": "cancelled",
    "interrupted": "failed",
}
_ORDER: tuple[Phase, ...] = ("running", "waiting", "failed", "cancelled", "done")


@dataclass(frozen=True, slots=True)
class Seen:
    """A job as it stands. `progress` was `ago_s` ago; `ahead` jobs are made before it.

    `preview` is the last step that can be looked at, `latents` where latents are, `record` what its
    sidecar says once it is done.
    """

    job: Job
    progress: Progress | None = None
    ago_s: float = 0.0
    ahead: int = 0
    held: str | None = None
    notices: tuple[str, ...] = ()
    preview: int | None = None
    latents: Path | None = None
    record: Record | None = None

    @property
    def name(self) -> str:
        """The id for clients."""
        return wire.name_of(self.job)

    @property
    def phase(self) -> Phase:
        """Where it is, in the words of the page."""
        return _PHASES[self.job.status]

    def within(self, folder: Path) -> Seen:
        """The same, with files named from `folder` on: where that is, not all need to know."""
        return replace(
            self,
            job=replace(self.job, reason=wire.within(folder, self.job.reason)),
            held=wire.within(folder, self.held),
            notices=tuple(wire.within(folder, it) or "" for it in self.notices),
            latents=self.latents and Path(self.latents.name),
        )


def see(jobs: Jobs, id: str) -> Seen | None:
    """A job as it stands; None where it was removed."""
    job = jobs.get(id)
    if job is None:
        return None
    progress, ago_s = jobs.progress(job) or (None, 0.0)
    queued, over = job.status == "queued", not job.open
    shown = jobs.preview(job)
    return Seen(
        job,
        progress if job.status == "running" else None,
        ago_s,
        jobs.ahead(job) if queued else 0,
        jobs.held if queued else None,
        jobs.notices(job),
        None if shown is None else shown[0],
        jobs.latents(job) if over else None,
        jobs.record(job) if job.status == "done" else None,
    )


def phase(seen: Sequence[Seen]) -> Phase:
    """Where several jobs are: what is still to come first, then what went wrong."""
    found = {it.phase for it in seen}
    for it in _ORDER:
        if it in found:
            return it
    return "idle"


def recipe_name(table: dict[str, Any]) -> str:
    """What a recipe is called in a list: the preset that it is, or what it consists of."""
    table = untitled(table)
    if not table:
        return "dense"
    for name, known in _presets().items():
        if known == table:
            return name
    parts = [table.get("attention", {}).get("method"), table.get("steps", {}).get("policy")]
    named = " + ".join(it for it in parts if it)
    return f"{named or 'dense'}, changed"


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: untitled(recipes.find(name).table()) for name in recipes.names()}
