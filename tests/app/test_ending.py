"""How a command ends: streams that break, signals, faults of our own, files without permission."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.app.ending import stdout
from kinora.pipelines.errors import GenerationError

Cli = Callable[..., Any]
KINORA = (sys.executable, "-m", "kinora.app")
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")


def test_tables_are_not_cut_in_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert stdout().width == 160
    monkeypatch.setenv("COLUMNS", "90")
    assert stdout().width == 90


def test_a_fault_is_one_line_and_a_traceback_on_demand(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("kinora.pipelines.cards.find", broken)
    for ask in (("generate", "a", "--json"), ("models", "--json")):
        called = cli(*ask)
        assert called.status == 1 and "ZeroDivisionError: by zero" in called.complaint
        assert called.last["status"] == "error"
    monkeypatch.setenv("KINORA_DEBUG", "1")
    assert "Traceback" in cli("generate", "a").err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_line() -> None:
    for ask in (["models"], ["models", "--json"], ["models", "show", "kinora-tiny"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*KINORA, *ask], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2
        assert done.stderr == "kinora: stdout cannot be written (No space left on device)\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*KINORA, "models"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ascii_stdout_takes_every_text() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ask = [*KINORA, "models", "show", "wan2.1-1.3b"]
    done = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True)
    assert r"9, \u2026" in done.stdout and done.stderr == ""


def test_a_broken_stderr_does_not_end_the_run(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as broken, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", broken)
        called = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--json")
    assert called.status == 0 and Path(called.last["outputs"][0]["path"]).is_file()


def started(wan_folder: Path, tmp_path: Path, *size: str) -> subprocess.Popen[str]:
    """A run that would take minutes, in a process of its own; it is denoising."""
    process = subprocess.Popen(
        [*KINORA, "generate", "a red circle", "--model", str(wan_folder), *size,
         "--output", str(tmp_path / "out"), "--json"],
        cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "reading the prompt" in line:
            break
    return process


@pytest.mark.long
def test_ctrl_c_and_sigterm_stop_within_a_step_and_leave_nothing(
    wan_folder: Path, tmp_path: Path
) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        # Ten steps of some tenths of a second each: every one of them is told.
        size = ("--size", "128x128", "--frames", "65", "--steps", "10")
        with started(wan_folder, tmp_path, *size) as process:
            assert process.stderr is not None and process.stdout is not None
            for line in process.stderr:
                if "step 3/10" in line:
                    break
            process.send_signal(number)
            err = process.stderr.read()
            out = process.stdout.read()
        assert process.returncode == status, err
        assert "step 5/10" not in err
        again = "; Ctrl-C again stops now" if number == signal.SIGINT else ""
        assert err.endswith(f"stopping after this step{again}\nstopped\n"), err
        assert "Traceback" not in err
        assert json.loads(out.splitlines()[-1]) == {"status": "stopped"}
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_json", [True, False])
def test_a_stop_while_decoding_keeps_the_latents_and_names_them(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    def interrupted(decoder: Any, *args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # longer than the signal may take to arrive
        return forward(decoder, *args, **options)

    forward = WanDecoder3d.forward
    ask = ("generate", "a red circle", "--model", wan_folder, *SMALL, *["--json"] * as_json)
    with monkeypatch.context() as patched:
        patched.setattr(WanDecoder3d, "forward", interrupted)
        called = cli(*ask)
    (kept,) = Path("outputs").iterdir()
    assert called.status == 130
    told = f"stopped; its latents are kept: finish with `kinora decode {kept}`"
    assert called.err.splitlines()[-1] == told
    if as_json:
        assert called.last == {"status": "stopped", "latents": str(kept)}
    assert cli("decode", kept).status == 0


@pytest.mark.long
def test_ctrl_c_names_the_videos_that_are_finished(wan_folder: Path, tmp_path: Path) -> None:
    size = ("--size", "128x128", "--frames", "65", "--steps", "3", "--num-videos", "3")
    with started(wan_folder, tmp_path, *size) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if "denoising [2/3] step 1/3" in line:
                break
        process.send_signal(signal.SIGINT)
        err, out = process.stderr.read(), process.stdout.read()
    assert process.returncode == 130, err
    (line,) = out.splitlines()
    last = json.loads(line)
    assert last["status"] == "stopped"
    assert [Path(output["path"]).name for output in last["outputs"]] == ["a-red-circle-s0.mp4"]
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert there == ["a-red-circle-s0.json", "a-red-circle-s0.mp4"]


def test_a_later_failure_names_the_videos_that_are_finished(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = itertools.cycle([False, True])

    def every_second_fails(tensors: Any, doing: str, dtype: str) -> None:
        if doing == "denoising" and next(fails):
            raise GenerationError(f"{doing} failed")

    monkeypatch.setattr("kinora.pipelines.frames.check_finite", every_second_fails)
    ask = ("generate", "a red circle", "--model", wan_folder, *SMALL, "--num-videos", 3)
    failed = cli(*ask, "--json")
    assert failed.status == 2 and failed.last["status"] == "error"
    (output,) = failed.last["outputs"]
    assert Path(output["path"]).is_file() and output["seed"] == 0
    told = cli(*ask, "--output", "other")
    assert told.status == 2 and told.out == "other/a-red-circle-s0.mp4\n"


def test_ctrl_c_while_python_imports_is_one_line(tmp_path: Path) -> None:
    interrupted = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    (tmp_path / "typer.py").write_text(interrupted + "os.kill(os.getpid(), signal.SIGINT)")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*KINORA, "models", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert json.loads(done.stdout) == {"status": "stopped"}


@pytest.mark.long
@pytest.mark.parametrize("before", [[], ["notes.txt"]])
def test_a_second_ctrl_c_does_not_wait_for_the_step_and_leaves_nothing(
    wan_folder: Path, tmp_path: Path, before: list[str]
) -> None:
    for name in before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("not ours")
    size = ("--size", "512x512", "--frames", "65", "--steps", "2", "--force")
    with started(wan_folder, tmp_path, *size) as process:  # a step takes many seconds
        began = time.perf_counter()
        for _ in range(2):
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert time.perf_counter() - began < 4
    assert "Traceback" not in err and err.count("stopping after this step") == 1
    assert json.loads(out.splitlines()[-1]) == {"status": "stopped"}
    assert [path.name for path in tmp_path.rglob("*") if path.name != "out"] == before
    assert (tmp_path / "out").exists() == bool(before)


def restricted(*args: object) -> subprocess.CompletedProcess[str]:
    """Call `kinora` without the superuser's right to read and write everything."""
    prefix: list[str] = []
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("running as root, and there is no setpriv to give its rights up")
        prefix = [setpriv, "--bounding-set=-dac_override,-dac_read_search"]
    command = [*prefix, *KINORA, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.long
def test_what_may_not_be_read_or_written_is_one_line(wan_folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for name in ("record.json", "a.latents.safetensors"):
        secret.mkdir(exist_ok=True)
        (secret / name).write_text("{}")
    weights = tmp_path / "weights"
    shutil.copytree(wan_folder, weights)
    (weights / "transformer/diffusion_pytorch_model.safetensors").chmod(0)
    part = tmp_path / "part"
    shutil.copytree(wan_folder, part)
    (part / "vae").chmod(0)
    secret.chmod(0)
    try:
        for args in (
            ("generate", "a", "--model", secret / "model"),
            ("generate", "a", "--model", weights),
            ("generate", "a", "--model", part),
            ("generate", "--from", secret / "record.json"),
            ("generate", "a", "--model", wan_folder, *SMALL, "--output", secret / "x.mp4"),
            ("decode", secret / "a.latents.safetensors"),
            ("models", "show", part),
        ):
            done = restricted(*args, "--json")
            assert done.returncode == 2, (args, done.stderr)
            complaints = [line for line in done.stderr.splitlines() if line.startswith("kinora: ")]
            assert len(complaints) == 1 and "(Permission denied)" in complaints[0], done.stderr
            assert json.loads(done.stdout.splitlines()[-1])["status"] == "error"
    finally:
        for folder in (secret, part / "vae"):
            folder.chmod(0o755)
