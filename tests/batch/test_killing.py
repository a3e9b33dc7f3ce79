"""Whatever is killed and whenever: each row is done once, as without, and nothing is left over."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from killing import actors_of, run_killed, workers_of
from placing import Place
from standin import Cramped

from kinora.pipelines.batch.making import Studio
from kinora.pipelines.batch.report import status
from kinora.pipelines.batch.store import Store

HERE = Path(__file__).parent
KINORA = (sys.executable, "-m", "kinora.app")
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)


@pytest.mark.long
def test_kills_of_parents_and_workers_change_nothing(place: Place) -> None:
    place.write(*(f"sleep 0.3 row {i}" for i in range(12)))
    command = [sys.executable, str(HERE / "parent.py"), str(place.manifest), str(place.output), "2"]
    kills = run_killed(command, 6, (0.4, 1.2), seed=1, log=place.root / "log")
    assert kills.parents and kills.workers
    assert status(place.output).done == 12 and place.strays() == []
    interrupted = place.made()
    place.output = place.root / "whole"
    place.run(workers=2)
    assert place.made() == interrupted


def test_workers_end_themselves_when_the_parent_is_killed(place: Place) -> None:
    place.write(*(f"sleep 60 row {i}" for i in range(4)))
    command = [sys.executable, str(HERE / "parent.py"), str(place.manifest), str(place.output), "2"]
    with subprocess.Popen(command) as process:
        end = time.monotonic() + 30
        while len(list(place.output.glob(".kinora-batch/*/worker-*/*"))) < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        workers = workers_of(process.pid)
        process.kill()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=15)[1]
    assert place.strays() == [], "the last one takes the drafts with it"


@pytest.mark.long
def test_a_full_disk_and_then_room_again(wan_folder: Path, place: Place) -> None:
    """The sidecar of a real video finds no room."""
    place.write("a red circle", "a blue square")
    defaults = {"model": str(wan_folder), "width": 32, "height": 32, "frames": 5, "steps": 2}
    full = place.run(make=Cramped, defaults=defaults)
    assert full.blocked is not None and "the disk is full" in full.blocked
    assert (full.done, full.failed, full.left) == (0, 0, 2)
    left = {it.name for it in place.output.iterdir()}
    kept = {it for it in left if it.endswith(".latents.safetensors")}
    assert left - kept == {"rows.jsonl"}, "latents are no draft: they can be decoded"
    assert place.run(make=Studio, defaults=defaults).complete
    names = sorted(it.suffix for it in place.output.iterdir())
    assert names == [".json", ".json", ".jsonl", ".jsonl", ".mp4", ".mp4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kills"),
    [("local", 50), pytest.param("ray", 50, marks=with_ray)],
    ids=["fifty-local", "fifty-ray"],
)
def test_kills_over_forty_rows_of_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, kills: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as an actor of Ray with one CPU has it
    manifest, killed = tmp_path / "prompts.txt", tmp_path / "killed"
    colours = ("red", "blue", "green", "yellow")
    manifest.write_text("".join(f"a {it} circle moving left\n" for it in colours))

    def command(output: Path, *more: str) -> list[str]:
        return [*KINORA, "batch", str(manifest), "--seeds", "0-9", "--size", "64x64", "--frames",
                "9", "--steps", "4", "--device", "cpu", "--workers", "2", "--retries", "1000",
                "--output", str(output), *more]  # fmt: skip

    def hashes(output: Path) -> dict[str, str]:
        records = [json.loads(it.read_text()) for it in output.glob("*.json")]
        return {f"{it['request']['prompt']} {it['request']['seed']}": it["frames_sha256"]
                for it in records}  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    began = time.monotonic()
    # A cluster that is started takes seconds: few kills are of the parent, which starts it.
    how: dict[str, Any] = (
        {} if engine == "local" else {"workers": actors_of, "parents": {5, 13, 23, 31, 44}}
    )
    again = command(killed, "--engine", engine)
    made = run_killed(again, kills, (1.0, 12.0), seed=0, log=tmp_path / "log", **how)
    print(f"{made} in {time.monotonic() - began:.0f} s")
    assert made.parents and made.workers
    assert len(hashes(tmp_path / "whole")) == 40
    assert hashes(killed) == hashes(tmp_path / "whole")
    suffixes = [it.suffix for it in killed.iterdir()]
    assert sorted(set(suffixes)) == [".json", ".jsonl", ".mp4"] and len(suffixes) == 82
    done = [it["id"] for it in Store(killed).statuses() if it["status"] == "done"]
    assert len(set(done)) == len(done), "no row is said to be done twice"


@pytest.mark.slow
def test_ten_thousand_rows_over_sixteen_workers(place: Place) -> None:
    rows, workers, sleep_s = 10_000, 16, 0.25
    began = time.perf_counter()
    place.write(*(f"sleep {sleep_s} row {i}" for i in range(rows)))
    batch = place.prepare(workers=workers)
    prepared_s = time.perf_counter() - began
    from standin import StandIn

    from kinora.pipelines.batch import run

    process, peaks, first_s, last_s = psutil.Process(), list[int](), None, 0.0
    last: Any = None
    for last in run(batch, make=StandIn):
        now = time.perf_counter()
        if getattr(last, "status", None) == "done":
            first_s = first_s or now - sleep_s
            last_s = now
            if len(peaks) <= last_s - first_s:  # once a second
                peaks.append(process.memory_info().rss)
    assert first_s is not None and last.complete and last.done == rows
    ideal_s = rows * sleep_s / workers
    cost = (last_s - first_s) / ideal_s - 1
    began = time.perf_counter()
    again = place.run(workers=workers)
    resume_s = time.perf_counter() - began
    grown = (peaks[-1] - peaks[len(peaks) // 5]) / 1e6
    print(f"prepared in {prepared_s:.2f} s")
    print(f"{last_s - first_s:.1f} s for {ideal_s:.1f} s of work, {cost:.2%} above")
    print(f"parent {peaks[0] / 1e6:.0f} to {peaks[-1] / 1e6:.0f} MB, the last 4/5 {grown:+.1f} MB")
    print(f"resumed in {resume_s:.2f} s")
    assert again.before == rows and resume_s < 5
    assert grown < 5
    if (os.cpu_count() or 1) >= workers:  # else the stand-ins wait for cores
        assert cost < 0.02
