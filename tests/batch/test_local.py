"""The `local` engine with a stand-in for models: failures, crashes, retries, ends, full disks."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from killing import workers_of
from placing import Place
from standin import Dumb, StandIn

from kinora.pipelines.batch import run
from kinora.pipelines.batch.engines.local import devices
from kinora.pipelines.batch.making import refusal
from kinora.pipelines.batch.report import Summary, status
from kinora.pipelines.errors import GenerationError, ManifestError, RequestError


def test_rows_are_made_once_and_then_found(place: Place) -> None:
    place.write("a", "b", "c")
    summary = place.run()
    assert summary.complete and (summary.done, summary.workers) == (3, 1)
    assert summary.stages_s == {"denoise": 0.75}
    assert [(it["status"], it["attempt"]) for it in place.statuses()] == [("done", 1)] * 3
    before = place.made()
    assert len(before) == 3 and place.strays() == []
    again = place.run()
    assert again.complete and (again.before, again.done, again.workers) == (3, 0, 0)
    assert place.made() == before and len(place.statuses()) == 3


def test_results_do_not_depend_on_workers_order_or_shards(place: Place) -> None:
    prompts = [f"row {i} sleep 0.02" for i in range(12)]
    place.write(*prompts)
    place.run()
    expected = place.made()
    place.write(*reversed(prompts))
    place.output = place.root / "three"
    place.run(workers=3)
    assert place.made() == expected
    place.output = place.root / "shards"
    for number in (2, 1):
        place.run(shard=(number, 2))
    assert place.made() == expected and status(place.output).left == 0


def test_a_failing_row_stops_no_other_and_says_why(place: Place) -> None:
    # The one that fails once is far from those that end their worker: beside them it might be lost
    # after it has failed, which counts for nothing.
    place.write("flaky a", "b", "boom c", "nan d", "segv e", "kill f", "g")
    summary = place.run(workers=2)
    assert not summary.complete and (summary.done, summary.failed, summary.left) == (3, 4, 0)
    reasons = {it.line: it.reason for it in summary.failures}
    assert reasons[3] == "ZeroDivisionError: by zero"
    assert reasons[5] == "the worker process was ended by SIGSEGV (a last word)"
    assert reasons[6].startswith("the worker process was ended by SIGKILL, as by a system that is")
    assert summary.kinds == {"ZeroDivisionError": 1, "GenerationError": 1, "WorkerCrash": 2}
    tries = [(it["line"], it["attempt"]) for it in place.statuses() if it["status"] != "retried"]
    assert sorted(tries) == [(1, 2), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2), (7, 1)]
    kept = next(it for it in place.statuses() if it["line"] == 4 and it["status"] == "failed")
    assert place.strays() == [kept["latents"]] and str(place.output / kept["latents"]) in reasons[4]
    # Failed rows are tried again by the next run, and no others.
    again = place.run(retries=0)
    assert (again.before, again.failed, again.retried) == (3, 4, 0)


def test_no_retries_is_one_attempt(place: Place) -> None:
    place.write("flaky a")
    assert place.run(retries=0).failed == 1
    assert place.run(retries=0).done == 1


def test_a_row_that_brings_its_worker_down_takes_no_other_with_it(place: Place) -> None:
    # Two rows are in a worker at a time: whoever is beside the bad one is made again, and pays not.
    place.write(*(f"good {i}" for i in range(4)), "segv bad", *(f"good {i}" for i in range(4, 8)))
    summary = place.run(retries=0)
    assert (summary.done, summary.failed) == (8, 1)
    assert all(it["attempt"] == 1 for it in place.statuses())


def test_a_broken_accelerator_fails_no_later_row(place: Place) -> None:
    # Every call in that process fails from then on: the others are made by the next one.
    place.write("a", "sticky once b", "c", "d", "e")
    summary = place.run()
    assert summary.complete and (summary.done, summary.retried) == (5, 1)
    (retried,) = [it for it in place.statuses() if it["status"] == "retried"]
    assert (retried["line"], retried["attempt"], retried["kind"]) == (2, 1, "GenerationError")
    assert "CUDA error: an illegal memory access" in retried["reason"]
    attempts = {it["line"]: it["attempt"] for it in place.statuses() if it["status"] == "done"}
    assert attempts == {1: 1, 2: 2, 3: 1, 4: 1, 5: 1}
    told = "worker 0 is started again: its accelerator answers no more"
    assert [it.text for it in place.notices] == [told]


def test_a_row_that_breaks_each_accelerator_fails_alone(place: Place) -> None:
    place.write("a", "sticky b", "c", "memory d", "e")
    summary = place.run(retries=2)
    assert (summary.done, summary.failed, summary.left) == (3, 2, 0)
    reasons = {it.line: it.reason for it in summary.failures}
    assert "illegal memory access" in reasons[2] and "out of memory" in reasons[4]
    tries = [(it["line"], it["attempt"]) for it in place.statuses() if it["status"] != "retried"]
    assert sorted(tries) == [(1, 1), (2, 3), (3, 1), (4, 3), (5, 1)]


def test_a_worker_that_does_not_start_is_an_error(place: Place) -> None:
    place.write("a")
    with pytest.raises(GenerationError, match=r"worker 0 does not start: .*exit status 1"):
        place.run(make=Dumb)
    assert place.strays() == []


def test_a_full_disk_ends_the_batch_and_what_is_done_stays(place: Place) -> None:
    place.write("a", "b", "disk c", *(f"sleep 0.1 {i}" for i in range(100)))
    summary = place.run(workers=2)
    assert summary.blocked is not None and "the disk is full" in summary.blocked
    assert not summary.complete and summary.failed == 0 and summary.left > 50
    assert place.strays() == [] and summary.done == len(place.made())
    before = place.made()
    (place.root / "freed").touch()
    place.manifest.write_text("a\nb\ndisk c\n")
    assert place.run().complete
    assert before.items() <= place.made().items() and status(place.output).done == 3


def test_a_status_that_cannot_be_written_ends_the_batch(place: Place) -> None:
    place.write("a", *(f"sleep 5 {i}" for i in range(4)))
    place.output.mkdir()
    (place.output / ".keep").touch()
    batch = place.prepare()
    events = run(batch, make=StandIn)
    (place.output / "status.jsonl").mkdir()
    *_, summary = events
    assert isinstance(summary, Summary) and summary.blocked is not None
    assert "status.jsonl" in summary.blocked or "not writable" in summary.blocked
    (place.output / "status.jsonl").rmdir()
    assert place.prepare().before >= 1, "the video itself is done"


def test_closing_stops_within_a_step_and_leaves_nothing(place: Place) -> None:
    place.write("a", *(f"sleep 20 {i}" for i in range(4)))
    events = run(place.prepare(workers=2), make=StandIn)
    for event in events:
        if getattr(event, "workers", ()):
            break
    workers = workers_of(os.getpid())
    assert len(workers) == 2
    began = time.monotonic()
    events.close()
    assert time.monotonic() - began < 15
    assert not any(it.is_running() for it in workers)
    assert place.strays() == [] and status(place.output).failed == 0
    place.write("a")
    assert place.run().complete


def test_progress_counts_by_work(place: Place) -> None:
    place.write(*(f"sleep 0.5 {i}" for i in range(4)))
    place.run()
    assert place.standings[-1].rows == 4
    shares = [it.eta_s for it in place.standings if it.eta_s is not None]
    assert shares and all(0 <= it < 30 for it in shares) and shares[-1] < 1


def test_rows_that_cannot_run_start_nothing_unless_told(place: Place) -> None:
    place.manifest = place.root / "rows.jsonl"
    good, bad = json.dumps({"prompt": "a"}), '{"prompt": "b", "steps": "many"}'
    place.manifest.write_text(f"{good}\n{bad}\n{{\n")
    with pytest.raises(ManifestError, match=r"line 2: steps.*; 1 more row cannot") as it:
        place.run()
    assert "--keep-going runs the others" in str(it.value) and not place.output.exists()
    summary = place.run(keep_going=True)
    assert (summary.done, summary.refused, summary.complete) == (1, 2, False)


@pytest.mark.parametrize("short", [0, 1])
def test_a_row_of_too_few_steps_leaves_the_others_of_its_recipe(place: Place, short: int) -> None:
    place.manifest = place.root / "rows.jsonl"
    rows = [{"prompt": "a", "steps": 8}, {"prompt": "b", "steps": 12}]
    place.manifest.write_text("".join(f"{json.dumps(it)}\n" for it in rows[:: 1 - 2 * short]))
    asked: dict[str, Any] = {"defaults": {"recipe": "fast"}, "refuses": refusal}
    told = f"line {short + 1}: .*this run has 8.*; nothing was started"
    with pytest.raises(ManifestError, match=told) as it:
        place.prepare(**asked).check()
    assert "more row" not in str(it.value)
    batch = place.prepare(**asked, keep_going=True)
    assert [(it.line, it.rows) for it in batch.refused] == [(short + 1, 1)]
    assert len(batch.pending) == 1


def test_a_worker_killed_from_outside_is_replaced(place: Place) -> None:
    place.write(*(f"sleep 0.3 {i}" for i in range(6)))
    events = run(place.prepare(retries=3), make=StandIn)
    killed = 0
    last: Any = None
    for last in events:
        if killed < 3 and getattr(last, "workers", ()) and (found := workers_of(os.getpid())):
            found[0].send_signal(signal.SIGKILL)
            killed += 1
    assert isinstance(last, Summary) and last.complete and killed == 3
    assert len(place.made()) == 6 and place.strays() == []


def test_devices_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cores = len(os.sched_getaffinity(0))
    assert devices("cpu", None, 9) == (("cpu",), None)
    assert devices("cpu", 4, 3) == (("cpu",) * 3, max(1, cores // 3)), "no more than rows"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices("auto", None, 9) == (("cuda:0", "cuda:1"), None)
    assert devices("cuda", 4, 9)[0] == ("cuda:0", "cuda:1", "cuda:0", "cuda:1")
    assert devices("cuda:1", None, 9)[0] == ("cuda:1",)
    for device in ("cuda:2", "mps", "tpu"):
        with pytest.raises(RequestError, match=f"no device {device} here: choose from cpu, cuda:0"):
            devices(device, None, 9)


def test_the_log_of_a_worker_does_not_outlive_it(place: Place) -> None:
    place.write("segv a")
    place.run(retries=0)
    assert not list(Path(place.output).glob(".kinora-batch*"))
