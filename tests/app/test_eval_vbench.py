"""`kinora eval` by VBench, with a stand-in for the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
PACKAGE = """
import json, os
class VBench:
    def __init__(self, device, info, out): self.out = out
    def evaluate(self, videos_path, name, **options):
        rows = [{"video_path": it, "video_results": 0.5} for it in os.listdir(videos_path)]
        with open(f"{self.out}/{name}_eval_results.json", "w") as file:
            json.dump({name: [0.875, rows]}, file)
"""
TORCH = "device = str\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"


@pytest.fixture
def info(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's list of prompts, and an interpreter that finds the package."""
    for name, source in (("vbench", PACKAGE), ("torch", TORCH), ("torchvision", "")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(source)
    file = tmp_path / "site" / "vbench" / "VBench_full_info.json"
    file.write_text(
        json.dumps(
            [
                {"prompt_en": "a cat", "dimension": ["temporal_flickering", "scene"]},
                {"prompt_en": "a dog", "dimension": ["scene"]},
            ]
        )
    )
    for name, value in {
        "PYTHONPATH": tmp_path / "site",
        "KINORA_VBENCH_PYTHON": sys.executable,
        "XDG_CACHE_HOME": tmp_path / "caches",
        "VBENCH_CACHE_DIR": tmp_path / "weights",
    }.items():
        monkeypatch.setenv(name, str(value))
    return file


def test_prompts_are_listed_for_generating(info: Path, cli: Cli) -> None:
    called = cli("eval", "prompts", "vbench", "--dimension", "temporal_flickering")
    rows = [json.loads(line) for line in called.out.splitlines()]
    assert rows == [{"prompt": "a cat", "seed": seed} for seed in range(5)]
    given = (
        "--dimension",
        "scene",
        "--samples",
        "2",
        "--seed",
        "3",
        "--info",
        info,
        "-o",
        "m.jsonl",
    )
    called = cli("eval", "prompts", "vbench", *given, "--info", info)
    assert "m.jsonl: 4 videos of 2 prompts" in called.err and not called.out
    assert Path("m.jsonl").read_text().splitlines()[1] == '{"prompt": "a cat", "seed": 4}'
    assert "is there already" in cli("eval", "prompts", "vbench", *given).complaint


def test_a_dimension_is_scored_and_a_total_is_not_made_up(info: Path, cli: Cli) -> None:
    Path("made").mkdir()
    for index in range(5):
        Path(f"made/a cat-{index}.mp4").write_text(str(index))
    asked = ("eval", "made", "--suite", "vbench", "--dimension")
    called = cli(*asked, "temporal_flickering")
    assert called.status == 0, called.err
    rows = [line.split() for line in called.out.splitlines()]
    assert ["temporal_flickering", "87.50", "5", "of", "5", "ok"] in rows
    assert ["total", "–"] in rows and "15 of 16 dimensions have no whole score" in called.out
    called = cli(*asked, "temporal_flickering,scene", "--json")
    assert called.status == 1 and called.last["dimensions"]["scene"]["status"] == "skipped"
    (weights,) = called.last["dimensions"]["scene"]["details"]["missing_weights"]
    assert weights["size"] == "about 4.5 GB" and weights["command"].startswith("curl ")
    assert cli(*asked, "temporal_flickering", "--html", "r.html").status == 0
    assert "VBench of 5 videos" in Path("r.html").read_text("utf-8")
    Path("made/a cat-3.mp4").unlink()
    called = cli(*asked, "temporal_flickering")
    assert (
        called.status == 1
        and "temporal_flickering: 4 of 5 videos, the first that is missing" in called.complaint
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("made", "--suite", "vbench", "--dimension", "sceen"), "did you mean scene?"),
        (("made", "--suite", "vbench", "-m", "psnr"), "goes alone"),
        (("made", "--dimension", "scene"), "need --suite vbench"),
        (("made", "--images", "empty"), "need --suite vbench"),
        (("made", "--static-filter"), "need --suite vbench"),
        (("made", "--suite", "vbench2", "--static-filter"), "--static-filter is for temporal_fli"),
        (("made", "--suite", "vbench", "--images", "empty"), "VBench compares with no images"),
        (("made", "--suite", "vbench-i2v", "--images", "gone"), "gone is no folder"),
        (("made", "--suite", "vbench-i2v", "--custom"), "its own prompts alone"),
        (("made", "--suite", "vbench-i2v"), "cannot import vbench2_beta_i2v"),
        (("made", "--suite", "vbench2"), "cannot import vbench2"),
        (("made", "--suite", "vbench2", "--dimension", "color"), "VBench-2.0 has no dimension"),
        (("made", "--suite", "vbench2,vbench"), "--suite vbench2 goes alone"),
        (("prompts", "vbench2", "--vbench-python", "gone"), "a Python with vbench2"),
        (("prompts", "vbench-i2v", "--info", "info.json"), "prompts than those of VBench-I2V"),
        (("made", "--suite", "vbench", "--timeout", "0"), "must be more than 0 minutes"),
        (("empty", "--suite", "vbench"), "empty holds no video"),
        (("made", "--suite", "vbench", "--vbench-python", "gone"), "gone is no interpreter"),
        (("prompts", "vbanch"), "no prompts of 'vbanch'"),
        (("prompts", "vbench", "--samples", "0"), "--samples must be 1 to 100"),
        (("prompts", "vbench", "--info", "gone.json"), "gone.json cannot be read"),
    ],
)
def test_what_is_refused(info: Path, cli: Cli, arguments: tuple[str, ...], told: str) -> None:
    Path("empty").mkdir()
    Path("made").mkdir()
    Path("made/a cat-0.mp4").write_text("0")
    Path("info.json").write_bytes(info.read_bytes())
    called = cli("eval", *arguments)
    assert called.status == 2 and told in called.complaint, called.err


def test_without_uv_or_an_interpreter_there_is_one_line(
    info: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KINORA_VBENCH_PYTHON")
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    Path("a.mp4").write_text("0")
    for arguments in (("a.mp4", "--suite", "vbench"), ("prompts", "vbench")):
        called = cli("eval", *arguments)
        assert called.status == 2 and "install uv" in called.complaint
    assert "or give its list with --info VBench_full_info.json (curl -fLO " in called.complaint
    called = cli("eval", "a.mp4", "--suite", "vbench2")
    assert called.status == 2 and "no environment for VBench-2.0" in called.complaint
    assert "name an interpreter" in called.complaint and "uv" not in called.complaint
