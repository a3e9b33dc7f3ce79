"""Damaged model folders: refused in one line, never run with random parts in place of weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")
INDEX = "model_index.json"
VAE = "vae/diffusion_pytorch_model.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def truncate(file: Path) -> None:
    """Cut the last bytes off, as a broken download does."""
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a safetensors file in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def drop(file: Path, word: str) -> None:
    """Take the tensors whose names contain `word` out of a file, which stays a valid one."""

    def change(tensors: dict[str, Any]) -> None:
        gone = [name for name in tensors if word in name]
        assert gone
        for name in gone:
            del tensors[name]

    edit_tensors(file, change)


def retokenize(folder: Path, **changes: Any) -> None:
    """Change the model of a tokenizer."""
    file = folder / "tokenizer/tokenizer.json"
    model = {**json.loads(file.read_text())["model"], **changes}
    rewrite(file, model={key: value for key, value in model.items() if value is not None})


STRANGE: dict[str, Any] = {"base_dim": None, "decoder_block_out_channels": ["a"]}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / INDEX).write_text("{"), ["model_index.json", "JSON"]),
        (lambda f: (f / INDEX).write_text("[]"), ["no JSON object"]),
        (lambda f: (f / INDEX).write_text("{}"), ["names no pipeline"]),
        (lambda f: shutil.rmtree(f / "vae"), ["vae/ is missing"]),
        (lambda f: (f / "vae/config.json").unlink(), ["vae/config.json is missing"]),
        (lambda f: (f / WEIGHTS).unlink(), ["transformer/ holds no safetensors"]),
        (lambda f: (f / WEIGHTS).rename(f / "transformer/x.bin"), ["pickled", "safetensors only"]),
        (lambda f: truncate(f / WEIGHTS), ["truncated", "download it again"]),
        (lambda f: (f / WEIGHTS).write_bytes(b"abc"), ["truncated"]),
        (lambda f: (f / WEIGHTS).write_bytes(b"\2" + b"\0" * 7 + b"[]"), ["no readable"]),
        (lambda f: (f / "vae/config.json").write_text("{}"), ["cannot be loaded", "shape"]),
        (lambda f: rewrite(f / INDEX, _class_name="WarpPipeline"), ["WarpPipeline", "diffusers"]),
        (lambda f: rewrite(f / INDEX, _class_name="WanVACEPipeline"), ["text alone"]),
        (lambda f: rewrite(f / INDEX, _class_name="AutoencoderKLWan"), ["none of diffusers"]),
        (lambda f: rewrite(f / INDEX, scheduler=["subprocess", "Popen"]), ["'subprocess'"]),
        (lambda f: rewrite(f / INDEX, vae=["diffusers", "AutoModel"]), ["AutoModel, which"]),
        (lambda f: drop(f / "text_encoder/model.safetensors", "SelfAttention.q"), ["lack", ".q."]),
        (lambda f: drop(f / "text_encoder/model.safetensors", "DenseReluDense"), ["lack", "more"]),
        (lambda f: drop(f / WEIGHTS, "proj_out.bias"), ["lack the weight proj_out.bias"]),
        (lambda f: drop(f / VAE, "decoder.conv_in.bias"), ["lack the weight decoder.conv_in.bias"]),
        (lambda f: rewrite(f / "transformer/config.json", patch_size=[0, 0, 0]), ["(0, 0, 0)"]),
        (lambda f: rewrite(f / "transformer/config.json", patch_size=[]), ["damaged config"]),
        (lambda f: rewrite(f / "vae/config.json", scale_factor_spatial=0), ["vae_spatial is 0"]),
        (lambda f: (f / "vae/config.json").write_text("[" * 200_000), ["JSON"]),
        (lambda f: retokenize(f, vocab=None), ["tokenizer.json", "damaged"]),
        (lambda f: rewrite(f / "tokenizer/tokenizer.json", added_tokens=[1]), ["damaged"]),
        (lambda f: rewrite(f / "text_encoder/config.json", d_kv="8"), ["cannot be loaded", "d_kv"]),
        (lambda f: rewrite(f / INDEX, scheduler=[]), ["cannot be loaded"]),
        (lambda f: rewrite(f / "vae/config.json", **STRANGE), ["config of the wrong form"]),
    ],
)  # fmt: skip
def test_damaged_model_folders(
    cli: Cli, wan_folder: Path, tmp_path: Path, damage: Callable[[Path], object], told: list[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    damage(folder)
    called = cli("generate", "a red circle", "--model", folder, *SMALL, "--output", "out")
    assert called.status == 2
    assert all(part in called.complaint for part in told), called.complaint
    assert not Path("out").exists()
    shown = cli("models", "show", folder)
    assert shown.status in (0, 2) and "Traceback" not in shown.err


def test_an_autoencoder_that_gives_nan_is_an_error_and_keeps_the_latents(
    cli: Cli, wan_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    edit_tensors(folder / VAE, lambda tensors: tensors["decoder.conv_in.bias"].fill_(float("nan")))
    made = cli("generate", "a red circle", "--model", folder, *SMALL, "--json")
    assert made.status == 2 and "decoding gave" in made.complaint
    kept = Path(made.last["latents"])
    again = cli("decode", kept)
    assert again.status == 2 and "decoding gave" in again.complaint
    assert [path.name for path in Path("outputs").iterdir()] == [kept.name]
    whole = cli("decode", kept, "--model", wan_folder)
    assert whole.status == 0 and "the model's weights" in whole.err
