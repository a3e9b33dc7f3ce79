"""VBench out of process: a package that stands in for it, and everything that it may do wrong."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kinora.eval.clips import EvalError
from kinora.eval.vbench import client
from kinora.eval.vbench.spec import DIMENSIONS
from kinora.eval.vbench.suite import Step, VBenchReport, evaluate
from kinora.eval.vbench.suites import VBENCH

Film = Callable[..., Path]
PACKAGE = """
import json, os, subprocess, sys, time
from pathlib import Path

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.info, self.out, self.device = full_info_dir, Path(output_path), device

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 mode=None, **kwargs):
        (dimension,) = dimension_list
        with open(os.environ["CALLS"], "a") as file:
            print(json.dumps({
                "dimension": dimension, "mode": mode, "local": local, "prompts": prompt_list,
                "unsafe": os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"), "more": kwargs,
                "ranks": os.environ.get("WORLD_SIZE"),
            }), file=file)
        behaviour = os.environ.get("BEHAVIOUR", "")
        names = sorted(os.listdir(videos_path), reverse=True)
        rows = [{"video_path": f"{videos_path}/{it}", "video_results": 0.5} for it in names]
        result = [0.75, rows]
        if behaviour == "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            Path(os.environ["CALLS"]).with_name("child.txt").write_text(str(child.pid))
            time.sleep(60)
        if behaviour == "crash":
            os._exit(11)
        if behaviour == "exit":
            sys.exit("cannot go on")
        if behaviour == "raise":
            raise ValueError("no\\nweights")
        if behaviour == "broken" and any(
            b"broken" in Path(videos_path, it).read_bytes() for it in names
        ):
            raise ValueError("cannot read a video")
        if behaviour == "silent":
            return
        result = {
            "nan": [float("nan"), rows], "infinite": [float("inf"), rows], "empty": [1.0, []],
            "drop": [0.75, rows[1:]], "odd": "what", "number": [None, rows],
            "stranger": [1.0, [*rows, {"video_path": "x/else.mp4", "video_results": 1}]],
        }.get(behaviour, result)
        text = json.dumps({dimension: result})
        if behaviour == "cut":
            text = text[:20]
        (self.out / f"{name}_eval_results.json").write_text(text)
"""
INFO = [
    {"prompt_en": "a cat", "dimension": ["temporal_flickering", "color", "scene"]},
    {"prompt_en": "a dog", "dimension": ["temporal_flickering"]},
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter in whose environment a stand-in for the package is found, and its calls."""
    site = tmp_path / "site"
    for name, source in (
        ("vbench", PACKAGE),
        ("torchvision", ""),
        (
            "torch",
            "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = str\n",
        ),
    ):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(source)
    (site / "vbench" / "VBench_full_info.json").write_text(json.dumps(INFO))
    calls = tmp_path / "calls.jsonl"
    calls.touch()
    for name, value in {
        "PYTHONPATH": site,
        "CALLS": calls,
        "VBENCH_CACHE_DIR": tmp_path / "weights",
        "TORCH_HOME": tmp_path / "torch",
        client.PYTHON_VARIABLE: sys.executable,
        "TMPDIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("tempfile.tempdir", None)
    return calls


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A complete set for the dimensions of `INFO`, named as VBench does."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for prompt in ("a cat", "a dog"):
        for index in range(5):
            (folder / f"{prompt}-{index}.mp4").write_text(f"{prompt} {index}")
    return folder


def run(videos: Path, *dimensions: str, **options: Any) -> tuple[list[Step], VBenchReport]:
    *steps, found = evaluate([videos], dimensions=dimensions, **options)
    assert isinstance(found, VBenchReport)
    return [it for it in steps if isinstance(it, Step)], found


def calls(package: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in package.read_text().splitlines()]


def test_a_complete_set_is_scored(
    package: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    steps, found = run(videos, "temporal_flickering")
    result = found.results["temporal_flickering"]
    assert (result.status, result.score, found.ok) == ("ok", 0.75, True)
    assert [it.dimension for it in steps] == ["temporal_flickering", None]
    assert result.details["videos"] == result.details["expected"] == 10
    assert result.details["by_video"]["a cat-3.mp4"] == 0.5
    assert list(result.details["by_video"]) == sorted(result.details["by_video"])  # T9
    assert "motion counts as flicker" in result.notes[0]  # T11
    (call,) = calls(package)
    assert call["mode"] == "vbench_standard" and call["local"] is True and call["more"] == {}
    # T4, T9: checkpoints load as they did, and all in one process.
    assert call["unsafe"] == "1" and call["ranks"] is None
    # T3: a total is none with 15 dimensions missing.
    assert found.totals.scores == {"quality": None, "semantic": None, "total": None}
    json.dumps(found.to_json(), allow_nan=False)
    told = found.provenance
    assert told["coverage"] == {"temporal_flickering": "10 of 10"} and told["device"] == "cpu"
    assert {"suite", "version", "prompts_sha256", "seeds", "samplers", "forms", "environment",
            "versions"} <= set(told)  # fmt: skip


@pytest.mark.parametrize("custom", [False, pytest.param(True, marks=pytest.mark.long)])
def test_one_broken_video_costs_no_other(
    package: Path, videos: Path, film: Film, monkeypatch: pytest.MonkeyPatch, custom: bool
) -> None:
    monkeypatch.setenv("BEHAVIOUR", "broken")
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for number, path in enumerate(sorted(videos.iterdir())):
        film(path, frames, path.stem[:-2], number, sidecar=False)
    broken = videos / "a dog-1.mp4"
    broken.write_bytes(b"broken")
    found = run(videos, "temporal_flickering", custom=custom)[1]
    result = found.results["temporal_flickering"]
    assert (result.status, result.score) == ("partial", 0.75)
    assert "9 of 10 videos" in result.reason and f"{broken} cannot be read" in result.reason
    paths = found.to_json()["dimensions"]["temporal_flickering"]["paths"]
    assert {paths[it] for it in result.details["by_video"]} == {*paths.values()} - {str(broken)}
    for path in videos.iterdir():
        path.write_bytes(b"broken")
    found = run(videos, "temporal_flickering", custom=custom)[1]
    assert "cannot read a video" in found.results["temporal_flickering"].reason


def test_what_it_cannot_read_at_all_is_told(package: Path, videos: Path) -> None:
    (videos / "still.png").touch()
    (videos / "a cat-4.mp4").unlink()
    (videos / "a cat-4.mp4").symlink_to(videos / "gone.mp4")
    _, found = run(videos, "temporal_flickering", "scene")
    told = [it.reason for it in found.rejected]
    assert len(told) == 2 and not found.ok
    assert "a cat-4.mp4 cannot be read (No such file" in told[0]
    assert "VBench reads .mp4 and .gif, not" in told[1] and "still.png: generate" in told[1]
    result = found.results["temporal_flickering"]
    assert result.status == "partial" and result.reason.startswith("9 of 10 videos")
    with pytest.raises(EvalError, match=r"VBench reads \.mp4 and \.gif, not"):
        run(videos / "still.png", "temporal_flickering")


def test_names_that_collide_fail_one_dimension(package: Path, videos: Path, tmp_path: Path) -> None:
    weights(tmp_path, "scene")
    (videos / "a dog-02.mp4").touch()
    _, found = run(videos, "temporal_flickering", "scene")
    result = found.results["temporal_flickering"]
    assert result.status == "failed" and "are both number 2 of 'a dog'" in result.reason
    assert found.results["scene"].status == "ok"  # of cats alone
    assert [it["dimension"] for it in calls(package)] == ["scene"]


def test_videos_that_are_not_there_never_score_as_complete(package: Path, videos: Path) -> None:
    """T1: the package warns, and gives a score."""
    for path in sorted(videos.iterdir())[2:]:
        path.unlink()
    result = run(videos, "temporal_flickering")[1].results["temporal_flickering"]
    assert result.status == "partial" and result.reason.startswith("2 of 10 videos")
    assert "a cat-2.mp4" in result.reason
    for path in videos.iterdir():
        path.rename(path.with_name(f"other {path.name}"))
    result = run(videos, "temporal_flickering")[1].results["temporal_flickering"]
    assert result.status == "skipped" and "none of its 10 videos" in result.reason
    assert len(calls(package)) == 1


@pytest.mark.parametrize(
    ("behaviour", "status", "told"),
    [
        ("nan", "failed", "a score is NaN"),  # T2
        ("infinite", "failed", "a score is Infinity"),
        ("number", "failed", "results are none"),
        ("empty", "failed", "scored no video"),
        ("odd", "failed", "results are none"),
        ("cut", "failed", "results are none"),
        ("silent", "failed", "left no results"),
        ("stranger", "failed", "'else.mp4', which it was not given"),
        ("raise", "failed", "ValueError: no weights (log: "),
        ("exit", "failed", "SystemExit: cannot go on"),
        ("crash", "failed", "exit status 11: it wrote nothing"),
        ("hang", "failed", "took more than 0.05 minutes"),
        ("drop", "partial", "9 of 10 videos"),
    ],
)
def test_what_the_package_does_wrong_is_told(
    package: Path, videos: Path, monkeypatch: pytest.MonkeyPatch,
    behaviour: str, status: str, told: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("BEHAVIOUR", behaviour)
    found = run(videos, "temporal_flickering", timeout_s=3)[1]
    result = found.results["temporal_flickering"]
    assert (result.status, found.ok) == (status, False) and told in result.reason
    assert "\n" not in result.reason and (result.score is None) == (status == "failed")
    if "log: " in result.reason:
        assert Path(result.reason.rpartition("log: ")[2].rstrip(")")).exists()
    if behaviour == "hang":  # what it started is ended with it
        pid = int(package.with_name("child.txt").read_text())
        end = time.monotonic() + 5  # a killed process takes a moment to go
        while running(pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not running(pid)


def running(pid: int) -> bool:
    """Whether there is such a process, dead ones that nobody has taken leave of apart."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_one_dimension_that_fails_loses_no_other(
    package: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(tmp_path, "scene")
    cache = tmp_path / "scores.jsonl"
    run(videos, "temporal_flickering", cache=cache)
    monkeypatch.setenv("BEHAVIOUR", "raise")
    found = run(videos, "temporal_flickering", "scene", cache=cache)[1]
    states = {name: it.status for name, it in found.results.items()}
    assert states == {"temporal_flickering": "ok", "scene": "failed"}  # the first from the cache
    monkeypatch.delenv("BEHAVIOUR")
    assert run(videos, "temporal_flickering", "scene", cache=cache)[1].ok
    assert [it["dimension"] for it in calls(package)] == ["temporal_flickering", "scene", "scene"]
    (videos / "a cat-0.mp4").write_text("another video")
    run(videos, "temporal_flickering", "scene", cache=cache)
    assert len(calls(package)) == 5


def weights(tmp_path: Path, name: str) -> None:
    for file in DIMENSIONS[name].files:
        path = tmp_path / "weights" / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize("name", [it.name for it in DIMENSIONS.values() if it.files])
def test_missing_weights_are_told_before_the_package_can_load_any(
    package: Path, videos: Path, tmp_path: Path, name: str
) -> None:
    """T5: with addresses that work. Every file is named until all are there."""
    files = DIMENSIONS[name].files
    missing = client.missing_weights(DIMENSIONS[name], VBENCH)
    assert [it["address"] for it in missing] == [it.url for it in files]
    result = client.without_weights(DIMENSIONS[name], VBENCH)
    assert result is not None and result.status == "skipped"
    for it in missing:
        assert it["file"] and it["file"].startswith(str(tmp_path / "weights"))
        assert it["command"] and it["command"] in result.reason
        assert not (it["address"] or "").startswith("https://datarelease.blob")  # dead
    weights(tmp_path, name)
    assert client.without_weights(DIMENSIONS[name], VBENCH) is None
    assert not calls(package)


def test_a_dimension_that_needs_another_package_is_skipped(
    package: Path, videos: Path, tmp_path: Path
) -> None:
    weights(tmp_path, "color")
    result = run(videos, "color")[1].results["color"]
    assert result.status == "skipped" and "cannot import detectron2" in result.reason
    (tmp_path / "site" / "detectron2.py").touch()
    assert run(videos, "color")[1].results["color"].status == "ok"


def test_colours_that_nothing_shows_are_no_gap(
    package: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(tmp_path, "color")
    (tmp_path / "site" / "detectron2.py").touch()
    monkeypatch.setenv("BEHAVIOUR", "drop")
    result = run(videos, "color")[1].results["color"]
    assert result.status == "ok" and "leaves out 1 videos" in result.notes[-1]


def test_other_videos_only_in_dimensions_that_allow_it(
    package: Path, videos: Path, tmp_path: Path
) -> None:
    """T7: refused before the package loads models for it. T8: no other mode is offered."""
    weights(tmp_path, "scene")
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({it.name: "a prompt" for it in videos.iterdir()}))
    found = run(videos, "temporal_flickering", "scene", custom=True, prompts=file)[1]
    assert found.results["temporal_flickering"].status == "ok"
    assert "cannot be taken of other videos" in found.results["scene"].reason
    (call,) = calls(package)
    assert call["mode"] == "custom_input" and len(call["prompts"]) == 10
    allowed = {name for name, it in DIMENSIONS.items() if it.custom}
    refused_by_the_package = {
        *("object_class", "multiple_objects", "scene", "appearance_style", "color"),
        "spatial_relationship",
    }
    assert not allowed & {*refused_by_the_package, "human_action"}


def test_dino_is_read_from_where_torch_looks(package: Path, videos: Path, tmp_path: Path) -> None:
    """T6: torch.hub ignores the path that the package gives."""
    weights(tmp_path, "subject_consistency")
    (tmp_path / "site" / "vbench" / "VBench_full_info.json").write_text(
        json.dumps([{"prompt_en": "a cat", "dimension": ["subject_consistency"]}])
    )
    assert run(videos, "subject_consistency")[1].ok
    link = tmp_path / "torch" / "hub" / "checkpoints" / "dino_vitbase16_pretrain.pth"
    assert link.resolve() == tmp_path / "weights" / "dino_model" / "dino_vitbase16_pretrain.pth"
    link.unlink()
    link.symlink_to(tmp_path / "moved" / link.name)
    assert run(videos, "subject_consistency")[1].ok and link.exists()


def test_a_torchvision_without_its_operators_is_helped_and_told(
    package: Path, videos: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    (site / "torchvision" / "__init__.py").write_text(
        "import torch\nif not torch.declared:\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (site / "torch" / "__init__.py").write_text(
        "declared = []\ndevice = str\n"
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
        "class library:\n    class Library:\n"
        "        def __init__(self, *names): pass\n"
        "        def define(self, schema): declared.append(schema)\n"
    )
    result = run(videos, "temporal_flickering")[1].results["temporal_flickering"]
    assert result.status == "ok" and result.details["torchvision_shimmed"] is True
    assert any("compiled operators are missing" in it for it in result.notes)
    (site / "torchvision" / "__init__.py").write_text("raise RuntimeError('something else')")
    result = run(videos, "temporal_flickering")[1].results["temporal_flickering"]
    assert result.status == "failed" and "something else" in result.reason


def test_without_an_environment_there_is_one_line(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    with pytest.raises(EvalError, match=r"gone is no interpreter"):
        run(videos, python="gone")
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(EvalError, match=r"does not start: .* cannot import vbench"):
        run(videos, "scene")
    monkeypatch.delenv(client.PYTHON_VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(client.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EvalError, match="install uv"):
        run(videos, "scene")
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    found = client.environment(None, VBENCH)
    assert found.command[:4] == (str(uv), "run", "--no-project", "--script")
    assert "--locked" in found.command and found.identity.startswith("lock ")
