"""Metrics by networks: the Fréchet distance, CLIP score, and the runner of LPIPS, FID and FVD."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from kinora.eval.clips import EvalError
from kinora.eval.evaluate import evaluate
from kinora.eval.learned import client
from kinora.eval.learned.frechet import distance
from kinora.eval.learned.spec import LIBRARIES, Tools, weights_folder
from kinora.eval.report import Report

Film = Callable[..., Path]


def gaussian(mean: Any, covariance: Any, count: int, seed: int) -> Any:
    """`count` features of exactly this mean and covariance."""
    drawn = np.random.default_rng(seed).normal(size=(count, len(mean)))
    drawn -= drawn.mean(0)
    drawn = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False))).T
    return drawn @ np.linalg.cholesky(covariance).T + mean


def test_the_distance_of_gaussians_is_the_closed_form() -> None:
    one = gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]), 50, 0)
    other = gaussian([3.0, 1.0, 0.0], np.diag([4.0, 1.0, 9.0]), 80, 1)
    # Σ of squared differences of means, and of standard deviations where axes are shared.
    assert distance(one, other) == pytest.approx(9 + 0 + 4 + 1 + 1 + 0)
    rng = np.random.default_rng(2)
    first, second = (it @ it.T + np.eye(4) for it in rng.normal(size=(2, 4, 4)))
    root = scipy.linalg.sqrtm(first @ second)
    expected = float(np.trace(first + second - 2 * root).real) + 4
    found = distance(gaussian(np.ones(4), first, 30, 3), gaussian(np.zeros(4), second, 90, 4))
    assert found == pytest.approx(expected)


def test_the_distance_of_few_features_of_many_values() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(5, 200)), rng.normal(size=(7, 200)) + 1
    assert distance(one, one) == pytest.approx(0, abs=1e-9)
    assert distance(one, other) == pytest.approx(distance(other, one))
    # The same by the whole covariances, whose product's eigenvalues are not negative.
    covariances = [np.cov(it, rowvar=False) for it in (one, other)]
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
    gap = one.mean(0) - other.mean(0)
    expected = gap @ gap + sum(map(np.trace, covariances)) - 2 * np.sqrt(eigenvalues).sum()
    assert distance(one, other) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("shapes", "told"), [(((1, 3), (5, 3)), "at least two"), (((5, 3), (5, 4)), "as many values")]
)
def test_what_has_no_distance(shapes: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        distance(*(np.zeros(it) for it in shapes))
    with pytest.raises(ValueError, match="not finite"):
        distance(np.full((3, 2), np.nan), np.zeros((3, 2)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, a tokenizer of letters, and 8 tokens at most."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{it}</w>" for it in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({it: k for k, it in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 8,
    }  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=8, bos_token_id=52, eos_token_id=53,
        pad_token_id=53, **shared,
    )  # fmt: skip
    picture = CLIPVisionConfig(image_size=32, patch_size=8, **shared)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=picture.to_dict(), projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    size: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def run(*args: Any, **options: Any) -> Report:
    *_, found = evaluate(*args, **options)
    assert isinstance(found, Report)
    json.dumps(found.to_json(), allow_nan=False)
    return found


def noise(seed: int, frames: int = 4, side: int = 48) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), np.uint8)


def test_clip_score_is_the_models_own_cosine(checkpoint: Path, film: Film, tmp_path: Path) -> None:
    frames = noise(0)
    film(tmp_path / "a.png", frames, "a cat", 0)
    film(tmp_path / "b.png", frames, "a dog that is long", 1)
    tools = Tools(clip=str(checkpoint))
    found = run([tmp_path], metrics=["clip_score"], tools=tools)
    model: Any = CLIPModel.from_pretrained(checkpoint)
    pictures: Any = CLIPImageProcessorPil.from_pretrained(checkpoint)
    words: Any = CLIPTokenizer.from_pretrained(checkpoint)
    inputs = {**words("a cat", return_tensors="pt"), **pictures(list(frames), return_tensors="pt")}
    with torch.inference_mode():
        cosines = model(**inputs).logits_per_image.flatten() / model.logit_scale.exp()
    expected = (100 * cosines.clamp(0)).tolist()
    first, second = (it.results["clip_score"] for it in found.clips)
    assert first.details["frames"] == pytest.approx(expected, abs=1e-4)
    assert first.score == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert not first.notes and "the first 8 of" in second.notes[0]


def test_a_checkpoint_that_is_not_here_is_told_and_not_kept(
    checkpoint: Path, film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    film(tmp_path / "a.png", noise(0), "a cat", 0)
    (tmp_path / "nothing").mkdir()
    cache = tmp_path / "scores.jsonl"
    for name in (str(tmp_path / "nothing"), "someone/no-such-clip"):
        tools = Tools(clip=name)
        found = run([tmp_path / "a.png"], metrics=["clip_score"], tools=tools, cache=cache)
        result = found.clips[0].results["clip_score"]
        assert result.status == "skipped" and f"hf download {name}" in result.reason
        (missing,) = result.details["missing_weights"]
        assert set(missing) == {"file", "address", "size", "licence", "command"}
        # Nothing is known of any checkpoint but the usual one.
        assert (missing["size"], missing["licence"]) == (None, None)
        assert "(size not known, licence not known; " in result.reason
    assert not cache.read_text()
    tools = Tools(clip=str(checkpoint))
    found = run([tmp_path / "a.png"], metrics=["clip_score"], tools=tools, cache=cache)
    assert found.clips[0].results["clip_score"].status == "ok" and cache.read_text()


LPIPS = """
import os, torch
class LPIPS(torch.nn.Module):
    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex" and not verbose
        print("a library that talks")
    def forward(self, a, b):
        assert a.min() >= -1 and a.max() <= 1
        if b[0].max() > 0.99:
            os._exit(7)
        if (b[0] == -1).all():
            return torch.full((len(a), 1, 1, 1), float("nan"))
        return (a - b).abs().mean((1, 2, 3), keepdim=True)
"""
INCEPTION = """
import torch
class InceptionV3(torch.nn.Module):
    BLOCK_INDEX_BY_DIM = {2048: 3}
    def __init__(self, blocks):
        super().__init__()
        assert blocks == [3]
    def forward(self, x):
        assert x.min() >= 0 and x.max() <= 1
        return [torch.nn.functional.adaptive_avg_pool2d(x, 2)]
"""


class I3D(torch.nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool):
        assert rescale and resize and return_features
        return torch.nn.functional.adaptive_avg_pool3d(x, (1, 2, 2)).flatten(1)


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the libraries, and files where weights belong."""
    site = tmp_path / "site"
    for name, source in {
        "lpips/__init__.py": LPIPS,
        "pytorch_fid/__init__.py": "",
        "pytorch_fid/inception.py": INCEPTION,
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv(client.PYTHON_VARIABLE, sys.executable)
    weights_folder().mkdir(parents=True)
    for library in LIBRARIES.values():
        for file in library.files:
            (weights_folder() / file.path).touch()
    with pytest.warns(DeprecationWarning):
        torch.jit.script(I3D()).save(str(weights_folder() / "i3d_torchscript.pt"))
    return site


@pytest.fixture(autouse=True)
def no_runner_is_left() -> Any:
    yield
    for it in client._runners.values():  # pyright: ignore[reportPrivateUsage]
        it.close()
    client._runners.clear()  # pyright: ignore[reportPrivateUsage]


def pairs(film: Film, folder: Path, count: int, frames: int = 4) -> tuple[Path, Path]:
    for index in range(count):
        made = noise(index, frames) // 2
        film(folder / "dense" / f"{index}.png", made, "a cat", index)
        film(folder / "fast" / f"{index}.png", made + np.uint8(3), "a cat", index)
    return folder / "fast", folder / "dense"


def test_lpips_is_the_librarys_mean_over_frames(
    libraries: Path, film: Film, tmp_path: Path
) -> None:
    fast, dense = pairs(film, tmp_path, 2)
    cache = tmp_path / "scores.jsonl"
    found = run([fast], reference=dense, metrics=["lpips"], cache=cache)
    assert found.status == "ok"
    environment = found.provenance["environments"]["lpips"]
    assert environment == f"python {sys.executable}, device auto"
    for one in found.clips:
        result = one.results["lpips"]
        assert result.score == pytest.approx(3 / 127.5, rel=1e-5)
        assert len(result.details["frames"]) == 4
    again = run([fast], reference=dense, metrics=["lpips"], cache=cache)
    assert again.to_json() == found.to_json()
    same = run([dense], reference=dense, metrics=["lpips"])
    assert same.totals["lpips"].mean == 0.0


def test_one_clip_that_ends_the_runner_loses_no_other(
    libraries: Path, film: Film, tmp_path: Path
) -> None:
    fast, dense = pairs(film, tmp_path, 3)
    film(dense / "1.png", np.full((4, 48, 48, 3), 255, np.uint8), "a cat", 1)
    film(dense / "2.png", np.zeros((4, 48, 48, 3), np.uint8), "a cat", 2)
    film(tmp_path / "fast" / "9.png", noise(9, side=16), "a cat", 9)
    film(tmp_path / "dense" / "9.png", noise(9, side=16), "a cat", 9)
    found = run([fast], reference=dense, metrics=["lpips"])
    first, ended, odd, small = (it.results["lpips"] for it in found.clips)
    assert first.status == "ok"
    assert ended.status == "failed" and "ended with status 7" in ended.reason
    assert odd.status == "failed" and "one finite one a frame" in odd.reason
    assert small.status == "skipped" and "at least 32 px" in small.reason


def test_fid_and_fvd_are_of_all_videos_together(
    libraries: Path, film: Film, tmp_path: Path
) -> None:
    fast, dense = pairs(film, tmp_path, 4, frames=10)
    cache = tmp_path / "scores.jsonl"
    found = run([fast], reference=dense, metrics=["fid", "fvd", "psnr"], cache=cache)
    # Every feature is 3 more (of 255, or of 1): covariances are the same.
    assert found.totals["fvd"].mean == pytest.approx(12 * 9, rel=1e-4)
    assert found.totals["fid"].mean == pytest.approx(12 * (3 / 255) ** 2, rel=1e-3)
    assert found.status == "ok" and all(set(it.results) == {"psnr"} for it in found.clips)
    assert (found.totals["fid"].n, found.totals["fid"].asked) == (4, 4)
    notes = found.totals["fid"].notes + found.totals["fvd"].notes
    assert "fid of 40 frames" in notes[0] and "fvd of 4 videos" in notes[1]
    again = run([fast], reference=dense, metrics=["fid", "fvd", "psnr"], cache=cache)
    assert again.to_json() == found.to_json()
    same = run([dense], reference=dense, metrics=["fid", "fvd"])
    assert [it.mean for it in same.totals.values()] == pytest.approx([0, 0], abs=1e-6)


def test_a_broken_video_makes_a_distance_partial(
    libraries: Path, film: Film, tmp_path: Path
) -> None:
    fast, dense = pairs(film, tmp_path, 3, frames=10)
    (fast / "broken.mp4").write_bytes(b"no video")
    film(fast / "short.png", noise(7, 3), "a cat", 7)
    total = run([fast], reference=dense, metrics=["fvd"]).totals["fvd"]
    assert (total.status, total.n, total.asked, total.mean) == ("partial", 3, 5, None)
    assert total.partial_mean and total.reason.startswith("without 2 files")
    only = run([fast / "broken.mp4"], reference=dense, metrics=["fvd"])
    assert only.status == "failed" and "broken.mp4 cannot be read" in only.failures()[0]


@pytest.mark.parametrize("metric", LIBRARIES)
def test_missing_weights_are_told_and_nothing_starts(
    libraries: Path, film: Film, tmp_path: Path, metric: str
) -> None:
    fast, dense = pairs(film, tmp_path, 1)
    (file,) = LIBRARIES[metric].files
    (weights_folder() / file.path).unlink()
    cache = tmp_path / "scores.jsonl"
    found = run([fast], reference=dense, metrics=[metric], cache=cache)
    total = found.totals[metric]
    assert total.status == "skipped" and total.mean is None and not cache.read_text()
    for part in (str(weights_folder() / file.path), file.url, file.size, file.licence, "curl -fL"):
        assert part and part in total.reason
    assert not client._runners  # pyright: ignore[reportPrivateUsage]


def test_libraries_that_are_not_there_are_told(
    libraries: Path, film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, dense = pairs(film, tmp_path, 1)
    (libraries / "lpips" / "__init__.py").write_text("import torchvision_of_nobody")
    found = run([fast], reference=dense, metrics=["lpips"]).totals["lpips"]
    assert found.status == "skipped" and "cannot import torchvision_of_nobody" in found.reason
    (libraries / "pytorch_fid" / "inception.py").write_text("raise RuntimeError('broken\\nhere')")
    found = run([fast], reference=dense, metrics=["fid"]).totals["fid"]
    assert found.status == "failed" and "RuntimeError: broken here" in found.reason
    with pytest.raises(EvalError, match=r"gone is no interpreter: give .* with lpips"):
        run([fast], reference=dense, metrics=["lpips"], tools=Tools(python="gone"))
    monkeypatch.delenv(client.PYTHON_VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(client.sys, "executable", str(tmp_path / "python"))
    found = run([fast], reference=dense, metrics=["lpips"]).totals["lpips"]
    assert found.status == "skipped" and "install uv" in found.reason
    with pytest.raises(EvalError, match="lpips compares with a reference"):
        run([fast], metrics=["lpips"])


def test_the_lock_is_of_the_script() -> None:
    header = client.RUNNER.read_text().partition("# ///\n")[0].partition("# /// script\n")[2]
    wanted = tomllib.loads("\n".join(it.removeprefix("#")[1:] for it in header.splitlines()))
    lock = tomllib.loads(client.LOCK.read_text())
    named = {f"{it['name']}{it['specifier']}" for it in lock["manifest"]["requirements"]}
    assert named == set(wanted["dependencies"])
    locked = {it["name"]: it["version"] for it in lock["package"]}
    assert (locked["lpips"], locked["pytorch-fid"]) == ("0.1.4", "0.3.0")


def test_torchvision_is_not_imported_here() -> None:
    assert "torchvision" not in sys.modules
