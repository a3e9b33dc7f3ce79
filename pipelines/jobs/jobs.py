"""`Jobs`: takes requests from any thread, has them made one after the other, and knows them all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .. import cards, models, sidecar
from ..batch.making import Make, Studio
from ..batch.rows import Row
from ..errors import OutputError, RequestError, SidecarError
from ..events import Progress
from ..files import LATENTS_SUFFIX, explain, slug
from ..request import Request, Resolved, resolve
from ..sidecar import Record
from ..together import check_alone
from .line import Line
from .store import Job, Store
from .uploads import Uploads

HIDDEN = ".kinora-jobs"
"""The folder of the line, in that of the videos."""


class Jobs:
    """The jobs of one output folder; one process at a time has them.

    `make` is what the worker makes videos by. Raises `OutputError` where the folder cannot be
    used, or another process has its jobs.
    """

    def __init__(self, folder: Path | str, *, make: Make = Studio) -> None:
        self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
        self._lock = _claim(self.folder)
        try:
            self._store = Store(self.folder / HIDDEN / "jobs.sqlite")
        except BaseException:
            os.close(self._lock)
            raise
        self.uploads = Uploads(self.folder / HIDDEN / "images")
        self._line = Line(self.folder, self._store, make)

    def start(self) -> None:
        """Begin to make jobs: those that were queued when the last process ended go on."""
        self._line.thread.start()

    def close(self) -> None:
        """Stop the running job within a step, which is `interrupted` then; others stay queued."""
        self._line.close()
        self._store.close()
        os.close(self._lock)

    @contextmanager
    def scratch(self) -> Generator[Path, None, None]:
        """An empty folder for the length of the body.

        What a process that was killed left in it is removed first. Raises `OutputError`.
        """
        folder = self.folder / HIDDEN / "scratch"
        _check_ours(folder)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise explain(error, folder) from None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def alive(self) -> bool:
        """Whether jobs are being made."""
        return self._line.thread.is_alive()

    @property
    def held(self) -> str | None:
        """Why nothing is being made, where that is no job's fault; it is tried again."""
        return self._line.held

    def resolve(self, request: Request) -> Resolved:
        """`request` with nothing left open, for this folder. Raises `KinoraError`."""
        request = request.model_copy(update={"output": f"{self.folder}/"})
        card = cards.find(request.model)
        resolved = resolve(request, card)
        check_alone(resolved.recipe)
        if "steps" in resolved.recipe:
            from ...accel import recipe as recipes  # these need torch
            from ..verdicts import timesteps

            policy = recipes.from_table(resolved.recipe).steps
            steps = timesteps(resolved, models.outline(card).folder)
            refusal = policy and policy.refuses(steps)
            if refusal:
                raise RequestError(refusal)
        return resolved

    def submit(self, *requests: Request) -> list[Job]:
        """Put a job for each video of each request into the line: all, or none.

        Raises `KinoraError` for what no run could do.
        """
        rows: list[Row] = []
        for resolved in map(self.resolve, requests):
            for index in range(resolved.num_videos):
                single, id = resolved.single(index), secrets.token_hex(8)
                rows.append(Row(id, 0, f"{slug(single.prompt)}-s{single.seed}-{id}", single))
        jobs = self._store.add(rows)
        self._line.ring()
        return jobs

    def get(self, id: str) -> Job | None:
        """The job with this id, as it stands."""
        return self._store.get(id)

    def jobs(self, *, newest: bool = True, after: Job | None = None, limit: int = 100) -> list[Job]:
        """Jobs in order of the line, those `after` one."""
        beyond = None if after is None else after.place
        return self._store.jobs(newest=newest, beyond=beyond, limit=limit)

    def running(self) -> list[Job]:
        """What is being made."""
        return self._store.jobs(statuses=("running",))

    def ahead(self, job: Job) -> int:
        """How many jobs are made before it."""
        return self._store.ahead(job.place)

    def progress(self, job: Job) -> tuple[Progress, float] | None:
        """How far a running job is, and how many seconds ago it was."""
        found = self._line.progress.get(job.id)
        return None if found is None else (found[0], time.monotonic() - found[1])

    def preview(self, job: Job) -> tuple[int, bytes] | None:
        """The last step of a running job that was shown, and the picture, a JPEG."""
        return self._line.previews.get(job.id)

    def notices(self, job: Job) -> tuple[str, ...]:
        """What it has told in this process."""
        return tuple(dict.fromkeys(self._line.notices.get(job.id, ())))

    def cancel(self, id: str) -> Job | None:
        """Have a job stop within a step; asked again, at once together with its worker.

        It is `cancelled` once it has stopped. Returns it as it stands.
        """
        self._store.stop(id)
        self._line.ring()
        return self._store.get(id)

    def retry(self, id: str) -> Job | None:
        """Put a job that came to nothing into the line again; None where it is none of those."""
        if not self._store.retry(id):
            return None
        self._line.notices.pop(id, None)
        self._line.ring()
        return self._store.get(id)

    def remove(self, id: str) -> bool:
        """Forget a job that is not running and remove its files; whether there was one."""
        job = self._store.get(id)
        if job is None or not self._store.remove(id):
            return False
        for path in self.files(job):
            path.unlink(missing_ok=True)
        self._line.notices.pop(id, None)
        return True

    def media(self, job: Job) -> Path:
        """Where its video is once it is done."""
        return self.folder / f"{job.row.name}.{job.row.request.format}"

    def sidecar(self, job: Job) -> Path:
        """Where its sidecar is once it is done."""
        return self.folder / f"{job.row.name}.json"

    def latents(self, job: Job) -> Path | None:
        """Latents that are there: kept as it asked, or of an attempt that came to no video."""
        path = self.folder / f"{job.row.name}{LATENTS_SUFFIX}"
        return path if path.is_file() else None

    def files(self, job: Job) -> list[Path]:
        """Its files that are there."""
        found = (self.media(job), self.sidecar(job), self.latents(job))
        return [path for path in found if path is not None and path.is_file()]

    def record(self, job: Job) -> Record | None:
        """What its sidecar says; None before it is done, and where somebody took it away."""
        try:
            return sidecar.read(self.sidecar(job))
        except SidecarError:
            return None


def _check_ours(folder: Path) -> None:
    """Raise `OutputError` where something else is in its place; a link may lead to anything."""
    if os.path.islink(folder):
        told = "a symbolic link"
    elif os.path.lexists(folder) and not os.path.isdir(folder):
        told = "no folder"
    else:
        return
    raise OutputError(
        f"{folder} is {told}, where Kinora keeps a folder of its own: "
        "move it away, or choose another --output"
    )


def _claim(folder: Path) -> int:
    """Make the folder, and hold its line until the descriptor is closed. Raises `OutputError`."""
    hidden = folder / HIDDEN
    _check_ours(hidden)
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise explain(error, folder) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise OutputError(
            f"another `kinora ui` works on {folder}: use that one, or another --output"
        ) from None
    return lock
