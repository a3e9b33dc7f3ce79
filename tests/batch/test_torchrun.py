"""Ranks of torchrun share the rows of one folder, and say together how it ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from killing import workers_of
from placing import Place

from kinora.pipelines.batch.report import status
from kinora.pipelines.errors import RequestError
from kinora.pipelines.generate import generate
from kinora.pipelines.models import Shelf
from kinora.pipelines.request import Request
from kinora.pipelines.run import Run

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.long
def test_two_ranks_make_all_rows_once(wan_folder: Path, tmp_path: Path) -> None:
    manifest, output = tmp_path / "rows.jsonl", tmp_path / "out"
    rows: list[dict[str, object]] = [
        {"prompt": f"a {it} circle"} for it in ("red", "blue", "black")
    ]
    # Refused by the worker: one rank's failure is that of both, once both have made theirs.
    rows.append({"prompt": "a", "recipe": "balanced", "strict": True})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = [*TORCHRUN, *command(wan_folder, manifest, output, "--engine", "torchrun")]
    failed = subprocess.run(start, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    found = status(output)
    assert (found.done, found.failed, found.left) == (3, 1, 0)
    assert counts(failed.stdout) == ["2 rows: 1 done, 1 failed", "2 rows: 2 done"]


def counts(told: str) -> list[str]:
    """What the ranks that tell have made."""
    return sorted(it for it in told.splitlines() if re.match(r"\d+ rows?: ", it))


def test_parts_of_ranks_within_parts_of_an_array(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write(*(f"row {i}" for i in range(10)))
    found: list[int] = []
    for shard in (1, 2):
        for rank in range(3):
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
                monkeypatch.setenv(name, str(value))
            batch = place.prepare(engine="torchrun", shard=(shard, 2))
            assert batch.options.workers == 1
            found += batch.pending
    assert sorted(found) == list(range(10))
    with pytest.raises(RequestError, match="each rank is one worker"):
        place.prepare(engine="torchrun", workers=2)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RequestError, match="finds no WORLD_SIZE in the environment"):
        place.prepare(engine="torchrun")


def made(output: Path) -> dict[str, str]:
    """Hashes of the frames, by prompt."""
    records = [json.loads(it.read_text()) for it in output.glob("*.json")]
    return {it["request"]["prompt"]: it["frames_sha256"] for it in records}


def alone(wan_folder: Path, folder: Path, prompts: list[str]) -> dict[str, str]:
    """The same hashes, of videos that this process makes."""
    shelf, found = Shelf(), dict[str, str]()
    for prompt in prompts:
        request = Request(prompt=prompt, model=str(wan_folder), width=32, height=32, frames=5,
                          steps=3, device="cpu", output=f"{folder}/alone/")  # fmt: skip
        *_, run = generate(request, shelf=shelf)
        assert isinstance(run, Run)
        found[prompt] = str(run.outputs[0].frames_sha256)
    return found


def command(wan_folder: Path, manifest: Path, output: Path, *more: str) -> list[str]:
    return ["-m", "kinora.app", "batch", str(manifest), "--model", str(wan_folder), "--size",
            "32x32", "--frames", "5", "--steps", "3", "--device", "cpu", "--output", str(output),
            *more]  # fmt: skip


SHARED = ("--engine", "torchrun", "--set", "parallel.ulysses=2")


@pytest.mark.long
@pytest.mark.parametrize("pairs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_pairs_of_ranks_make_what_one_process_makes(
    wan_folder: Path, tmp_path: Path, pairs: int
) -> None:
    prompts = [f"a {it} circle" for it in ("red", "blue", "black")]
    manifest, shared = tmp_path / "prompts.txt", tmp_path / "shared"
    manifest.write_text("\n".join(prompts))
    start = [*TORCHRUN[:-1], str(2 * pairs)]
    done = subprocess.run(
        [*start, *command(wan_folder, manifest, shared, *SHARED)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert made(shared) == alone(wan_folder, tmp_path, prompts)
    each = [["3 rows: 3 done"], ["1 row: 1 done", "2 rows: 2 done"]]
    assert counts(done.stdout) == each[pairs - 1], "one of each pair tells"
    records = [json.loads(it.read_text()) for it in shared.glob("*.json")]
    assert all(it["receipt"]["processes"] == 2 for it in records)


@pytest.mark.slow
def test_any_process_of_a_pair_is_killed(wan_folder: Path, tmp_path: Path) -> None:
    """The worker that leads, and the one that follows: the row is made again by both."""
    manifest = tmp_path / "prompts.txt"
    colours = ("red", "blue", "black", "red red", "blue blue", "black black")
    manifest.write_text("".join(f"a {it} circle\n" for it in colours))
    output = tmp_path / "out"
    more = (*SHARED, "--retries", "20")
    told = tmp_path / "log"
    start = [*TORCHRUN, *command(wan_folder, manifest, output, *more)]
    with told.open("w") as log, subprocess.Popen(start, stdout=log, stderr=log) as process:
        killed: list[int] = []
        for rank in (0, 1):
            end = time.monotonic() + 60
            wanted = len(list(output.glob("*.mp4"))) + 1
            while len(list(output.glob("*.mp4"))) < wanted:
                assert process.poll() is None and time.monotonic() < end, told.read_text()
                time.sleep(0.05)
            ranks = [it for it in psutil.Process(process.pid).children() if it.is_running()]
            workers = [
                worker
                for it in ranks
                if it.environ().get("RANK") == str(rank)
                for worker in workers_of(it.pid)
            ]
            for worker in workers:
                worker.kill()
                killed.append(rank)
        assert process.wait(240) == 0, told.read_text()
    assert set(killed) == {0, 1}
    assert len(made(output)) == len(colours)
    names = {it.suffix for it in output.iterdir()}
    assert names == {".json", ".jsonl", ".mp4"}


def test_processes_that_do_not_fit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("a")
    shared = {"parallel": {"ulysses": 2}}
    with pytest.raises(RequestError, match=r"2 processes a video: use torchrun"):
        place.prepare(defaults={"recipe": shared})
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 3)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RequestError, match="3 are running: start a multiple of 2"):
        place.prepare(engine="torchrun", defaults={"recipe": shared})
    place.manifest = place.root / "rows.jsonl"
    place.manifest.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "b", "recipe": shared}))
    with pytest.raises(RequestError, match="rows ask for 1 and 2 processes"):
        place.prepare()
