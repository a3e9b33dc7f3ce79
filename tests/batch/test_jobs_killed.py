"""`kill -9` of server and worker at random: nothing finished is lost, nothing made twice."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from desks import Desk, ask, ended, standing, wait
from killing import run_killed

from kinora.pipelines.batch.store import Drafts
from kinora.pipelines.jobs import Jobs

SERVER = Path(__file__).with_name("serving.py")
Seen = dict[str, tuple[float, int]]


def finished(folder: Path) -> Seen:
    """Id → when it ended and which file its video is, of all that are done."""
    database = folder / ".kinora-jobs" / "jobs.sqlite"
    if not database.exists():
        return {}
    with closing(sqlite3.connect(database, timeout=10)) as db:
        try:
            rows = db.execute("SELECT id, ended FROM jobs WHERE status = 'done'").fetchall()
        except sqlite3.OperationalError:
            return {}  # killed before its first line
    files = {path.stem[-16:]: path.stat().st_ino for path in folder.glob("*.mp4")}
    return {id: (ended, files[id]) for id, ended in rows}


@pytest.mark.parametrize(
    ("kills", "jobs", "seconds", "seed"),
    # Jobs must last for all kills, also where other work slows these down.
    [(4, 10, 0.1, 1), pytest.param(50, 20, 0.3, 2, marks=pytest.mark.slow)],
)
def test_random_kills(tmp_path: Path, kills: int, jobs: int, seconds: float, seed: int) -> None:
    folder, over = tmp_path / "out", threading.Event()
    seen: list[Seen] = []

    def watch() -> None:
        while not over.wait(0.1):
            seen.append(finished(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        command = [sys.executable, str(SERVER), str(folder), str(jobs), str(seconds)]
        made = run_killed(command, kills, (0.1, 0.6), seed, tmp_path / "log")
    finally:
        over.set()
        watcher.join()
    print(f"killed {made.parents} servers and {made.workers} workers over {jobs} jobs")
    assert made.all == kills and made.parents and made.workers
    last = finished(folder)
    assert len(last) == jobs
    for earlier in seen:
        assert earlier.items() <= last.items(), "what was done stays done, with the same file"
    submitted = (folder / "submitted").read_text().split()
    assert set(submitted) <= last.keys(), "none that was accepted is lost"
    with closing(sqlite3.connect(folder / ".kinora-jobs" / "jobs.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    names = {path.name for path in folder.iterdir()} - {"submitted", ".kinora-jobs"}
    kinds = sorted(name.rpartition(".")[2] for name in names)
    assert kinds == ["json"] * jobs + ["mp4"] * jobs, "no draft is left"


def left_running(desk: Desk) -> Jobs:
    """A folder whose process was killed while it made its one job; opened anew, not started."""
    jobs = desk.open(start=False)
    jobs.submit(ask("a"))
    assert jobs._store.take() is not None  # pyright: ignore[reportPrivateUsage]
    desk.close()
    return desk.open(start=False)


def test_a_job_whose_files_were_in_place_is_done(desk: Desk) -> None:
    jobs = left_running(desk)
    (job,) = jobs.jobs()
    assert job.status == "running"
    jobs.media(job).write_bytes(b"video")
    jobs.sidecar(job).write_bytes(b"{}")
    jobs.start()
    (done,) = ended(jobs, job)
    assert (done.status, done.attempt) == ("done", 1) and jobs.media(job).read_bytes() == b"video"


def test_half_of_the_files_are_none_and_latents_are_kept(desk: Desk) -> None:
    jobs = left_running(desk)
    (job,) = jobs.jobs()
    jobs.media(job).write_bytes(b"video")
    draft = desk.folder / ".kinora-batch" / "host-1-x" / "worker-0-y" / job.id
    draft.mkdir(parents=True)
    (draft / f"{job.row.name}.latents.safetensors").write_bytes(b"latents")
    jobs.start()
    (interrupted,) = ended(jobs, job)
    assert interrupted.status == "interrupted" and "was ended" in (interrupted.reason or "")
    assert not jobs.media(job).exists()
    latents = jobs.latents(job)
    assert latents is not None and latents.read_bytes() == b"latents"
    wait(lambda: not draft.exists(), "that drafts are swept")
    assert jobs.retry(job.id)
    assert ended(jobs, job)[0].status == "done" and jobs.latents(job) is None


def test_the_worker_of_a_killed_process_is_waited_for(desk: Desk) -> None:
    jobs = left_running(desk)
    drafts = Drafts(desk.folder / ".kinora-batch" / "host-1-x")
    drafts.make()
    jobs._store.note("drafts", drafts.folder.name)  # pyright: ignore[reportPrivateUsage]
    jobs.start()
    wait(lambda: jobs.held, "that it waits")
    (job,) = jobs.jobs()
    assert job.status == "running", "it may yet be finished"
    for path in (jobs.media(job), jobs.sidecar(job)):
        path.write_bytes(b"{}")
    drafts.release()
    assert ended(jobs, job)[0].status == "done" and standing(jobs, job)[0].attempt == 1
    assert os.listdir(desk.folder)
