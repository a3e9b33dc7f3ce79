"""Jobs in one process: what becomes of each, and that none takes another with it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from desks import Desk, ask, ended, standing, wait
from standin import Dumb

from kinora.pipelines.errors import BusyError, OutputError, RequestError
from kinora.pipelines.jobs import Job, Jobs, line, store


def worker_of(process: int) -> psutil.Process:
    """The worker process of it."""
    (found,) = [
        child
        for child in psutil.Process(process).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    return found


def running(jobs: Jobs, job: Job) -> bool:
    """Whether the stand-in is at it."""
    return jobs.progress(job) is not None


def why_held(jobs: Jobs) -> str:
    """Why the line is held, once it is."""
    held: list[str] = []

    def told() -> bool:
        held.append(jobs.held or "")
        return bool(held[-1])

    wait(told, "that the line is held")
    return held[-1]


def test_a_job_is_made_and_known_from_then_on(desk: Desk) -> None:
    jobs = desk.open()
    (job,) = jobs.submit(ask("a red circle", seed=7))
    assert (job.status, job.attempt, jobs.ahead(job)) == ("queued", 0, 0)
    (done,) = ended(jobs, job)
    assert (done.status, done.attempt, done.reason) == ("done", 1, None)
    assert jobs.media(done).name == f"a-red-circle-s7-{job.id}.mp4"
    assert jobs.files(done) == [jobs.media(done), jobs.sidecar(done)]
    assert done.created <= (done.started or 0) <= (done.ended or 0)
    desk.close()
    again = desk.open()
    assert again.get(job.id) == done and again.jobs() == [done]


def test_each_video_is_a_job_of_its_own_and_they_go_in_turn(desk: Desk) -> None:
    jobs = desk.open(start=False)
    made = jobs.submit(ask("a", num_videos=3, seed=5), ask("b"))
    assert [(it.row.request.prompt, it.row.request.seed) for it in made] == [
        ("a", 5), ("a", 6), ("a", 7), ("b", 0),
    ]  # fmt: skip
    assert [jobs.ahead(it) for it in made] == [0, 1, 2, 3]
    assert jobs.jobs(limit=2) == [made[3], made[2]]
    assert jobs.jobs(after=made[2]) == [made[1], made[0]]
    assert jobs.jobs(newest=False, after=made[1]) == [made[2], made[3]]
    jobs.start()
    done = ended(jobs, *made)
    assert {it.status for it in done} == {"done"}
    starts = [it.started or 0 for it in done]
    assert starts == sorted(starts)
    assert all(a.ended <= b.started for a, b in pairwise(done) if a.ended and b.started)


def test_what_no_run_could_do_is_refused_before_it_is_a_job(desk: Desk) -> None:
    jobs = desk.open(start=False)
    with pytest.raises(RequestError, match="cannot make 6 frames"):
        jobs.submit(ask("a"), ask("b", frames=6))
    short = ("steps.policy=pattern",)
    with pytest.raises(RequestError, match="need 12 steps or more, this run has 3: raise"):
        jobs.submit(ask("a"), ask("b", settings=short))
    assert jobs.jobs() == [], "all or none"


@pytest.mark.parametrize(
    ("prompt", "kind", "reason"),
    [
        ("sticky", "GenerationError", "CUDA error: an illegal memory access"),
        ("boom", "ZeroDivisionError", "by zero"),
        ("nan", "GenerationError", "gave NaN"),
        ("segv", "WorkerCrash", "SIGSEGV (a last word)"),
        ("kill", "WorkerCrash", "SIGKILL, as by a system that is out of memory"),
    ],
)
def test_a_failing_job_says_why_and_takes_no_other_with_it(
    desk: Desk, prompt: str, kind: str, reason: str
) -> None:
    jobs = desk.open()
    before, bad, after = jobs.submit(ask("a"), ask(prompt), ask("b"))
    assert [it.status for it in ended(jobs, before, bad, after)] == ["done", "failed", "done"]
    (failed,) = standing(jobs, bad)
    assert failed.kind == kind and reason in (failed.reason or "")
    assert "\n" not in (failed.reason or "")
    assert (jobs.latents(failed) is not None) == (prompt == "nan")


def test_a_retry_is_another_attempt_at_the_end_of_the_line(desk: Desk) -> None:
    jobs = desk.open()
    (job,) = jobs.submit(ask("flaky"))
    assert ended(jobs, job)[0].status == "failed"
    (other,) = jobs.submit(ask("sleep 0.5"))
    again = jobs.retry(job.id)
    assert again is not None and again.place > other.place and again.reason is None
    (done,) = ended(jobs, job)
    assert (done.status, done.attempt, done.id) == ("done", 2, job.id)
    assert jobs.retry(job.id) is None, "it is done"
    assert jobs.retry("0" * 16) is None


def test_a_cancel_says_so_once_it_has_stopped(desk: Desk) -> None:
    jobs = desk.open()
    (first, second, third) = jobs.submit(ask("sleep 60"), ask("b"), ask("c"))
    wait(lambda: running(jobs, first), "its first step")
    cancelled = jobs.cancel(second.id)
    assert cancelled is not None and cancelled.status == "cancelled", "at once: nobody is at it"
    asked = jobs.cancel(first.id)
    assert asked is not None and (asked.status, asked.stopping) == ("running", 1)
    (stopped,) = ended(jobs, first)
    assert (stopped.status, stopped.stopping, stopped.reason) == ("cancelled", 0, None)
    assert (stopped.ended or 0) - (stopped.started or 0) < 20, "it sleeps for sixty"
    assert ended(jobs, third)[0].status == "done"
    assert jobs.files(stopped) == [] == jobs.files(cancelled)
    late = jobs.cancel(third.id)
    assert late is not None and late.status == "done", "a cancel that came too late changes nothing"
    assert jobs.cancel("0" * 16) is None


def test_a_second_cancel_ends_a_worker_that_does_not_listen(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = desk.open()
    (stuck, other) = jobs.submit(ask("sleep 60"), ask("b"))
    wait(lambda: running(jobs, stuck), "its first step")
    worker = worker_of(os.getpid())
    worker.suspend()
    jobs.cancel(stuck.id)
    assert standing(jobs, stuck)[0].status == "running", "it is truthful"
    assert [it.id for it in jobs.running()] == [stuck.id]
    jobs.cancel(stuck.id)
    assert [it.status for it in ended(jobs, stuck, other)] == ["cancelled", "done"]
    assert not worker.is_running()


def test_the_end_of_the_process_interrupts_and_the_next_goes_on(desk: Desk) -> None:
    jobs = desk.open()
    (first, second) = jobs.submit(ask("sleep 60"), ask("b"))
    wait(lambda: running(jobs, first), "its first step")
    desk.close()
    jobs = desk.open()
    assert ended(jobs, second)[0].status == "done"
    (interrupted,) = standing(jobs, first)
    assert interrupted.status == "interrupted" and "was ended" in (interrupted.reason or "")
    assert jobs.retry(first.id) is not None and jobs.cancel(first.id) is not None


def test_one_process_has_a_folder(desk: Desk) -> None:
    desk.open(start=False)
    with pytest.raises(OutputError, match="another `kinora ui` works on"):
        desk.open(start=False)
    desk.close()
    desk.open(start=False)


def test_removing_takes_the_files_with_it(desk: Desk) -> None:
    jobs = desk.open()
    kept, gone, busy = jobs.submit(ask("a"), ask("a"), ask("sleep 60"))
    ended(jobs, kept, gone)
    wait(lambda: running(jobs, busy), "its first step")
    assert not jobs.remove(busy.id), "it is being made"
    files = jobs.files(gone)
    assert jobs.remove(gone.id) and not jobs.remove(gone.id)
    assert not any(it.exists() for it in files) and jobs.get(gone.id) is None
    assert len(jobs.files(kept)) == 2


def test_a_full_disk_holds_the_line_and_loses_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "_HOLD_S", 0.5)
    jobs = desk.open()
    first, second = jobs.submit(ask("disk"), ask("b"))
    held = why_held(jobs)
    assert "the disk is full" in held and "tried again" in held
    waiting = ["queued", "queued"]
    wait(lambda: [it.status for it in standing(jobs, first, second)] == waiting, "that both wait")
    (desk.folder.parent / "freed").touch()
    done = ended(jobs, first, second)
    assert [(it.status, it.attempt) for it in done] == [("done", 1), ("done", 1)]
    assert jobs.held is None


def test_a_full_disk_refuses_new_jobs_and_settles_finished_ones_later(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the store itself is full: SQLite is given no further page."""
    monkeypatch.setattr(line, "_HOLD_S", 0.5)
    jobs = desk.open(start=False)
    made = jobs.submit(ask("a"), ask("b"))
    end, full = store.Store.end, threading.Event()
    full.set()

    def failing(self: store.Store, *given: object) -> None:
        if full.is_set():
            raise OutputError("database or disk is full")
        end(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(store.Store, "end", failing)
    jobs.start()
    assert "disk is full" in why_held(jobs)
    full.clear()
    assert [(it.status, it.attempt) for it in ended(jobs, *made)] == [("done", 1)] * 2
    with closing(sqlite3.connect(desk.folder / ".kinora-jobs/jobs.sqlite")) as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
    jobs._store._connection.execute(f"PRAGMA max_page_count = {pages}")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(OutputError, match="full"):
        jobs.submit(*(ask("a long prompt " * 1_400, seed=it) for it in range(20)))
    assert len(jobs.jobs()) == 2, "all or none"


def test_a_worker_that_does_not_start_is_tried_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "_HOLD_S", 0.2)
    desk.make = Dumb
    jobs = desk.open()
    (job,) = jobs.submit(ask("a"))
    held = why_held(jobs)
    assert "does not start" in held and "no licence" in held
    assert standing(jobs, job)[0].status == "queued"


def test_two_hundred_at_once(desk: Desk) -> None:
    jobs = desk.open()
    with ThreadPoolExecutor(40) as threads:
        made = [
            it
            for each in threads.map(lambda k: jobs.submit(ask("a", seed=k)), range(200))
            for it in each
        ]
    assert len({it.id for it in made}) == 200 == len({it.place for it in made})
    done = ended(jobs, *made)
    assert {(it.status, it.attempt) for it in done} == {("done", 1)}
    contents = {jobs.media(it).read_bytes() for it in done}
    assert len(contents) == 200


def test_the_line_has_an_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_QUEUED", 2)
    jobs = desk.open(start=False)
    jobs.submit(ask("a"))
    with pytest.raises(BusyError, match="1 jobs wait already, 2 are the most"):
        jobs.submit(ask("b", num_videos=2))


def test_what_a_killed_process_left_in_the_scratch_folder_is_removed(desk: Desk) -> None:
    jobs = desk.open(start=False)
    with jobs.scratch() as folder:
        (folder / "upload").write_text("of somebody")
        kept = shutil.copytree(folder, desk.folder / "kept")
    assert not folder.exists()
    shutil.copytree(kept, folder)
    with jobs.scratch() as again:
        assert again == folder and not list(again.iterdir())
        assert again.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("kind", "told"),
    [("link", "a symbolic link"), ("dangling", "a symbolic link"), ("file", "no folder")],
)
@pytest.mark.parametrize("place", [".kinora-jobs", ".kinora-jobs/scratch"])
def test_what_stands_in_place_of_a_folder_is_told_and_left(
    desk: Desk, tmp_path: Path, place: str, kind: str, told: str
) -> None:
    path, victim = desk.folder / place, tmp_path / "victim"
    path.parent.mkdir(parents=True)
    (victim / "scratch").mkdir(parents=True)
    (victim / "scratch" / "precious").touch()
    if kind == "file":
        path.touch()
    else:
        path.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    with pytest.raises(OutputError) as raised, desk.open(start=False).scratch():
        raise AssertionError
    assert str(raised.value) == (
        f"{path} is {told}, where Kinora keeps a folder of its own: "
        "move it away, or choose another --output"
    )
    assert [it.relative_to(victim) for it in victim.rglob("*")] == [
        Path("scratch"), Path("scratch/precious"),
    ]  # fmt: skip
    assert not (tmp_path / "nothing").exists() and os.path.lexists(path)


def test_a_store_of_somebody_else_is_one_line(desk: Desk) -> None:
    hidden = desk.folder / ".kinora-jobs"
    hidden.mkdir(parents=True)
    (hidden / "jobs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match="cannot be used: file is not a database"):
        desk.open()
    (hidden / "jobs.sqlite").unlink()
    desk.open(start=False)
    desk.close()
    with closing(sqlite3.connect(hidden / "jobs.sqlite")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(OutputError, match="newer Kinora"):
        desk.open()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        Jobs(tmp_path / "file" / "out")
