"""The registry, the rules of sizes and lengths, damaged weights, and the memory estimate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import cards, folder, memory, models
from kinora.pipelines.errors import ModelError

TOKENS = {
    "kinora-tiny": 2304,
    "wan2.1-1.3b": 32_760,
    "wan2.1-14b": 75_600,
    "wan2.2-a14b": 75_600,
    "cogvideox-5b": 17_550,
    "hunyuanvideo": 118_800,
    "flux-dev": 4096,
}


@pytest.mark.parametrize("name", cards.names())
def test_every_default_is_allowed(name: str) -> None:
    card = cards.find(name)
    assert card.nearest_size(card.width, card.height) == (card.width, card.height)
    assert card.nearest_frames(card.frames) == card.frames
    assert card.title and card.licence
    if card.repo is not None:
        assert card.download_gb and card.memory_gb and card.params_b
        assert card.repo in card.download_command()
    assert set(card.estimates) <= set(type(card).model_fields)
    assert card.outside_training(card.width, card.height, card.frames) is None


@pytest.mark.parametrize(("name", "tokens"), TOKENS.items())
def test_tokens_at_the_default(name: str, tokens: int) -> None:
    card = cards.find(name)
    assert card.grid(card.width, card.height, card.frames).tokens == tokens


@pytest.mark.parametrize("name", cards.names())
def test_every_pipeline_class_takes_what_the_card_says(name: str) -> None:
    card = cards.find(name)
    found = models.pipeline_class(
        folder.ModelFolder(Path("x"), card.pipeline, {"vae": "AutoencoderKL"})
    )
    accepted = models.call_parameters(found)
    assert set(card.call) <= accepted
    assert ("num_frames" in accepted) == (card.kind == "video")
    assert "negative_prompt" in accepted


def test_the_nearest_is_allowed_and_no_allowed_one_is_nearer() -> None:
    card = cards.find("cogvideox-2b").model_copy(update={"patch": (1, 2, 3)})
    for given in range(1, 200):
        width, height = card.nearest_size(given, given)
        assert width % 24 == 0 and height % 16 == 0
        assert abs(width - given) <= 12 or width == 24
        assert abs(height - given) <= 8 or height == 16
        frames = card.nearest_frames(given)
        assert frames % 8 == 1 and abs(frames - given) <= 4
    assert card.nearest_frames(-5) == 1 and card.nearest_size(-5, 0) == (24, 16)


def test_limits_of_the_position_embedding_hold() -> None:
    card = cards.find("wan2.1-1.3b")
    assert card.nearest_size(99_999, 480) == (1024 * 16, 480)
    assert card.nearest_frames(99_999) == 1023 * 4 + 1


def test_sizes_and_lengths_outside_training_are_told() -> None:
    card = cards.find("kinora-tiny")
    for width, height, frames in ((96, 256, 1), (256, 96, 33), (128, 128, 5)):
        assert card.outside_training(width, height, frames) is None
    for width, height, frames in ((80, 128, 33), (128, 80, 33), (272, 256, 33), (128, 128, 37)):
        told = card.outside_training(width, height, frames) or ""
        assert f"{width}x{height}, {frames} frames" in told and card.trained_range() in told
    only_size = card.model_copy(update={"trained_frames": None})
    assert only_size.outside_training(96, 96, 10_001) is None
    assert (
        only_size.outside_training(16, 16, 1) and only_size.trained_range() == "96 to 256 px a side"
    )
    unknown = only_size.model_copy(update={"trained_px": None})
    assert unknown.outside_training(16, 16, 10_001) is None and unknown.trained_range() == ""


@pytest.mark.parametrize(
    ("family", "multiple", "stride", "kind"),
    [
        ("wan", 16, 4, "video"),
        ("cogvideox", 16, 8, "video"),
        ("flux", 4, 1, "image"),
        ("sdxl", 8, 1, "image"),
    ],
)
def test_folders_give_their_own_rules(
    model_folders: dict[str, Path], family: str, multiple: int, stride: int, kind: str
) -> None:
    card = cards.find(str(model_folders[family]))
    assert card.multiple_px == (multiple, multiple)
    assert card.frame_stride == stride and card.kind == kind


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_class_that_the_registry_does_not_know(wan_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(wan_folder, path)
    rewrite(path / "model_index.json", _class_name="MochiPipeline")
    card = cards.find(str(path))
    assert card.kind == "video" and card.frames == 33 and "width" in card.estimates


@pytest.mark.parametrize(
    ("vae", "spatial", "temporal"),
    [
        ({"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}, 8, 4),
        ({"scale_factor_spatial": 16, "scale_factor_temporal": 4}, 16, 4),
        ({"block_out_channels": [1, 1, 1, 1]}, 8, None),
    ],
)
def test_geometry_of_autoencoders(
    tmp_path: Path, vae: dict[str, Any], spatial: int, temporal: int | None
) -> None:
    for part, config in (("vae", vae), ("transformer", {"patch_size": 2, "patch_size_t": 1})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    parts = {"vae": "AutoencoderKL", "transformer": "X"}
    found = folder.geometry(folder.ModelFolder(tmp_path, "X", parts))
    assert found["vae_spatial"] == spatial and found.get("vae_temporal") == temporal
    assert found["patch"] == (1, 2, 2)


def test_ltx_autoencoders_compress_32_and_8_fold(tmp_path: Path) -> None:
    import diffusers

    vae: Any = getattr(diffusers, "AutoencoderKLLTXVideo")  # noqa: B009 - untyped export
    config = {"spatio_temporal_scaling": [True, True, True, False], "patch_size": 4}
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    parts = {"vae": "AutoencoderKLLTXVideo"}
    found = folder.geometry(folder.ModelFolder(tmp_path, "LTXPipeline", parts))
    real = vae(block_out_channels=(2, 2, 2, 2), decoder_block_out_channels=(2, 2, 2, 2),
               layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)  # fmt: skip
    assert found["vae_spatial"] == real.spatial_compression_ratio
    assert found["vae_temporal"] == real.temporal_compression_ratio


def test_only_half_precision_weights_are_a_variant(sdxl_half: Path) -> None:
    weights = models.locate(cards.find(str(sdxl_half)))
    assert weights.variant == "fp16"
    loaded = models.load(weights, models.Place("cpu", "float16", "float16"))
    assert str(loaded.pipe.unet.dtype) == "torch.float16"


@pytest.fixture
def sdxl_half(model_folders: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny SDXL as `hf download --include '*.fp16.safetensors'` would leave it."""
    path = tmp_path / "half"
    shutil.copytree(model_folders["sdxl"], path)
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return path


def test_the_fingerprint_sees_a_changed_weight(wan_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(wan_folder, path)
    before = folder.fingerprint(folder.ModelFolder.open(wan_folder).check()[0])
    assert folder.fingerprint(folder.ModelFolder.open(path).check()[0]) == before
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert folder.fingerprint(folder.ModelFolder.open(path).check()[0]) != before


def test_sharded_weights_need_every_shard(wan_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(wan_folder, path)
    part = path / "transformer"
    whole = part / "diffusion_pytorch_model.safetensors"
    whole.rename(part / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"b\.safetensors is missing"):
        folder.ModelFolder.open(path).check()


def test_amounts_are_never_nothing() -> None:
    told = {1_000: "1 kB", 10**6: "1 MB", 36 * 10**6: "36 MB", 10**9: "1.0 GB", 10**11: "100 GB"}
    assert {count: memory.amount(count) for count in told} == told
    estimate = memory.Estimate(weights=0, denoise=0, decode=5 * 10**6, libraries=10**8)
    assert estimate.explain() == "5 MB for decoding, 100 MB for the libraries"


def test_the_workspace_of_sparse_attention_adds_to_a_step_and_not_to_decoding() -> None:
    estimate = memory.Estimate(weights=1, denoise=10, decode=15, libraries=0, workspace=3)
    assert estimate.peak == 16
    assert replace(estimate, workspace=8).peak == 19
    assert "8 MB for sparse attention" in replace(estimate, workspace=8 * 10**6).explain()
    assert replace(estimate, pruning=8).peak == 1 + 10 + 3 + 8
    assert "8 MB for pruned tokens" in replace(estimate, pruning=8 * 10**6).explain()


def test_memory_grows_with_the_request_and_counts_every_weight(wan_folder: Path) -> None:
    card = cards.find(str(wan_folder))
    weights = models.locate(card)

    def predict(size: int, frames: int, dtype: str = "float32") -> memory.Estimate:
        return memory.estimate(
            weights.folder,
            weights.numel,
            card.grid(size, size, frames),
            pixels=(frames, size, size),
            dtype=dtype,
            vae_dtype=dtype,
            resident=False,
        )

    decoding = memory.estimate(
        weights.folder,
        weights.numel,
        None,
        pixels=(5, 32, 32),
        dtype="float32",
        vae_dtype="float32",
        resident=False,
    )
    vae = sum(file.bytes for file in weights.files if file.part == "vae")
    assert (decoding.weights, decoding.denoise) == (vae, 0)
    assert decoding.decode == predict(32, 5).decode
    on_disk = sum(file.bytes for file in weights.files)
    assert predict(32, 5).weights == on_disk == 2 * predict(32, 5, "float16").weights
    assert predict(64, 5).peak > predict(32, 5).peak
    assert predict(32, 9).denoise > predict(32, 5).denoise
    assert 0 < memory.host_free_bytes() < 10**14
