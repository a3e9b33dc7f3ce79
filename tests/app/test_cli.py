"""The rest of the command line: help, the registry, doctor, its frozen flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

from kinora.app.cli import app
from kinora.pipelines import cards

Cli = Callable[..., Any]

FLAGS = {
    "generate": {
        "prompt", "model", "size", "frames", "steps", "guidance", "negative-prompt", "seed",
        "num-videos", "output", "format", "fps", "device", "dtype", "keep-latents", "force", "from",
        "json", "recipe", "set", "strict", "image",
    },
    "decode": {"latents", "model", "output", "format", "device", "force", "json"},
    "plan": {
        "model", "recipe", "set", "size", "frames", "steps", "device", "dtype", "json",
    },
    "recipes": {"json"},
    "methods": {"json"},
    "policies": {"json"},
    "inspect": {
        "prompt", "model", "recipe", "set", "layer", "step", "head", "query", "output", "size",
        "frames", "steps", "guidance", "negative-prompt", "seed", "device", "dtype", "json",
        "image",
    },
    "doctor": {"json"},
    "models": {"json"},
    "ui": {"output", "host", "port", "open", "previews"},
    "bench": set(),
    "batch": set(),
    "eval": set(),
    "compare": {
        "recipes", "prompts", "output", "seeds", "model", "size", "frames", "steps", "guidance",
        "negative-prompt", "strict", "format", "device", "dtype", "force", "json", "image",
    },
    "calibrate": {
        "model", "method", "output", "keep", "tile", "prompt", "size", "frames", "steps", "seed",
        "device", "dtype", "json", "image",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [["--help"], ["generate", "--help"], ["decode", "-h"], ["models", "show", "--help"],
     ["inspect", "--help"], ["batch", "--help"], ["batch", "run", "-h"], ["batch", "nowhere.txt"],
     ["doctor", "--help"], ["eval", "score", "--help"], ["compare", "--help"],
     ["--version"], ["models"],
     ["models", "show", "kinora-tiny"],
     ["generate", ""], ["decode", "nowhere"]],
)  # fmt: skip
def test_help_and_refusals_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from kinora.app.cli import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_flags_are_frozen() -> None:
    """A new knob belongs into a recipe; whoever adds a flag changes this on purpose."""
    group: Any = typer.main.get_command(app)
    found = {
        name: {max(param.opts, key=len).lstrip("-") for param in command.params}
        for name, command in group.commands.items()
    }
    assert found == FLAGS


def test_every_option_that_takes_a_value_tells_its_default() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert command.help.count("\n") == 0 and len(command.help) < 70
        for param in command.params:
            assert param.help and param.help[-1] in ".]"
            if param.param_type_name == "option" and not (param.is_flag or param.required):
                assert "[default: " in param.help, (name, param.name)


def test_version(cli: Cli) -> None:
    called = cli("--version")
    assert (called.status, called.out) == (0, f"kinora {metadata.version('kinora')}\n")


def test_a_bare_call_shows_the_help(cli: Cli) -> None:
    called = cli()
    assert called.status == 0 and "Usage: kinora" in called.out


def test_unknown_commands_and_options_are_one_line(cli: Cli) -> None:
    assert "Did you mean 'generate'" in cli("genrate").complaint
    assert cli("decode").status == 2


def test_the_registry_lists_every_model(cli: Cli) -> None:
    listed = cli("models")
    assert all(name in listed.out for name in cards.names())
    found = cli("models", "--json").last["models"]
    assert [model["name"] for model in found] == cards.names()


def test_brackets_in_a_licence_are_text(cli: Cli) -> None:
    assert "FLUX.1 [dev] Non-Commercial" in cli("models", "show", "flux-dev").out


def test_show_tells_rules_and_words(cli: Cli, wan_folder: Path) -> None:
    shown = cli("models", "show", wan_folder)
    assert "multiples of 16" in shown.out and "4k+1" in shown.out
    content = cli("models", "show", wan_folder, "--json").last
    assert content["words"] == sorted(content["words"]) and "circle" in content["words"]
    shown = cli("models", "show", "kinora-tiny")
    assert "trained   96 to 256 px a side, 1 to 33 frames" in shown.out
    assert "words     a above" in shown.out
    refused = cli("models", "show", "wan2.1-1.4b", "--json")
    assert refused.status == 2 and "wan2.1-1.3b" in refused.last["error"]


def test_doctor_says_what_is_there_and_why_not(cli: Cli) -> None:
    called = cli("doctor")
    assert called.status == 0
    assert all(line.split()[0] in ("PASS", "WARN") for line in called.out.splitlines())
    report = cli("doctor", "--json").last
    subjects = {finding["subject"]: finding for finding in report["findings"]}
    assert report["works"] is True
    assert {"torch", "diffusers", "memory", "disk", "triton", "encoders"} <= set(subjects)
    assert all(finding["text"] for finding in report["findings"])


def test_doctor_fails_where_a_library_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if name == "av":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("kinora.app.doctor.metadata.version", version)
    called = cli("doctor", "--json")
    assert called.status == 1
    assert json.dumps("FAIL") in json.dumps(called.last) and called.last["works"] is False


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_doctor_fails_where_torch_is_broken_and_reports_the_rest(
    tmp_path: Path, error: str
) -> None:
    (tmp_path / "torch.py").write_text(f'raise {error}("libcudart.so.12: cannot open it")')
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "kinora.app", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    found = {it["subject"]: it for it in report["findings"]}
    assert report["works"] is False and len(found) == len(report["findings"])
    assert found["torch"]["verdict"] == "FAIL"
    assert "libcudart.so.12: cannot open it" in found["torch"]["text"]
    assert found["encoders"]["verdict"] == "PASS" and {"memory", "diffusers"} <= set(found)


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_told_otherwise(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert cli("--help").status == 0
    assert os.environ["OMP_WAIT_POLICY"] == (given or "PASSIVE")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["methods", "blade"], "`kinora methods show blade` shows one, `kinora methods` lists"),
        (["models", "--json", "tiny"], "`kinora models show tiny` shows one"),
        (["models", "show"], "`kinora models show --help` tells more"),
        (["bench", "--foo"], "`kinora bench --help` tells more"),
        (["plan", "show"], "(show); `kinora plan --help` tells more"),
        (["doktor"], "`kinora --help` tells more"),
        (["ui", "--port", "99999"], "65535"),
        (["plan", "--frames", "many"], "valid integer; `kinora plan"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_where_to_look(cli: Cli, args: list[str], told: str) -> None:
    called = cli(*args)
    assert called.status == 2 and told in called.complaint
    assert "Input should be" not in called.complaint and ".;" not in called.complaint


def test_every_command_says_what_it_is_for(cli: Cli) -> None:
    listed = cli("--help").out.partition("Commands:")[2].splitlines()
    assert len(listed) > 10 and all(len(it.split()) > 3 for it in listed if it.strip())
