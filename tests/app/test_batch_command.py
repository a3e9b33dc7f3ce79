"""`kinora batch` as a user calls it: with a real, tiny pipeline, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kinora.app.batch import batch_app
from kinora.pipelines import sidecar

Cli = Callable[..., Any]
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")
FLAGS = {
    "run": {
        "manifest", "output", "seeds", "shard", "retries", "keep-going", "dry-run", "engine",
        "workers", "address", "model", "recipe", "set", "strict", "size", "frames", "steps",
        "guidance", "negative-prompt", "format", "fps", "device", "dtype", "keep-latents", "force",
        "json", "image",
    },
    "status": {"folder", "json"},
}  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A list of three."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square\n\na red square moving left\n")
    return path


def test_flags_are_frozen() -> None:
    group: Any = typer.main.get_command(batch_app)
    found = {
        name: {max(param.opts, key=len).lstrip("-") for param in command.params}
        for name, command in group.commands.items()
    }
    assert found == FLAGS
    for command in group.commands.values():
        for param in command.params:
            if param.param_type_name == "option" and not param.is_flag and param.help:
                assert "default:" in param.help or param.name == "strict", param.name


@pytest.mark.long
def test_a_batch_gives_what_generate_gives(cli: Cli, wan_folder: Path, prompts: Path) -> None:
    called = cli("batch", prompts, "--model", wan_folder, *SMALL, "--seeds", "3-4", "--json",
                 "--output", "out", "--workers", 2, "--device", "cpu")  # fmt: skip
    assert called.status == 0, called.err
    assert called.last["status"] == "done" and called.last["done"] == 6
    assert set(called.last["stages_s"]) == {"load", "text", "denoise", "decode", "save"}
    videos = sorted(Path("out").glob("*.mp4"))
    assert len(videos) == 6
    others = {it.name for it in Path("out").iterdir() if it.suffix not in (".mp4", ".json")}
    assert others == {"rows.jsonl", "status.jsonl"}
    lines = [json.loads(it) for it in Path("out/status.jsonl").read_text().splitlines()]
    for line in lines:
        record = sidecar.read(Path("out") / f"{line['name']}.json")
        assert record.frames_sha256 == line["frames_sha256"]
        assert record.request.output == f"{Path('out').absolute()}/"
        seed = ("--seed", record.request.seed)
        alone = cli("generate", record.request.prompt, "--model", wan_folder, *SMALL, *seed,
                    "--output", "alone", "--device", "cpu", "--json")  # fmt: skip
        assert alone.last["outputs"][0]["frames_sha256"] == line["frames_sha256"]
    # The same command again does nothing, and another order of the rows is the same rows.
    prompts.write_text("\n".join(reversed(prompts.read_text().split("\n"))))
    again = cli("batch", prompts, "--model", wan_folder, *SMALL, "--seeds", "3-4", "-o", "out")
    assert again.status == 0 and "6 rows: 6 done before" in again.out
    assert cli("batch", "status", "out", "--json").last["done"] == 6


@pytest.mark.long
def test_a_recipe_of_a_row_runs_and_is_summed_up(
    cli: Cli, wan_folder: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "rows.jsonl"
    attention = {"method": "top-blocks", "keep": 0.5, "tile": "64x64"}
    recipe = {"when": "always", "attention": attention}
    rows = [{"prompt": "a red circle"}, {"prompt": "a blue circle", "recipe": recipe}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    called = cli("batch", manifest, "--model", wan_folder, "--size", "64x64", "--frames", 5,
                 "--steps", 2, "--device", "cpu", "--json")  # fmt: skip
    assert called.status == 0, called.err
    ((words, density),) = called.last["densities"].items()
    assert "top-blocks" in words and 0 < density < 1
    assert called.last["output"] == "outputs/rows"


def test_a_dry_run_writes_nothing(cli: Cli, wan_folder: Path, prompts: Path) -> None:
    called = cli("batch", prompts, "--model", wan_folder, *SMALL, "--dry-run", "--seeds", "0-1")
    assert called.status == 0 and "6 rows; would make" in called.out
    assert "32x32, 5 frames, 2 steps" in called.out
    part = cli("batch", prompts, *SMALL, "--dry-run", "--shard", "2/2", "--json")
    assert part.last["rows"] == 1 and part.last["left"] == 1
    prompts.write_text("a\na\n")
    refused = cli("batch", prompts, *SMALL, "--dry-run")
    assert refused.status == 2 and "cannot run: line 2: it asks for the same" in refused.out
    assert list(Path.cwd().iterdir()) == []


def test_a_failing_row_is_exit_status_1(cli: Cli, wan_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "rows.jsonl"
    # Strict, and nothing to accelerate at this size: refused by the worker, not before.
    rows = [{"prompt": "a red circle"}, {"prompt": "a", "recipe": "balanced", "strict": True}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    called = cli("batch", manifest, "--model", wan_folder, *SMALL, "--device", "cpu", "--json")
    assert called.status == 1 and called.last["status"] == "failed"
    assert (called.last["done"], called.last["failed"], called.last["retried"]) == (1, 1, 0)
    assert called.last["failures"][0]["line"] == 2 and "strict" in called.err
    status = cli("batch", "status", "outputs/rows")
    assert status.status == 0 and "1 done, 1 failed, 0 left" in status.out
    assert "line 2, a-s0-" in status.out and "line 2, a-s0-" in called.err


@pytest.mark.long
def test_of_many_rows_that_cannot_run_a_status_says_where_all_are(
    cli: Cli, wan_folder: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text('{"prompt": "a red circle"}\n' + "nothing\n" * 25)
    cli("batch", manifest, "--model", wan_folder, *SMALL, "--device", "cpu", "--keep-going")
    told = cli("batch", "status", "outputs/rows")
    assert "line 21: it is no JSON" in told.out and "line 22" not in told.out
    assert "and 5 more, which --json tells" in told.out
    assert len(cli("batch", "status", "outputs/rows", "--json").last["failures"]) == 25


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["none.txt"], "there is no manifest none.txt"),
        (["P", "--shard", "0/4"], "--shard must be 1/4 to 4/4"),
        (["P", "--seeds", "4-0"], "--seeds must be such as 0-4"),
        (
            ["P", "--engine", "raj"],
            "--engine must be local, torchrun, ray, not 'raj'; did you mean ray",
        ),
        (["P", "--engine", "torchrun"], "finds no RANK in the environment: start it as `torchrun"),
        (["P", "--workers", "0"], "--workers must be 1 to"),
        (["P", "--retries", "-1"], "--retries must be 0 to"),
        (["P", "--device", "cuda:99"], "no device cuda:99"),
        (["P", "--model", "wan2.1-1.3b"], "line 1: the weights of wan2.1-1.3b are not on this"),
        (["P", "--recipe", "balancd"], "balanced"),
        (["P", "--size", "31x32"], "line 1: "),
        (["P", "--output", "P"], "Not a directory"),
        (["P", "--format", "avi"], "--format must be"),
        (["P", "--nonsense"], "--nonsense"),
        ([], "Missing argument 'manifest'"),
        (["status", "."], "is no folder of a batch"),
    ],
)
def test_what_is_refused(
    cli: Cli, prompts: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], told: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(prompts.parent / "no-cache"))
    given = [str(prompts) if it == "P" else it for it in args]
    called = cli("batch", *given, "--json")
    assert called.status == 2
    assert told.replace(" P", f" {prompts}") in called.complaint, called.complaint
    assert called.last["status"] == "error"
    assert list(Path.cwd().glob("**/*.mp4")) == []


@pytest.mark.long
def test_ctrl_c_is_130_and_says_how_to_go_on(wan_folder: Path, prompts: Path) -> None:
    command = [sys.executable, "-m", "kinora.app", "batch", str(prompts), "--model",
               str(wan_folder), "--size", "96x96", "--frames", "33", "--steps", "400", "--device",
               "cpu", "--output", "out", "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=prompts.parent, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        out = prompts.parent / "out"
        while not list(out.glob(".kinora-batch/*/worker-0-*/*")):
            assert process.poll() is None, typing.cast("Any", process.stderr).read()
        process.send_signal(signal.SIGINT)
        told, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this step" in err and "0 of 3 rows are done" in err
    assert json.loads(told.splitlines()[-1]) == {
        "status": "stopped", "done": 0, "failed": 0, "left": 3}  # fmt: skip
    assert sorted(it.name for it in out.iterdir()) == ["rows.jsonl"]
