"""`kinora recipes`, `kinora plan` and `kinora generate --recipe` from the outside."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kinora.accel import presets

Cli = Callable[..., Any]
SMALL = ("--size", "128x128", "--frames", "5", "--steps", "3")


def test_recipes_are_listed_and_printed_as_files(cli: Cli, tmp_path: Path) -> None:
    called = cli("recipes")
    assert called.status == 0 and "balanced" in called.out and "dense" in called.out
    printed = cli("recipes", "show", "balanced", "--set", "attention.keep=0.4")
    assert tomllib.loads(printed.out)["attention"]["keep"] == 0.4
    path = tmp_path / "mine.toml"
    path.write_text(printed.out)
    assert cli("recipes", "show", path, "--json").last["attention"]["keep"] == 0.4
    names = [it["name"] for it in cli("recipes", "--json").last["recipes"]]
    assert names == sorted(names) and {"balanced", "dense"} <= set(names)


def test_presets_have_their_figures_and_the_docs_have_the_same(cli: Cli) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    page = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", page)
    told = {it["name"]: it["measured"] for it in cli("recipes", "--json").last["recipes"]}
    assert set(told) == set(presets.names()) == set(presets.MEASURED)
    for name, measured in presets.MEASURED.items():
        assert told[name] == asdict(measured)
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.M)
        assert row.endswith(f"| {measured.speed_words} | {measured.cost} |")


def test_a_run_with_a_recipe_ends_with_its_receipt_in_words(cli: Cli, wan_folder: Path) -> None:
    sparse = ("--set", "attention.tile=64x64", "--set", "when=always")
    called = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--recipe", "balanced",
                 *sparse)  # fmt: skip
    assert called.status == 0
    assert "asked: attention by blade (tail complement, keep 0.25" in called.out
    assert "ran: 8 of 12 attention calls by the cpu kernel" in called.out
    assert "4 calls dense in the first 20% of the steps" in called.out


def test_dense_says_that_the_stock_pipeline_ran(cli: Cli, wan_folder: Path) -> None:
    called = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--json")
    assert called.last["outputs"][0]["receipt"]["attention"] is None
    assert "nothing accelerated: the stock pipeline ran" in called.err


def test_a_repetition_keeps_the_recipe_and_can_change_it(cli: Cli, wan_folder: Path) -> None:
    first = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--recipe", "balanced",
                "--set", "attention.tile=64x64", "--json").last["outputs"][0]  # fmt: skip
    again = cli("generate", "--from", first["sidecar"], "--json").last["outputs"][0]
    assert again["identical"] is True
    changed = cli("generate", "--from", first["sidecar"], "--set", "attention.keep=0.5", "--json")
    request = changed.last["request"]
    assert request["recipe"]["attention"] == {
        **first["receipt"]["recipe"]["attention"],
        "keep": 0.5,
    }


def test_a_repetition_can_drop_strict(cli: Cli, wan_folder: Path) -> None:
    sparse = ("--recipe", "balanced", "--set", "attention.tile=64x64", "--set", "when=always")
    first = cli("generate", "a red circle", "--model", wan_folder, *SMALL, *sparse, "--strict",
                "--json").last["outputs"][0]  # fmt: skip
    # Now it is predicted to lose, and falls back.
    again = ("generate", "--from", first["sidecar"], "--set", "when=faster", "--set",
             "attention.keep=0.8")  # fmt: skip
    refused = cli(*again)
    assert refused.status == 2 and "strict: attention would not run as asked" in refused.complaint
    remedies = "run it anyway (when=always), or allow fallbacks (strict=False, --no-strict)"
    assert refused.complaint.endswith(remedies)
    fallen = cli(*again, "--no-strict", "--json")
    assert fallen.status == 0 and fallen.last["request"]["strict"] is False
    assert fallen.last["outputs"][0]["receipt"]["attention"]["fallbacks"]


def test_a_plan_of_a_model_that_is_not_here(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinora.pipelines.models._snapshot", lambda _card: None)
    called = cli("plan", "--model", "wan2.1-1.3b", "--recipe", "balanced")
    assert called.status == 0
    for told in ("32,760", "weights", "hf download", "for sparse attention", "times as fast"):
        assert told in called.out


def test_a_plan_is_told_in_words_and_as_json(cli: Cli) -> None:
    called = cli("plan", "--recipe", "balanced", "--size", "256x256")
    assert called.status == 0
    for told in ("9,216", "attention", "ok: blade", "cpu kernel", "times as fast", "it fits"):
        assert told in called.out
    part = cli("plan", "--recipe", "balanced", "--size", "256x256", "--json").last["parts"][0]
    assert part["speedup"] > 1.3
    assert "stock pipeline" in cli("plan").out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--recipe", "balancd"], ["no recipe 'balancd'", "did you mean balanced"]),
        (["--recipe", "none.toml"], ["none.toml cannot be read: No such file"]),
        (["--recipe", ""], ["no recipe ''"]),
        (["--set", "attention.keep=0.3"], ["dense accelerates no attention"]),
        (["--recipe", "balanced", "--set", "attention.keep=2"], ["above 0 to 1, not 2"]),
        (["--recipe", "balanced", "--set", "keep=0.3"], ["did you mean attention.keep?"]),
        (["--recipe", "balanced", "--set", "attention.kep=1"], ["did you mean keep"]),
    ],
)
@pytest.mark.parametrize("command", [["generate", "a red circle"], ["plan"]])
def test_a_bad_recipe_is_one_line(
    cli: Cli, command: list[str], args: list[str], told: list[str]
) -> None:
    called = cli(*command, *args)
    assert called.status == 2 and not list(Path().iterdir())
    assert all(part in called.complaint for part in told)
    if command[0] == "generate":
        assert json.loads(cli(*command, *args, "--json").out)["kind"] == "RecipeError"


def test_a_model_that_a_recipe_does_not_fit_is_refused(cli: Cli, unknown_folder: Path) -> None:
    unknown = ("--model", unknown_folder, "--size", "32x32", "--recipe", "balanced")
    called = cli("generate", "a", *unknown)
    assert called.status == 2 and "choose --recipe dense" in called.complaint
    assert "refused" in cli("plan", *unknown).out
