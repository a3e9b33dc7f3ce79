"""Plans of models whose weights are not here: by the registry's facts, or by configs alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kinora.pipelines import cards, models
from kinora.pipelines.errors import ModelError
from kinora.pipelines.planning import plan
from kinora.pipelines.request import Request

REGISTERED = [name for name in cards.names() if name != "kinora-tiny"]
SPARSE = ("when=always",)


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without any download."""
    monkeypatch.setattr(models, "_snapshot", lambda _card: None)


@pytest.mark.parametrize("name", REGISTERED)
def test_a_registered_model_is_planned_without_its_weights(name: str) -> None:
    card = cards.find(name)
    planned = plan(Request(prompt="a", model=name, recipe="balanced", settings=SPARSE))
    weights, attention = planned.parts
    assert (weights.part, weights.verdict) == ("weights", "refused")
    assert "are not on this machine: fetch them with `hf download" in weights.why
    assert attention.verdict == "ok" and attention.speedup and attention.workspace_bytes
    assert card.params_b is not None
    assert planned.memory.weights > card.params_b * 2e9 and planned.memory.denoise > 10**8


@pytest.mark.parametrize("name", REGISTERED)
def test_the_facts_of_the_registry_agree_with_diffusers(name: str) -> None:
    """A model built from them, without memory, has as many weights as the card says."""
    import importlib

    import torch

    card = cards.find(name)
    config = next(it for part, it in card.configs.items() if part != "vae")
    given = {key: value for key, value in config.items() if key != "_class_name"}
    library = importlib.import_module("diffusers")
    with torch.device("meta"):
        built = getattr(library, config["_class_name"])(**given)
    experts = 2 if name.endswith("-a14b") else 1
    assert card.params_b is not None
    numel = experts * sum(it.numel() for it in built.parameters())
    assert numel / 1e9 == pytest.approx(card.params_b, rel=0.02)


def test_memory_of_a_card_is_near_that_of_its_configs(model_folders: dict[str, Path]) -> None:
    """Prediction by excerpts of configs is that by the configs."""
    folder = model_folders["wan"]
    there = cards.find(str(folder))
    files = models.locate(there)
    excerpts = {
        part: {**files.folder.config(part), "_class_name": files.folder.parts[part]}
        for part in ("transformer", "vae")
    }
    billions = {part: count / 1e9 for part, count in files.numel.items()}
    card = there.model_copy(
        update={
            "folder": None,
            "repo": "someone/something",
            "params_b": billions.pop("transformer"),
            "configs": excerpts,
            "others_b": billions,
        }
    )
    outline = models.outline(card)
    assert outline.absent is not None and outline.numel == files.numel
    assert outline.folder.config("vae") == excerpts["vae"]


@pytest.fixture(params=["wan", "cogvideox", "flux", "sdxl"])
def bare(
    request: pytest.FixtureRequest, model_folders: dict[str, Path], tmp_path: Path
) -> tuple[Path, Path]:
    """A folder of each family, and the same with configs only."""
    whole, path = model_folders[request.param], tmp_path / "bare"
    ignored = shutil.ignore_patterns("*.safetensors", "tokenizer*", "scheduler*")
    shutil.copytree(whole, path, ignore=ignored)
    return whole, path


def test_a_folder_of_configs_is_planned_as_the_whole_one(bare: tuple[Path, Path]) -> None:
    whole, path = (
        Request(prompt="a", model=str(it), width=32, height=32, recipe="balanced", settings=SPARSE)
        for it in bare
    )
    expected, planned = plan(whole), plan(path)
    weights, *others = planned.parts
    assert weights.verdict == "refused" and "is incomplete" in weights.why
    assert tuple(others) == expected.parts
    assert planned.memory.weights == pytest.approx(expected.memory.weights, rel=0.02)
    assert planned.memory.denoise == expected.memory.denoise
    assert planned.memory.decode == expected.memory.decode


def test_what_is_half_there_is_refused_in_one_line(wan_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "half"
    shutil.copytree(wan_folder, path)
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="transformer/ holds no safetensors file"):
        plan(Request(prompt="a", model=str(path), width=32, height=32))
    for file in path.rglob("*.safetensors"):
        file.unlink()
    (path / "transformer" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"transformer/config\.json is missing"):
        plan(Request(prompt="a", model=str(path), width=32, height=32))
