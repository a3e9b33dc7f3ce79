"""VBench-I2V and VBench-2.0 out of process: stand-ins for the packages, and what is theirs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kinora.eval.clips import Clip, EvalError
from kinora.eval.vbench import client
from kinora.eval.vbench import prompts as vbench_prompts
from kinora.eval.vbench import runner as script
from kinora.eval.vbench.spec import DIMENSIONS_2, I2V_DIMENSIONS
from kinora.eval.vbench.stage import stage
from kinora.eval.vbench.suite import VBenchReport, evaluate
from kinora.eval.vbench.suites import VBENCH2, VBENCH_I2V, VBENCHES, Suite

COMMON = """
import json, os
from pathlib import Path
CALLS = os.environ["CALLS"]

def tell(**told):
    with open(CALLS, "a") as file:
        print(json.dumps({**told, "here": os.getcwd()}), file=file)

def rows_of(folder, names):
    return [{"video_path": f"{folder}/{it}", "video_results": 0.5} for it in names]
"""
I2V = """
class VBenchI2V:
    def __init__(self, device, info, out):
        self.info, self.out = info, Path(out)

    def evaluate(self, videos_path, name, dimension_list=None, local=False, resolution="", **more):
        (dimension,) = dimension_list
        images = Path("vbench2_beta_i2v/data/crop") / resolution
        found = sorted(it.name for it in images.iterdir()) if images.exists() else []
        tell(dimension=dimension, more=more, images=found, local=local)
        rows = rows_of(videos_path, sorted(os.listdir(videos_path)))
        result = [0.75, rows]
        if dimension == "camera_motion":
            result = [0.75, {"pan_left": float("nan"), "static": 1.0}, rows]
        (self.out / f"{name}_eval_results.json").write_text(json.dumps({dimension: result}))
"""
SECOND = """
class VBench2:
    def __init__(self, device, info, out):
        self.info, self.out = info, Path(out)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 mode=None):
        (dimension,) = dimension_list
        names = sorted(os.listdir(videos_path))
        tell(dimension=dimension, mode=mode, names=names)
        if mode == "vbench_standard":
            names = []
            for entry in json.loads(Path(self.info).read_text()):
                if dimension in entry["dimension"]:
                    for index in range(20 if dimension == "Diversity" else 3):
                        it = f"{entry['prompt_en'][:180]}-{index}.mp4"
                        assert os.path.exists(f"{videos_path}/{it}"), it
                        names += [it] if dimension != "Diversity" or not index else []
        result = [0.75, rows_of(videos_path, names)]
        (self.out / f"{name}_eval_results.json").write_text(json.dumps({dimension: result}))
"""
TORCH = "device = str\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
LONG = "a long street " * 14
I2V_INFO: list[dict[str, Any]] = [
    {"prompt_en": "a cat", "dimension": ["i2v_subject", "subject_consistency"],
     "image_name": "cat.jpg"},
    {"prompt_en": "a hill, camera pans left", "dimension": ["camera_motion"],
     "image_name": "hill.jpg"},
]  # fmt: skip
INFO_2: list[dict[str, Any]] = [
    {"prompt_en": "a dance", "dimension": ["Human_Clothes"]},
    {"prompt_en": LONG, "dimension": ["Human_Clothes"]},
    {"prompt_en": "a tree", "dimension": ["Diversity"]},
]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins in an environment with all weights and further packages; their calls."""
    site = tmp_path / "site"
    for name, source in {
        "vbench2_beta_i2v": COMMON + I2V,
        "vbench2_beta_i2v/third_party": "",
        "vbench2_beta_i2v/third_party/cotracker": "",
        "vbench2": COMMON + SECOND,
        "torch": TORCH,
        "torchvision": "",
        "dreamsim": "",
    }.items():
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(source)
    calls = tmp_path / "calls.jsonl"
    calls.touch()
    for name, value in {
        "PYTHONPATH": site,
        "CALLS": calls,
        "VBENCH_CACHE_DIR": tmp_path / "weights",
        "VBENCH2_CACHE_DIR": tmp_path / "weights2",
        "TORCH_HOME": tmp_path / "torch",
        client.PYTHON_VARIABLE: sys.executable,
        "TMPDIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("tempfile.tempdir", None)
    for suite, folder in ((VBENCH_I2V, "weights"), (VBENCH2, "weights2")):
        for file in (file for it in suite.dimensions.values() for file in it.files):
            path = tmp_path / folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return calls


@pytest.fixture
def info(packages: Path, tmp_path: Path) -> Path:
    """The list of VBench-I2V, which its package does not bring; that of VBench-2.0 is in it."""
    (tmp_path / "site" / "vbench2" / VBENCH2.listed).write_text(json.dumps(INFO_2))
    file = tmp_path / VBENCH_I2V.listed
    file.write_text(json.dumps(I2V_INFO))
    return file


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("cat.jpg", "hill.jpg"):
        (folder / name).write_text(name)
    return folder


def videos_of(folder: Path, *prompts: str, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for prompt in prompts:
        for index in range(count):
            (folder / f"{prompt}-{index}.mp4").write_text(f"{prompt} {index}")
    return folder


def run(suite: Suite, videos: Path, *dimensions: str, **options: Any) -> VBenchReport:
    *_, found = evaluate([videos], suite=suite, dimensions=dimensions, **options)
    assert isinstance(found, VBenchReport)
    json.dumps(found.to_json(), allow_nan=False)
    return found


def calls_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_images_lie_where_the_package_looks(
    packages: Path, info: Path, images: Path, tmp_path: Path
) -> None:
    videos = videos_of(tmp_path / "videos", "a cat", "a hill, camera pans left", count=5)
    found = run(VBENCH_I2V, videos, "i2v_subject", "camera_motion", info=info, images=images)
    assert {name: it.status for name, it in found.results.items()} == {
        "i2v_subject": "ok",
        "camera_motion": "ok",  # and no NaN for the kinds of motion without videos
    }
    first, second = calls_in(packages)
    assert first["images"] == ["cat.jpg", "hill.jpg"] and first["local"] and first["more"] == {}
    assert second["images"] == []
    hub = tmp_path / "torch" / "hub"
    assert (hub / "checkpoints" / "cotracker2.pth").exists()  # T6
    assert (hub / "facebookresearch_co-tracker_main" / "hubconf.py").exists()
    assert found.totals.scores == {"i2v": None, "quality": None, "total": None}
    assert found.provenance["suite"] == "VBench-I2V"


def test_images_that_are_not_there_are_told_before_anything_runs(
    packages: Path, info: Path, images: Path, tmp_path: Path
) -> None:
    videos = videos_of(tmp_path / "videos", "a cat", count=5)
    result = run(VBENCH_I2V, videos, "i2v_subject", info=info).results["i2v_subject"]
    assert result.status == "skipped" and "--images FOLDER" in result.reason
    (images / "cat.jpg").unlink()
    result = run(VBENCH_I2V, videos, "i2v_subject", info=info, images=images).results["i2v_subject"]
    assert result.status == "skipped" and "the first 'cat.jpg'" in result.reason
    assert not calls_in(packages)
    with pytest.raises(EvalError, match="gone is no folder"):
        run(VBENCH_I2V, videos, info=info, images=tmp_path / "gone")


def test_another_image_is_another_score(
    packages: Path, info: Path, images: Path, tmp_path: Path
) -> None:
    videos = videos_of(tmp_path / "videos", "a cat", count=5)
    options: dict[str, Any] = {"info": info, "images": images, "cache": tmp_path / "kept.jsonl"}
    for expected, text in ((1, None), (1, None), (2, "another")):
        if text:
            (images / "cat.jpg").write_text(text)
        assert run(VBENCH_I2V, videos, "i2v_subject", **options).ok
        assert len(calls_in(packages)) == expected


def test_what_the_wheel_lacks_is_told(
    packages: Path, info: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "site/vbench2_beta_i2v/third_party/__init__.py").unlink()
    for it in sorted((tmp_path / "site/vbench2_beta_i2v/third_party").rglob("*"), reverse=True):
        it.unlink() if it.is_file() else it.rmdir()
    (tmp_path / "site/vbench2_beta_i2v/third_party").rmdir()
    videos = videos_of(tmp_path / "videos", "a hill, camera pans left", count=5)
    result = run(VBENCH_I2V, videos, "camera_motion", info=info).results["camera_motion"]
    assert result.status == "skipped"
    assert "cannot import vbench2_beta_i2v.third_party.cotracker" in result.reason
    with pytest.raises(EvalError, match=r"no list of prompts: give --info .* \(curl -fLO https"):
        run(VBENCH_I2V, videos, "camera_motion")


def test_only_its_own_prompts(packages: Path, info: Path, images: Path, tmp_path: Path) -> None:
    videos = videos_of(tmp_path / "videos", "a cat", count=1)
    with pytest.raises(EvalError, match="its own prompts alone"):
        run(VBENCH_I2V, videos, custom=True)
    with pytest.raises(EvalError, match=r"than those of VBench-2\.0: give its VBench2"):
        run(VBENCH2, videos, info=info)
    with pytest.raises(EvalError, match="compares with no images"):
        run(VBENCH2, videos, images=images)
    result = run(VBENCH_I2V, videos, "i2v_subject", info=info, images=images).results
    assert result["i2v_subject"].status == "partial"
    assert result["i2v_subject"].reason.startswith("1 of 5 videos")


def test_a_list_without_prompts_of_a_dimension(
    packages: Path, info: Path, images: Path, tmp_path: Path
) -> None:
    videos = videos_of(tmp_path / "videos", "a cat", count=5)
    found = run(VBENCH_I2V, videos, "i2v_background", "i2v_subject", info=info, images=images)
    states = {name: it.status for name, it in found.results.items()}
    assert states == {"i2v_subject": "ok", "i2v_background": "skipped"}
    assert "the list of prompts has none" in found.results["i2v_background"].reason


def test_rows_name_the_image(info: Path) -> None:
    known = vbench_prompts.read(info, VBENCH_I2V)
    rows = list(vbench_prompts.manifest(known, ["camera_motion"], suite=VBENCH_I2V, samples=1))
    assert rows == [{"prompt": "a hill, camera pans left", "seed": 0, "image": "hill.jpg"}]


def test_vbench2_needs_an_interpreter(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(client.PYTHON_VARIABLE)
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    videos = videos_of(tmp_path / "videos", "a dance", count=3)
    with pytest.raises(EvalError, match=r"no environment for VBench-2.0, .*--vbench-python"):
        run(VBENCH2, videos)
    assert client.environment(None, VBENCH_I2V).command[0] == str(uv)


def test_vbench2_is_given_whole_prompts_alone(packages: Path, info: Path, tmp_path: Path) -> None:
    """It ends at the first video that is not there."""
    videos = videos_of(tmp_path / "videos", "a dance", LONG[:180], count=3)
    result = run(VBENCH2, videos, "Human_Clothes").results["Human_Clothes"]
    assert (result.status, result.details["videos"]) == ("ok", 6)
    (videos / "a dance-1.mp4").unlink()
    result = run(VBENCH2, videos, "Human_Clothes").results["Human_Clothes"]
    assert result.status == "partial" and result.reason.startswith("3 of 6 videos")
    first, second = calls_in(packages)
    assert len(first["names"]) == 6 and second["names"] == [
        f"{LONG[:180]}-{i}.mp4" for i in range(3)
    ]
    assert first["here"] == str(tmp_path / "site")  # it names its files from there
    (videos / f"{LONG[:180]}-0.mp4").unlink()
    result = run(VBENCH2, videos, "Human_Clothes").results["Human_Clothes"]
    assert result.status == "skipped" and "none of its 6 videos" in result.reason


def test_diversity_scores_twenty_videos_as_one(packages: Path, info: Path, tmp_path: Path) -> None:
    videos = videos_of(tmp_path / "videos", "a tree", count=20)
    result = run(VBENCH2, videos, "Diversity").results["Diversity"]
    assert (result.status, result.details["videos"], result.details["expected"]) == ("ok", 20, 20)
    assert list(result.details["by_video"]) == ["a tree-0.mp4"]
    # What the package would load from torch's cache, or fetch, is linked there.
    linked = {it.name for it in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()}
    assert {"vgg19-dcbb9e9d.pth", "retinaface_resnet50_2020-07-20-f168fae3c.zip"} <= linked
    known = vbench_prompts.read(tmp_path / "site" / "vbench2" / VBENCH2.listed, VBENCH2)
    rows = list(vbench_prompts.manifest(known, list(DIMENSIONS_2), suite=VBENCH2))
    assert len(rows) == 3 + 3 + 20


def test_prompts_whose_names_would_be_one_are_refused(tmp_path: Path) -> None:
    twins = [LONG + "at night", LONG + "at noon"]
    with pytest.raises(EvalError, match="the same first 180 characters"):
        stage([], twins, tmp_path, suite=VBENCH2)
    # A name holds the beginning, a record all of it.
    named = Clip(tmp_path / f"{twins[0][:180]}-0.mp4")
    other = Clip(tmp_path / "x.mp4", prompt=twins[1])
    staged = stage([named, other], twins[:1], tmp_path / "s", suite=VBENCH2, samples=1)
    assert [it.path for it in staged.links.values()] == [named.path] and staged.unused == (other,)


@pytest.mark.parametrize(
    ("suite", "name"),
    [(suite, it.name) for suite in (VBENCH_I2V, VBENCH2)
     for it in suite.dimensions.values() if it.files],
)  # fmt: skip
def test_missing_weights_are_told(packages: Path, tmp_path: Path, suite: Suite, name: str) -> None:
    dimension = suite.dimensions[name]
    assert client.without_weights(dimension, suite) is None
    for file in dimension.files:
        (client.cache_folder(suite) / file.path).unlink()
    result = client.without_weights(dimension, suite)
    assert result is not None and result.status == "skipped"
    for it, file in zip(result.details["missing_weights"], dimension.files, strict=True):
        address = file.url.removeprefix("https://huggingface.co/")
        assert it["file"] in result.reason and address in it["command"]
        assert str(client.cache_folder(suite)) in it["command"]
        # A zip is unpacked where the file that is asked for lies in it.
        unpacked = file.url.endswith(".zip") and not file.path.endswith(".zip")
        assert ("unzip" in it["command"]) is unpacked


def test_the_script_knows_the_suites() -> None:
    packages: dict[str, Any] = script.PACKAGES
    assert {name: (it.package, it.listed) for name, it in VBENCHES.items()} == {
        name: (package, listed) for name, (package, _, listed) in packages.items()
    }


def test_no_other_mode_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T8: one of them reads prompts from wherever it is called."""
    given = ["score", "--suite", "vbench", "--dimension", "scene", "--videos", str(tmp_path)]
    given += ["--caches", str(tmp_path), "--out", str(tmp_path), "--mode", "vbench_category"]
    with pytest.raises(SystemExit):
        script.main(given)
    assert "invalid choice: 'vbench_category'" in capsys.readouterr().err


def test_custom_videos_in_dimensions_that_allow_it(packages: Path, info: Path, tmp_path: Path):
    allowed = {name for name, it in DIMENSIONS_2.items() if it.custom}
    assert allowed == {
        "Human_Anatomy", "Human_Identity", "Human_Clothes", "Multi-View_Consistency"
    }  # fmt: skip
    assert not any(it.custom for it in I2V_DIMENSIONS.values())
    videos = videos_of(tmp_path / "videos", "anything", count=2)
    found = run(VBENCH2, videos, "Human_Clothes", "Material", custom=True).results
    assert found["Human_Clothes"].status == "ok" and found["Material"].status == "skipped"
