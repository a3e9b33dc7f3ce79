"""Benchmarks that compare ways of their own: the ways give the same, and the scripts run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kinora.accel.errors import RecipeError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import METHODS, VMoBA
from kinora.accel.methods.vmoba import layout
from kinora.accel.options import options_of
from kinora.accel.site import Site
from kinora.kernels.attention import block_attention

GRID = TokenGrid(5, 7, 18)


@pytest.fixture
def two_pass(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("vmoba_two_pass")


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    "setting",
    [{}, {"keep": 1e-3}, {"keep": 0.6, "scope": "head"}, {"rule": "softmax", "mass": 0.5}],
    ids=str,
)
def test_two_passes_are_attention_to_chosen_blocks(
    two_pass: ModuleType, layer: int, setting: dict[str, Any]
):
    method, site = VMoBA(**setting, shared=False), Site(GRID, layer, 3, 1, 2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, GRID.tokens, 32, generator=generator) for _ in "qkv")
    found = layout(q.device, method.parts(site), GRID, 0, False, method.tiling()[0])
    chosen, plan = method.choose(q, k, site), method.plan(q, k, site)
    assert plan is not None
    out = two_pass.two_pass(q, k, v, chosen, found)
    tokens = torch.arange(GRID.tokens).expand(3, -1)
    expected = two_pass.exact((q, k, v), tokens, chosen[0][..., found.owner])
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(block_attention(q, k, v, plan)[0], out)
    assert two_pass.error_of(out, tokens, expected, "it") < 1e-5
    with pytest.raises(SystemExit, match=r"it is off by .* nothing is timed"):
        two_pass.error_of(out + 0.01, tokens, expected, "it")


def test_two_passes_are_timed_beside_one(
    two_pass: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "rows.jsonl"
    given = "--random --grid 3x6x8 --heads 1 --head-dim 32 --json"
    two_pass.main([*given.split(), str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    printed = capsys.readouterr().out
    assert [row["layer"] for row in rows[::5]] == ["time", "space", "time and space"]
    for row in rows:
        assert f"{row['layer']:15} {row['way']:14}" in printed and row["grid"] == "3x6x8"
        assert row["ms"] > 0 and row["speedup"] > 0 and row["error"] < 1e-4
    named = {row["way"]: row for row in rows[10:]}
    assert named["two passes"]["density"] == named["vmoba"]["density"] == pytest.approx(18 / 72)
    assert named["vmoba"]["computed"] == named["vmoba, shared"]["density"] > 0.25


def test_merged_keys_are_measured_beside_chance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    methods = importlib.import_module("methods")
    monkeypatch.setattr(methods, "GRID", GRID)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool1d(
        torch.randn(3, 32, GRID.tokens, generator=generator), 5, 1, 2
    )
    q, k, v = (4 * x.T[None, None] for x in smooth)
    torch.save({(1, 1): (q, k, v)}, tmp_path / "cache.pt")
    given = f"--methods kv-merge --layers 1 --steps 1 --cache {tmp_path}/cache.pt --json"
    monkeypatch.setattr("sys.argv", ["methods.py", *given.split(), str(tmp_path / "rows.jsonl")])
    methods.main()
    rows = [json.loads(it) for it in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(methods.SETTINGS["kv-merge"])
    assert "kv-merge, keep 0.5: 0.500; nan" in capsys.readouterr().out
    assert all(row["recall"] is None and 0 < row["density"] < 1 for row in rows)
    half = [row for row in rows if row["setting"] == "keep 0.5"]
    assert half[0]["error"] < half[0]["error_random"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("steps")


def test_policies_are_measured_beside_the_plain_sampler(
    steps: ModuleType,
    wan_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(steps, "TEXT_LENGTH", 32)
    given = f"--model {wan_folder} --size 64x64 --frames 5 --steps 14 --prompts 1 --rows {file}"
    asked = ["steps.py", *given.split(), "--policy", "pattern", "--policy", "easy threshold=0"]
    monkeypatch.setattr("sys.argv", asked)
    steps.main()
    rows = {it["policy"]: it for it in map(json.loads, file.read_text().splitlines()[1:])}
    assert list(rows) == ["plain", "pattern", "easy threshold=0", "plain 10", "plain 14", "end"]
    assert (rows["pattern"]["nfe"], rows["pattern"]["pattern"]) == (10, "CCCsCsCsCsCCCC")
    assert rows["plain"]["psnr_db"] == rows["easy threshold=0"]["psnr_db"] == 120
    assert 10 < rows["pattern"]["psnr_db"] < 120 and rows["pattern"]["ssim"] < 1
    first = capsys.readouterr().out
    assert "| pattern | 10.0 |" in first and "| +0.0 | 1.0000 |" in first
    # Again, nothing is made: the table comes from the rows.
    monkeypatch.delattr(steps, "made")
    steps.main()
    assert first.endswith(capsys.readouterr().out)
    with pytest.raises(RecipeError, match="no step policy"):
        monkeypatch.setattr("sys.argv", ["steps.py", "--policy", "patern"])
        steps.main()


def test_a_gain_needs_the_plain_run_of_each_prompt(steps: ModuleType):
    def row(policy: str, seed: int, psnr: float) -> dict[str, Any]:
        row = {"policy": policy, "seed": seed, "nfe": 10, "psnr_db": psnr}
        return row | {"denoise_s": 1.0, "ssim": 1.0, steps.ALL_CORRECT: 1.0}

    rows = [
        row(name, seed, psnr) for seed in (0, 1) for name, psnr in (("a", 32), ("plain 10", 30))
    ]
    assert "| +2.0 |" in steps.table(rows)[-1]
    for missing in (1, 3):
        with pytest.raises(KeyError, match="plain 10"):
            steps.table(rows[:missing] + rows[missing + 1 :])


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("verdicts")


def test_verdicts_are_told_by_setting_beside_dense_and_the_plain_sampler(verdicts: ModuleType):
    policy, file = "policy shadow threshold=0.1 max_skip=3", "of/threshold-blocks-0.5-tail.toml"
    correct = verdicts.ALL_CORRECT

    def row(seed: int, recipe: str, nfe: int, verdict: float, **told: float) -> dict[str, Any]:
        common = {"seed": seed, "recipe": recipe, "nfe": nfe, "density": 0.5, correct: verdict}
        return common | told

    rows = [row(seed, "dense", 50, 1.0) for seed in (0, 1, 2)]
    rows += [row(seed, file, 50, float(seed), psnr=30.0, ssim=0.9) for seed in (0, 1)]
    rows += [row(0, policy, 26, 1.0, psnr=52.0, ssim=0.9)]
    rows += [row(1, policy, 25, 1.0, psnr=54.0, ssim=1.0)]
    rows += [row(0, "plain 26", 26, 1.0, psnr=50.0, ssim=0.9)]
    found = {(it["seed"], it["recipe"]): it for it in rows}
    told = {it["recipe"]: it for it in verdicts.table(["dense", file, policy], found)}
    assert list(told) == ["dense", "threshold-blocks-0.5-tail", policy]
    sparse = told["threshold-blocks-0.5-tail"]
    assert (sparse["prompts"], sparse[correct], sparse["difference"]) == (2, 0.5, -0.5)
    # Of the other prompt there is no plain run in as many steps.
    assert (told[policy]["prompts"], told[policy]["nfe"], told[policy]["gain_db"]) == (1, 26, 2.0)


def test_verdicts_make_what_is_not_there_dense_first(verdicts: ModuleType):
    done: dict[tuple[int, str], Any] = {(0, "dense"): {}, (0, "a.toml"): {}}
    names = ["dense", "a.toml", "policy easy"]
    made = verdicts.to_make(names, range(1), done)
    assert next(made) == "dense"  # others are compared with its frames
    assert next(made) == "policy easy"
    done[0, "policy easy"] = {"nfe": 26}
    assert list(made) == ["plain 26"]
    done[0, "plain 26"] = {}
    assert not list(verdicts.to_make(names, range(1), done))


def test_verdicts_are_refused_before_anything_is_made(
    verdicts: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(verdicts.models, "load")
    paro = Path(__file__).parents[1] / "benchmarks" / "recipes" / "paro-25.toml"
    for given, said in (
        ([str(paro)], "there is no calibration paro-25.npz: make one with `kinora calibrate`"),
        (["--policy", "sda"], "no step policy"),
        (["--policy", "easy", "--steps", "8"], "policy easy: step policies need 12 steps or more"),
        (["balanced", "--set", "steps.policy=sada", "--batch", "2"], "decides for a whole batch"),
    ):
        monkeypatch.setattr("sys.argv", ["verdicts.py", *given])
        with pytest.raises(SystemExit) as ended:
            verdicts.main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_verdicts_by_several_workers_are_those_of_one(tmp_path: Path):
    folder = Path(__file__).parents[1] / "benchmarks"
    recipe = folder / "recipes" / "top-blocks-40.toml"
    told: list[set[str]] = []
    for workers in (1, 2):
        rows = tmp_path / f"{workers}.jsonl"
        small = ["--size", "64x64", "--frames", "5", "--steps", "4", "--prompts", "2"]
        given = [str(recipe), *small, "--workers", str(workers), "--rows", str(rows)]
        command = [sys.executable, str(folder / "verdicts.py"), *given]
        subprocess.run(command, check=True, capture_output=True)
        told.append(set(rows.read_text().splitlines()[1:]))
    assert len(told[0]) == 4
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("script", "said"),
    [("method_speed", {"tile", "tail"}), ("methods", {"tile"})],
)
def test_what_defaults_must_not_change_is_said_in_benchmarks(
    monkeypatch: pytest.MonkeyPatch, script: str, said: set[str]
):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    settings: Any = importlib.import_module(script).SETTINGS
    if isinstance(settings, dict):
        settings = [(name, it) for name, several in settings.items() for it in several]
    window = {"sliding-tile", "neighborhood"}
    for name, setting in settings:
        options = {it.name for it in options_of(METHODS[name])}
        wanted = said | ({"frames", "height", "width"} if name in window else set())
        # Paro is what its calibration says.
        missing = set() if name == "paro" else (wanted & options) - set(setting)
        assert not missing, f"{name} {setting}"
