"""Several processes make one video, and write it once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kinora.pipelines.errors import KinoraError, RequestError
from kinora.pipelines.planning import plan
from kinora.pipelines.request import Request
from kinora.pipelines.together import seat

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PARALLEL = {"parallel": {"ulysses": 2}}


def generated(wan_folder: Path, output: Path, *more: str) -> tuple[dict[str, str], str]:
    """The sidecar of what the command makes, and what it prints."""
    command = ["-m", "kinora.app", "generate", "a red circle", "--model", str(wan_folder), "--size",
               "32x32", "--frames", "5", "--steps", "2", "--device", "cpu", "--output",
               str(output)]  # fmt: skip
    start = TORCHRUN if more else (sys.executable,)
    done = subprocess.run([*start, *command, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.with_suffix(".json").read_text()), done.stdout


@pytest.mark.long
def test_two_processes_write_one_video(wan_folder: Path, tmp_path: Path) -> None:
    alone, _ = generated(wan_folder, tmp_path / "alone" / "video.mp4")
    shared, told = generated(
        wan_folder, tmp_path / "shared" / "video.mp4", "--set", "parallel.ulysses=2"
    )
    assert shared["frames_sha256"] == alone["frames_sha256"]
    assert "made by 2 processes together" in told and told.count("video.mp4") == 1
    names = sorted(it.name for it in (tmp_path / "shared").iterdir())
    assert names == ["video.json", "video.mp4"]


def test_as_many_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seat({}) is None and seat({"parallel": {"ulysses": 1}}) is None
    with pytest.raises(RequestError, match=r"this is one alone: .*--nproc-per-node 2"):
        seat(PARALLEL)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RequestError, match=r"4 are running: .* kinora batch --engine torchrun"):
        seat(PARALLEL)
    found = seat({"parallel": {"ulysses": 2, "cfg": 2}})
    assert found is not None and found.rank == 3 and not found.leads


def test_it_is_planned(wan_folder: Path) -> None:
    def planned(ulysses: int) -> tuple[str, str]:
        recipe = {"parallel": {"ulysses": ulysses}}
        asked = Request(prompt="a", model=str(wan_folder), recipe=recipe, device="cpu")
        parts = [it for it in plan(asked).parts if it.part == "parallel"]
        return parts[0].verdict, parts[0].why

    assert planned(2)[0] == "ok"
    verdict, why = planned(7)
    assert verdict == "refused" and "does not divide" in why
    with pytest.raises(KinoraError, match=r"parallel\.cfg must be a whole number from 1 to 2"):
        plan(Request(prompt="a", model=str(wan_folder), recipe={"parallel": {"cfg": 3}}))
