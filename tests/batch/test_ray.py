"""Rows made by actors of a Ray cluster on this machine; what dies there is started again."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
from placing import Place
from standin import StandIn

from kinora.pipelines.batch import run
from kinora.pipelines.batch.report import Standing, Summary
from kinora.pipelines.errors import Cancelled, KinoraError, RequestError

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)


@pytest.fixture(scope="module")
def cluster() -> Generator[Any, None, None]:
    """One of four CPUs, as it were."""
    ray: Any = importlib.import_module("ray")
    # Where `standin` is, beside what this process imports from.
    paths = os.pathsep.join(
        filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    )
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             runtime_env={"env_vars": {"PYTHONPATH": paths}})  # fmt: skip
    yield ray
    ray.shutdown()


def actors() -> list[psutil.Process]:
    """Processes of workers that are at work."""
    found: list[psutil.Process] = []
    for it in psutil.Process().children(recursive=True):
        try:
            if it.name().startswith("ray::Actor") or "ray::Actor" in " ".join(it.cmdline()):
                found.append(it)
        except psutil.Error:
            continue
    return found


@pytest.mark.long
@with_ray
@pytest.mark.usefixtures("cluster")
def test_rows_that_fail_crash_and_flake(place: Place) -> None:
    place.write("a", "boom b", "c", "kill d", "flaky e", "nan f", "g")
    summary = place.run(engine="ray", workers=2, retries=1)
    assert (summary.done, summary.failed, summary.workers) == (4, 3, 2)
    reasons = {it["kind"]: it["reason"] for it in place.statuses() if it["status"] == "failed"}
    assert set(reasons) == {"ZeroDivisionError", "WorkerCrash", "GenerationError"}
    assert place.strays() == [it for it in place.strays() if it.endswith(".latents.safetensors")]
    assert place.standings


@pytest.mark.long
@with_ray
@pytest.mark.usefixtures("cluster")
def test_a_broken_accelerator_fails_no_later_row(place: Place) -> None:
    place.write("a", "sticky once b", "c", "d", "e")
    summary = place.run(engine="ray")
    assert summary.complete and (summary.done, summary.retried) == (5, 1)
    told = "worker 0 is started again: the worker ended: its accelerator answers no more"
    assert [it.text for it in place.notices] == [told]


@pytest.mark.long
@with_ray
def test_a_busy_cluster_is_told_of(
    place: Place, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = importlib.import_module("kinora.pipelines.batch.engines.ray")
    monkeypatch.setattr(engine, "_LATE_S", 1.0)

    class Other:
        def here(self) -> None:
            """It has its processors."""

    other = cluster.remote(num_cpus=4)(Other).remote()
    cluster.get(other.here.remote())
    freed = threading.Timer(4.0, cluster.kill, [other])
    freed.start()
    place.write("a")
    assert place.run(engine="ray").done == 1
    freed.join()
    told = "worker 0 has not started for 1 s: Ray starts it once a CPU is free, which"
    assert [it.text.startswith(told) for it in place.notices] == [True]


@pytest.mark.long
@with_ray
@pytest.mark.usefixtures("cluster")
def test_as_without_ray_and_again_there_is_nothing_left(place: Place) -> None:
    place.write(*(f"row {i}" for i in range(6)))
    assert place.run(engine="ray", workers=3).done == 6
    made = place.made()
    assert place.run(engine="ray", workers=3).before == 6
    place.output = place.root / "local"
    place.run()
    assert place.made() == made


@pytest.mark.long
@with_ray
@pytest.mark.usefixtures("cluster")
def test_workers_killed_in_the_middle(place: Place) -> None:
    place.write(*(f"sleep 0.4 row {i}" for i in range(24)))
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 60
        while len(killed) < 4 and time.monotonic() < end:
            time.sleep(1.0)
            if len(list(place.output.glob("*.mp4"))) > 2 * len(killed) and (found := actors()):
                found[0].send_signal(signal.SIGKILL)
                killed.append(found[0].pid)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = place.run(engine="ray", workers=3, retries=20)
    killer.join()
    assert killed and summary.done == 24 and summary.failed == 0
    assert place.strays() == []
    done = [it["id"] for it in place.statuses() if it["status"] == "done"]
    assert len(done) == len(set(done)) == 24
    interrupted = place.made()
    place.output = place.root / "whole"
    place.run()
    assert place.made() == interrupted


@pytest.mark.long
@with_ray
@pytest.mark.usefixtures("cluster")
def test_it_stops_within_a_step(place: Place) -> None:
    place.write(*(f"sleep 30 row {i}" for i in range(4)))
    stop = threading.Event()
    events = run(place.prepare(engine="ray", workers=2), make=StandIn, stop=stop)
    began = time.monotonic()
    with pytest.raises(Cancelled):
        for event in events:
            assert not isinstance(event, Summary)
            if isinstance(event, Standing) and event.workers:
                stop.set()
    assert time.monotonic() - began < 25
    assert [it.name for it in place.output.iterdir()] == ["rows.jsonl"]


@pytest.mark.slow
@with_ray
@pytest.mark.usefixtures("cluster")
def test_real_videos_are_those_of_a_single_process(wan_folder: Path, place: Place) -> None:
    from kinora.pipelines.batch.making import Studio

    place.write("a red circle", "a blue circle", "a black square")
    defaults = {"model": str(wan_folder), "width": 32, "height": 32, "frames": 5, "steps": 2}

    def hashes() -> dict[str, str]:
        records = [json.loads(it.read_text()) for it in place.output.glob("*.json")]
        return {it["request"]["prompt"]: it["frames_sha256"] for it in records}

    assert place.run(make=Studio, engine="ray", workers=2, defaults=defaults).done == 3
    shared = hashes()
    place.output = place.root / "local"
    place.run(make=Studio, defaults=defaults)
    assert hashes() == shared


@pytest.mark.slow
@with_ray
def test_the_parent_is_killed(place: Place) -> None:
    place.write(*(f"sleep 0.5 row {i}" for i in range(12)))
    here = Path(__file__).parent
    command = [sys.executable, str(here / "parent.py"), str(place.manifest), str(place.output), "2",
               "ray"]  # fmt: skip
    paths = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    start: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": paths}}
    with subprocess.Popen(command, **start) as process:
        end = time.monotonic() + 60
        while len(list(place.output.glob("*.mp4"))) < 4:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    assert len(list(place.output.glob("*.mp4"))) < 12
    assert subprocess.run(command, **start).returncode == 0
    assert len(place.made()) == 12
    assert place.strays() == [], "actors of the one that was killed have ended"


@pytest.mark.long
@with_ray
def test_sigterm_is_for_the_caller_to_answer(place: Place) -> None:
    """Ray's own handler would print a trace of the stack, and have the process abort in 3 s."""
    place.write("sleep 60 row")
    code = (
        "import signal, sys, threading\n"
        "from pathlib import Path\n"
        "from standin import StandIn\n"
        "from kinora.pipelines.batch import Options, prepare, run\n"
        "from kinora.pipelines.errors import Cancelled\n"
        "stop = threading.Event()\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
        "options = Options(Path(sys.argv[1]), Path(sys.argv[2]), {}, device='cpu', engine='ray')\n"
        "try:\n"
        "    for _ in run(prepare(options, lambda _: None), make=StandIn, stop=stop): pass\n"
        "except Cancelled:\n"
        "    sys.exit(10 + signal.alarm(0))\n"
    )
    here = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", code, str(place.manifest), str(place.output)]
    start: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": paths}, "text": True}
    told = place.root / "log"
    with told.open("w") as log, subprocess.Popen(command, stderr=log, **start) as process:
        end = time.monotonic() + 120
        while not list(place.output.glob(".kinora-batch/*/worker-*/*")):
            assert process.poll() is None and time.monotonic() < end, told.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 10, told.read_text()
    assert "SIGTERM received" not in told.read_text()


@with_ray
@pytest.mark.usefixtures("cluster")
def test_more_than_the_cluster_has(place: Place) -> None:
    place.write(*"abcdefgh")
    with pytest.raises(RequestError, match="--workers is 5, and this cluster of Ray has 4 CPUs"):
        place.run(engine="ray", workers=5)
    with pytest.raises(RequestError, match="there is no GPU in this cluster"):
        place.run(engine="ray", workers=None, device="cuda")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"engine": "ray", "device": "cuda:1"}, "can be auto, cuda or cpu"),
        ({"address": "head:6379"}, "--address is of --engine ray"),
    ],
)
def test_options_that_do_not_go_together(
    place: Place, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    place.write("a")
    monkeypatch.setitem(sys.modules, "ray", sys)  # asked for before anything is
    with pytest.raises(KinoraError, match=told):
        place.prepare(**options)


def test_without_ray_it_says_what_to_install(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("a")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r'pip install --editable "\.\[ray\]"'):
        place.prepare(engine="ray")
    assert not place.output.exists()
