"""Flickering of still videos alone: VBench's filter, which of a prompt's videos are taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kinora.eval.clips import EvalError
from kinora.eval.vbench import client
from kinora.eval.vbench.spec import STILL_FILES
from kinora.eval.vbench.suite import VBenchReport, evaluate

PACKAGE = """
import json, os
from pathlib import Path
class VBench:
    def __init__(self, device, info, out): self.out = out
    def evaluate(self, videos_path, name, **options):
        names = sorted(os.listdir(videos_path))
        with open(os.environ["CALLS"], "a") as file:
            print(json.dumps([Path(videos_path, it).read_text() for it in names]), file=file)
        rows = [{"video_path": it, "video_results": 0.5} for it in names]
        with open(f"{self.out}/{name}_eval_results.json", "w") as file:
            json.dump({name: [0.875, rows]}, file)
"""
FILTER = """
import os, torch
from pathlib import Path
DEVICE = "cuda"
class StaticFilter:
    def __init__(self, args, device):
        assert DEVICE == device == "cpu" and os.path.exists(args.model)
        assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
        torch.load(args.model)
    def infer(self, path):
        with open(os.environ["CALLS"], "a") as file:
            print('"filter"', file=file)
        if os.environ.get("BROKEN"):
            raise ValueError("cannot filter")
        return "still" in Path(path).read_text()
"""
TORCH = """
device = str
class cuda:
    is_available = staticmethod(lambda: False)
def load(path, map_location=None):
    assert map_location == "cpu"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    for name, source in {
        "vbench": PACKAGE, "vbench/cli": "", "torch": TORCH, "torchvision": ""
    }.items():  # fmt: skip
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(source)
    (site / "vbench" / "cli" / "static_filter.py").write_text(FILTER)
    listed = [{"prompt_en": it, "dimension": ["temporal_flickering"]} for it in ("a cat", "a dog")]
    (site / "vbench" / "VBench_full_info.json").write_text(json.dumps(listed))
    (file,) = STILL_FILES
    (tmp_path / "weights" / file.path).parent.mkdir(parents=True)
    (tmp_path / "weights" / file.path).touch()
    found = tmp_path / "calls.jsonl"
    found.touch()
    for name, value in {
        "PYTHONPATH": site,
        "CALLS": found,
        "VBENCH_CACHE_DIR": tmp_path / "weights",
        client.PYTHON_VARIABLE: sys.executable,
        "TMPDIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("tempfile.tempdir", None)
    return found


def made(folder: Path, **still: list[int]) -> Path:
    """25 videos of each prompt, of which those with some numbers are still."""
    folder.mkdir()
    for prompt, numbers in still.items():
        for index in range(25):
            what = "still" if index in numbers else "moving"
            name = f"a {prompt}-{index}"
            (folder / f"{name}.mp4").write_text(f"{name} {what}")
    return folder


def run(videos: Path, **options: Any) -> VBenchReport:
    *_, found = evaluate([videos], dimensions=["temporal_flickering"], **options)
    assert isinstance(found, VBenchReport)
    return found


def taken(calls: Path) -> list[Any]:
    return [it for it in map(json.loads, calls.read_text().splitlines()) if it != "filter"]


def test_five_still_videos_of_each_prompt_are_scored(calls: Path, tmp_path: Path) -> None:
    """T11: which variant it was is told."""
    videos = made(tmp_path / "videos", cat=[2, 3, 5, 7, 11, 13], dog=list(range(10, 15)))
    cache = tmp_path / "scores.jsonl"
    found = run(videos, still=True, cache=cache)
    result = found.results["temporal_flickering"]
    assert (result.status, result.details["videos"]) == ("ok", 10)
    assert result.notes == (
        "temporal_flickering of still videos alone, as the package's filter says: 10 of 10",
    )
    ((*names,),) = taken(calls)
    numbers = (2, 3, 5, 7, 11, *range(10, 15))
    assert [it.split("-")[1] for it in names] == [f"{it} still" for it in numbers]
    assert found.provenance["still_videos_alone"] is True
    paths = found.to_json()["dimensions"]["temporal_flickering"]["paths"]
    assert paths["a cat-4.mp4"].endswith("a cat-11.mp4")
    before = calls.read_text()
    assert run(videos, still=True, cache=cache).results == found.results
    assert calls.read_text() == before  # neither filtered nor scored again
    result = run(videos, cache=cache).results["temporal_flickering"]
    assert "without the filter" in result.notes[0]


def test_the_same_videos_with_and_without_the_filter_are_two_scores(
    calls: Path, tmp_path: Path
) -> None:
    """T11: where the filter keeps all, a score from before is still told to be without it."""
    videos, cache = tmp_path / "videos", tmp_path / "scores.jsonl"
    made(videos, cat=list(range(5)), dog=list(range(5)))
    for still in (False, True, False, True):
        (note,) = run(videos, still=still, cache=cache).results["temporal_flickering"].notes
        assert ("without the filter" in note) is not still
    assert len(taken(calls)) == 2  # each once


def test_too_few_still_videos_are_no_whole_set(calls: Path, tmp_path: Path) -> None:
    videos = made(tmp_path / "videos", cat=[2, 3], dog=[])
    result = run(videos, still=True).results["temporal_flickering"]
    assert result.status == "partial" and result.reason.startswith("2 of 10 videos")
    assert "'a cat-2.mp4'" in result.reason
    moving = made(tmp_path / "moving", cat=[], dog=[])
    result = run(moving, still=True).results["temporal_flickering"]
    assert result.status == "skipped" and "none of 50 videos is still" in result.reason


def test_videos_of_any_prompts_are_filtered_too(calls: Path, tmp_path: Path) -> None:
    videos = made(tmp_path / "videos", bird=[4, 9])
    result = run(videos, still=True, custom=True).results["temporal_flickering"]
    assert (result.status, result.details["videos"]) == ("ok", 2) and "2 of 2" in result.notes[0]


def test_what_the_filter_lacks_or_does_wrong_is_told(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = made(tmp_path / "videos", cat=[2, 3], dog=[])
    monkeypatch.setenv("BROKEN", "1")
    result = run(videos, still=True).results["temporal_flickering"]
    assert result.status == "failed" and "ValueError: cannot filter (log: " in result.reason
    (file,) = STILL_FILES
    (tmp_path / "weights" / file.path).unlink()
    result = run(videos, still=True).results["temporal_flickering"]
    assert result.status == "skipped" and file.url in result.reason and "curl" in result.reason
    with pytest.raises(EvalError, match="--static-filter is for temporal_flickering"):
        list(evaluate([videos], dimensions=["scene"], still=True))
