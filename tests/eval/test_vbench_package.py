"""The real VBench package, installed for the test, in the dimension that needs no weights."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.eval.clips import EvalError, find
from kinora.eval.flicker import measure
from kinora.eval.vbench import client, prompts
from kinora.eval.vbench.spec import DIMENSIONS, FLICKER, STILL_FILES
from kinora.eval.vbench.stage import check_names
from kinora.eval.vbench.suite import VBenchReport, evaluate
from kinora.eval.vbench.suites import VBENCH_I2V
from kinora.eval.vbench.totals import t2v
from kinora.eval.world.corruptions import VIDEO_CORRUPTIONS
from kinora.pipelines.media import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the least that importing it takes besides our own libraries."""
    folder = tmp_path_factory.mktemp("vbench")
    minor = int(torch.__version__.split(".")[1]) + 15  # torchvision's that belongs to this torch
    wanted = ["vbench==0.1.5", "decord==0.6.0", "tqdm"]
    if importlib.util.find_spec("torchvision") is None:
        wanted.append(f"torchvision==0.{minor}.*")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *wanted], check=True)
    return folder


@pytest.fixture(autouse=True)
def its_environment(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), *([before] if before else [])]))
    monkeypatch.setenv(client.PYTHON_VARIABLE, sys.executable)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "no-weights"))


def last(*args: Any, **options: Any) -> VBenchReport:
    *_, found = evaluate(*args, **options)
    assert isinstance(found, VBenchReport)
    return found


def test_native_flicker_is_the_packages(truth: list[tuple[Any, Any]], tmp_path: Path) -> None:
    for kind in ("mp4", "gif"):
        folder = tmp_path / kind
        folder.mkdir()
        for index, (_, video) in enumerate(truth[:6]):
            clip = VIDEO_CORRUPTIONS["noise"](video, 5.0 * index) if index else video
            (folder / f"{index}.{kind}").write_bytes(encode(clip, kind, 16, ""))
        result = last([folder], dimensions=["temporal_flickering"], custom=True).results
        theirs = result["temporal_flickering"].details["by_video"]
        clips, _ = find([folder])
        ours = {f"{index:06d}.{kind}": measure(clip).score for index, clip in enumerate(clips)}
        assert len(set(ours.values())) == 6 and theirs == pytest.approx(ours, abs=1e-6)


def test_vbench_i2v_by_the_same_package(truth: list[tuple[Any, Any]], tmp_path: Path) -> None:
    for index in range(5):
        video = encode(truth[index][1], "mp4", 16, "")
        (tmp_path / f"a cat-{index}.mp4").write_bytes(video)
    info = tmp_path / VBENCH_I2V.listed
    info.write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["temporal_flickering"]}]))
    names = ["temporal_flickering", "camera_motion", "i2v_subject"]
    results = last([tmp_path], suite=VBENCH_I2V, dimensions=names, info=info).results
    clips, _ = find([tmp_path])
    ours = {it.path.name: measure(it).score for it in clips}
    theirs = results["temporal_flickering"].details["by_video"]
    assert results["temporal_flickering"].status == "ok" and len(theirs) == 5
    assert theirs == pytest.approx(ours, abs=1e-6)
    assert results["camera_motion"].status == results["i2v_subject"].status == "skipped"


RAFT = """
import argparse, sys, torch
from vbench.third_party.RAFT.core.raft import RAFT
torch.manual_seed(0)
options = argparse.Namespace(small=False, mixed_precision=False, alternate_corr=False)
torch.save(torch.nn.DataParallel(RAFT(options)).state_dict(), sys.argv[1])
"""


def test_its_filter_for_still_videos_runs(
    truth: list[tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = STILL_FILES
    path = tmp_path / "weights" / file.path
    path.parent.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", RAFT, str(path)], check=True)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    (tmp_path / "videos").mkdir()
    for index in range(2):
        video = encode(truth[index][1][:3], "mp4", 16, "")
        (tmp_path / "videos" / f"{index}.mp4").write_bytes(video)
    found = last([tmp_path / "videos"], dimensions=[FLICKER], custom=True, still=True)
    result = found.results[FLICKER]  # random weights see motion or none: either is an answer
    assert result.status == "ok" or "none of 2 videos is still" in result.reason, result.reason


def test_two_of_375_videos_are_no_whole_score(
    truth: list[tuple[Any, Any]], tmp_path: Path, package: Path
) -> None:
    known = prompts.read(package / "vbench" / "VBench_full_info.json")
    assert len(known.entries) == 946 and len(known.of(list(DIMENSIONS))) == 944
    still = known.of(["temporal_flickering"])
    for index in range(2):
        video = encode(truth[index][1], "mp4", 16, "")
        (tmp_path / f"{still[0]}-{index}.mp4").write_bytes(video)
    found = last([tmp_path], dimensions=["temporal_flickering", "imaging_quality"])
    result = found.results["temporal_flickering"]
    assert (result.status, result.details["videos"]) == ("partial", 2)
    assert result.reason.startswith("2 of 375 videos")
    assert found.results["imaging_quality"].status == "skipped"
    assert t2v({"temporal_flickering": result.score}).scores["total"] is None


def test_every_prompt_is_a_name_for_a_file(package: Path) -> None:
    known = prompts.read(package / "vbench" / "VBench_full_info.json")
    names = [f"{it}-0.mp4" for it in known.of(list(DIMENSIONS))]
    check_names(names, ignores_case=False)
    assert len(names) - len({it.casefold() for it in names}) == 1
    with pytest.raises(EvalError, match="are one file here"):
        check_names(names, ignores_case=True)
