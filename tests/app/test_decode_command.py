"""`kinora decode`: a record that is true, and latents that are none."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import files, memory, models, sidecar
from kinora.pipelines.decode import decode
from kinora.pipelines.events import Progress

Cli = Callable[..., Any]
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")


@pytest.fixture
def kept(cli: Cli, wan_folder: Path) -> Path:
    """Latents of the tiny Wan pipeline, `work/made/a-red-circle-s0.latents.safetensors`."""
    made = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--keep-latents",
               "--output", "made/", "--json")  # fmt: skip
    return Path(made.last["outputs"][0]["latents"])


def test_another_model_is_named_in_the_record(
    cli: Cli, wan_folder: Path, tmp_path: Path, kept: Path
) -> None:
    before = sidecar.read(kept.parent / "a-red-circle-s0.json")
    assert str(wan_folder) == before.model.name
    other = tmp_path / "other"
    shutil.copytree(wan_folder, other)
    file = other / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    called = cli("decode", kept, "--model", other, "--output", "again/", "--json")
    assert called.status == 0 and "this changed: the model's weights" in called.err
    record = sidecar.read(Path(called.last["outputs"][0]["sidecar"]))
    assert record.model.name == record.request.model == str(other)
    assert record.model.fingerprint != before.model.fingerprint
    assert record.stages_s["denoise"] == pytest.approx(before.stages_s["denoise"], abs=0.02)
    assert record.stages_s["denoise"] > 0 and record.stages_s["text"] > 0
    assert record.latents_sha256 == before.latents_sha256


def test_decoding_without_news_is_silent(cli: Cli, kept: Path) -> None:
    called = cli("decode", kept, "--output", kept.with_name("b.MP4"))
    assert called.status == 0 and "note:" not in called.err
    assert (kept.with_name("b.MP4")).is_file() and (kept.with_name("b.json")).is_file()
    path, latents, *_ = called.out.splitlines()
    assert path == str(kept.with_name("b.MP4")) and latents == f"latents: {kept}"


def test_what_can_be_refused_is_refused_before_anything_is_loaded(
    cli: Cli, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("kinora.pipelines.models.load_part", loaded)
    monkeypatch.setattr("kinora.pipelines.latents.read", loaded)
    refusals = {
        ("--output", kept.parent / "a-red-circle-s0.mp4"): "never overwritten",
        ("--output", "x.avi"): ".avi",
        ("--model", "kinora-tyni"): "did you mean kinora-tiny",
        ("--device", "cuda:99"): "no device cuda:99",
    }
    for options, told in refusals.items():
        called = cli("decode", kept, *options)
        assert called.status == 2 and told in called.complaint, called.complaint
        assert "loading" not in called.err
    assert not Path("outputs").exists()


def test_too_much_memory_is_refused_and_force_goes_on(
    cli: Cli, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little() -> int:
        return 10_000_000

    monkeypatch.setattr(memory, "host_free_bytes", little)
    refused = cli("decode", kept)
    told = ("predicted", "for decoding", "10 MB free for cpu", "--force")
    assert refused.status == 2 and all(part in refused.complaint for part in told)
    assert "denoising" not in refused.complaint and not Path("outputs").exists()
    forced = cli("decode", kept, "--force")
    assert forced.status == 0 and "as --force asks" in forced.err


def test_a_disk_that_is_too_small_is_refused(
    cli: Cli, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little(folder: Path) -> int:
        return 100

    monkeypatch.setattr(files, "free_disk_bytes", little)
    refused = cli("decode", kept)
    assert refused.status == 2 and "of disk free" in refused.complaint
    assert not Path("outputs").exists()


def test_closing_stops_at_the_next_chunk_and_the_latents_stay(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, calls, load_part = threading.Event(), list[int](), models.load_part

    def slow(*_: Any) -> None:
        calls.append(1)
        decoding.set()
        time.sleep(1)  # longer than the test may be kept from closing

    def loaded(*args: Any) -> Any:
        vae = load_part(*args)
        vae.decoder.register_forward_pre_hook(slow)
        return vae

    monkeypatch.setattr(models, "load_part", loaded)
    run = decode(kept, output="again/")
    next(event for event in run if isinstance(event, Progress) and event.stage == "decode")
    assert decoding.wait(60)
    run.close()
    assert len(calls) == 1 and kept.is_file() and not Path("again").exists()


def test_latents_that_are_none(cli: Cli) -> None:
    Path("x.latents.safetensors").write_bytes(b"nothing")
    assert "damaged or no latents" in cli("decode", "x.latents.safetensors").complaint
    assert "kinora decode" in cli("generate", "--from", "x.latents.safetensors").complaint
    assert "no file" in cli("decode", "nowhere").complaint


def test_latents_that_were_changed(cli: Cli, kept: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(kept, framework="pt") as file:
        whole = json.loads(file.metadata()["kinora"])
        latents = file.get_tensor("0.z")
    bogus = {**whole, "decode": {**whole["decode"], "vae_dtype": "bogus"}}
    for tensors, metadata, told in (
        ({"0.z": latents + 1}, whole, "is damaged"),
        ({"foo": latents}, whole, "is damaged"),
        ({"-1.z": latents}, whole, "is damaged"),
        ({"0.z": latents, "7.z": torch.zeros(1)}, whole, "is damaged"),
        ({}, whole, "is damaged"),
        ({"0.z": latents}, bogus, "decode.vae_dtype must be"),
    ):
        save_file(tensors, "changed", {"kinora": json.dumps(metadata)})
        called = cli("decode", "changed", "--json")
        assert called.status == 2 and told in called.complaint, called.complaint
        assert called.last["status"] == "error"
    assert not Path("outputs").exists()
