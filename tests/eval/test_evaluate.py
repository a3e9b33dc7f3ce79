"""An evaluation as a whole: a broken video among many, what is known already, processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kinora.eval.evaluate as module
from kinora.eval.cache import Cache
from kinora.eval.clips import EvalError
from kinora.eval.evaluate import Progress, evaluate
from kinora.eval.registry import METRICS, chosen
from kinora.eval.report import Report
from kinora.eval.result import ok
from kinora.eval.scoring import Job, Scored, score
from kinora.pipelines.latents import DecodeState, Latents, to_bytes
from kinora.pipelines.latents import sha256 as latents_sha256
from kinora.pipelines.sidecar import read
from kinora.pipelines.world.grammar import phrase

Film = Callable[..., Path]
Clips = list[tuple[Any, Any]]


def run(*args: Any, **options: Any) -> tuple[list[Progress], Report]:
    *events, found = evaluate(*args, **options)
    assert isinstance(found, Report)
    return [it for it in events if isinstance(it, Progress)], found


@pytest.fixture
def folders(truth: Clips, film: Film, tmp_path: Path) -> tuple[Path, Path]:
    """Three short clips without loss, and the same ones with noise."""
    rng = np.random.default_rng(0)
    for index, (scene, video) in enumerate(truth[:3]):
        clip = video[:5, ::2, ::2]
        prompt = phrase(scene.description)
        hurt = np.clip(clip + rng.normal(0, 4, clip.shape), 0, 255).astype(np.uint8)
        model = {
            "name": "kinora-tiny", "pipeline": "WanPipeline", "repo": None,
            "fingerprint": "sha256:0", "vae_dtype": "float32",
            "scheduler": "UniPC", "scheduler_sha256": "0",
        }  # fmt: skip
        film(tmp_path / "dense" / f"d{index}.png", clip, prompt, index, model=model)
        film(tmp_path / "fast" / f"f{index}.png", hurt, prompt, index, model=model)
    return tmp_path / "fast", tmp_path / "dense"


def test_fidelity_of_a_folder(folders: tuple[Path, Path]) -> None:
    fast, dense = folders
    events, found = run([fast], reference=dense, metrics=("psnr", "ssim"))
    assert [it.done for it in events] == [1, 2, 3] and found.status == "ok"
    assert found.totals["psnr"].n == 3 and 34 < (found.totals["psnr"].mean or 0) < 40
    assert not found.totals["psnr"].notes  # nothing was lost in encoding
    told = found.to_json()
    assert told["clips"][0]["reference"].endswith("d0.png") and told["clips"][0]["seed"] == 0
    assert told["provenance"]["coverage"] == {"psnr": "3 of 3", "ssim": "3 of 3"}
    assert told["provenance"]["seeds"] == [0, 1, 2]
    (sampler,) = told["provenance"]["samplers"]
    for part in ("kinora-tiny, ", " at 16 fps, ", "30 steps of UniPC, guidance 4, "):
        assert part in sampler
    assert told["provenance"]["environments"] == {}  # none but ours
    json.dumps(told, allow_nan=False)
    _, same = run([dense], reference=dense, metrics=("psnr",))
    assert same.totals["psnr"].mean == 100.0


def test_a_lossy_comparison_is_labelled(truth: Clips, film: Film, tmp_path: Path) -> None:
    film(tmp_path / "dense" / "a.png", truth[0][1][:3], "a red ring", 1)
    film(tmp_path / "fast" / "a.mp4", truth[0][1][:3], "a red ring", 1)
    _, found = run([tmp_path / "fast"], reference=tmp_path / "dense", metrics=("psnr",))
    (note,) = found.totals["psnr"].notes
    assert note.startswith("lossy: mp4 against png;")


def test_one_bad_video_does_not_stop_the_others(
    folders: tuple[Path, Path], film: Film, tmp_path: Path
) -> None:
    fast, dense = folders
    (fast / "a.mp4").write_bytes(b"no video at all")
    (dense / "a.mp4").write_bytes(b"either")
    film(fast / "long.png", np.zeros((7, 64, 64, 3), np.uint8), "a red ring", 70)
    film(dense / "long.png", np.zeros((5, 64, 64, 3), np.uint8), "a red ring", 70)
    film(fast / "wide.png", np.zeros((5, 64, 80, 3), np.uint8), "a red ring", 71)
    film(dense / "wide.png", np.zeros((5, 64, 64, 3), np.uint8), "a red ring", 71)
    film(fast / "alone.png", np.zeros((5, 64, 64, 3), np.uint8), "a red ring", 99)
    _, found = run([fast, tmp_path / "gone.mp4"], reference=dense, metrics=("psnr",))
    assert found.status == "partial"
    total = found.totals["psnr"]
    assert (total.n, total.asked, total.mean) == (3, 7, None) and total.partial_mean
    told = "\n".join(found.failures())
    assert "a.mp4 cannot be read as a video" in told
    assert "long.png has 7 frames of 64x64, its reference" in told and "5 frames of 64x64" in told
    assert "wide.png has 5 frames of 80x64" in told
    assert "has no reference for" in told and "alone.png" in told
    assert "there is no" in told and len(found.failures()) == 5


def test_what_was_scored_is_not_scored_again_unless_it_changed(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, film: Film
) -> None:
    fast, dense = folders
    asked: list[Job] = []

    def counted(job: Job) -> Scored:
        asked.append(job)
        return score(job)

    monkeypatch.setattr(module, "score", counted)
    cache = tmp_path / "cache" / "scores.jsonl"
    options: dict[str, Any] = {"reference": dense, "cache": cache}
    _, first = run([fast], metrics=("psnr", "cosine"), **options)
    assert len(asked) == 3
    events, second = run([fast], metrics=("psnr", "cosine"), **options)
    assert len(asked) == 3 and [it.known for it in events] == [1, 2, 3]
    assert second.to_json() == first.to_json()
    run([fast], metrics=("psnr", "ssim"), **options)  # only what is new
    assert [[it.name for it in job.metrics] for job in asked[3:]] == [["ssim"]] * 3
    prompt = read(dense / "d1.json").request.prompt
    film(dense / "d1.png", np.zeros((5, 64, 64, 3), np.uint8), prompt, 1)
    _, changed = run([fast], metrics=("psnr",), **options)
    assert len(asked) == 7 and asked[6].clip.path.name == "f1.png"
    assert changed.totals["psnr"].mean != first.totals["psnr"].mean


def test_a_cache_that_was_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    cache = Cache(path)
    for name in "ab":
        cache.put([name], ok(1.5, "a note", frames=[1.0]))
    path.write_bytes(path.read_bytes()[:-30])
    again = Cache(path)
    assert again.get(["a"]) == ok(1.5, "a note", frames=[1.0]) and again.get(["b"]) is None
    again.put(["b"], ok(2.0))
    assert Cache(path).get(["b"]) == ok(2.0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(EvalError, match="cannot keep scores"):
        Cache(tmp_path / "folder")


def test_failures_are_not_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fast, _ = folders
    (tmp_path / "other").mkdir()
    film_of_nothing = tmp_path / "other" / "x.mp4"
    film_of_nothing.write_bytes(b"")
    cache = tmp_path / "scores.jsonl"
    run([film_of_nothing, fast / "f0.png"], suites=("world",), cache=cache)
    kept = [json.loads(line)["result"]["status"] for line in cache.read_text().splitlines()]
    assert kept and "failed" not in kept


def test_the_worlds_judge_by_sidecar_or_by_file(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, dense = folders
    _, found = run([dense])  # without a reference: the world
    assert set(found.totals) == {it for it in METRICS if it.startswith("world.")}
    assert found.totals["world.color"].mean == 1.0
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"d0.png": "a castle at dusk", "d9.png": "a red ring"}))
    _, other = run([dense], prompts=file)
    reasons = [it.results["world.color"].reason for it in other.clips]
    assert "castle" in reasons[0] and "no prompt is known" in reasons[1]
    assert other.status == "failed" and "d9.png, which is not among" in other.failures()[0]


def test_garbage_counts_as_not_correct(film: Film, tmp_path: Path) -> None:
    film(tmp_path / "a.png", np.full((5, 64, 64, 3), 127, np.uint8), "a red ring", 0)
    _, found = run([tmp_path], suites=("world",))
    assert found.totals["world.all_correct"].mean == 0.0
    assert "counted as 0" in found.totals["world.all_correct"].notes[0]
    assert found.totals["world.color"].mean is None


def test_latents_where_they_were_kept(folders: tuple[Path, Path]) -> None:
    fast, dense = folders
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(1, 4, 2, 8, 8, generator=rng)
    for folder, name, values in ((dense, "d0", base), (fast, "f0", base * 1.25)):
        calls = [{"z": values}]
        record = read(folder / f"{name}.json")
        record = record.model_copy(update={"latents_sha256": latents_sha256(calls)})
        state = DecodeState(vae_dtype="float32", tiling=False, slicing=False, normalised=True)
        data = to_bytes(Latents(record, state, calls))
        (folder / f"{name}.latents.safetensors").write_bytes(data)
    _, found = run([fast], reference=dense, metrics=("latent_relative_l1", "latent_cosine"))
    first, second = found.clips[0].results, found.clips[1].results
    assert first["latent_relative_l1"].score == pytest.approx(0.25)
    assert first["latent_cosine"].score == pytest.approx(1.0)
    assert "its latents were not kept" in second["latent_cosine"].reason
    (fast / "f0.latents.safetensors").write_bytes(b"damaged")
    _, broken = run([fast / "f0.png"], reference=dense, metrics=("latent_cosine",))
    assert "is damaged or no latents file" in broken.clips[0].results["latent_cosine"].reason


def ends_its_process(job: Job) -> Scored:
    """Stands for `score`: one file takes the process with it."""
    if job.clip.path.name == "f3.png":
        os._exit(7)
    return score(job)


@pytest.mark.long
def test_several_processes_give_the_same_and_survive_the_end_of_one(
    folders: tuple[Path, Path], film: Film, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, dense = folders
    for index in range(3, 6):
        for folder, name in ((fast, "f"), (dense, "d")):
            clip = np.full((2, 16, 16, 3), 9, np.uint8)
            film(folder / f"{name}{index}.png", clip, "a red ring", index)
    alone = run([fast], reference=dense, metrics=("psnr",), workers=1)[1]
    events, both = run([fast], reference=dense, metrics=("psnr",), workers=2)
    assert both.to_json() == alone.to_json() and [it.done for it in events] == list(range(1, 7))
    monkeypatch.setattr(module, "score", ends_its_process)
    _, found = run([fast], reference=dense, metrics=("psnr",), workers=2)
    assert (found.totals["psnr"].n, found.status) == (5, "partial")
    assert found.failures() == [f"{fast / 'f3.png'}: {module.CRASHED}"]


def test_what_cannot_be_asked_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fast, dense = folders
    for options, told in (
        ({"metrics": ("pnsr",)}, "no metric 'pnsr': did you mean psnr?"),
        ({"suites": ("wrold",)}, "no suite 'wrold': did you mean world?"),
        ({"metrics": ("ssim",)}, "ssim compares with a reference: give --reference DIR"),
        ({"reference": tmp_path / "gone"}, "is no folder"),
    ):
        with pytest.raises(EvalError, match=told):
            run([fast], **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvalError, match="holds no video"):
        run([tmp_path / "empty"], reference=dense)
    with pytest.raises(EvalError, match="there are no VIDEOS"):
        run([])


def test_metrics_are_each_taken_once() -> None:
    found = chosen(("psnr", "world.color", "psnr"), ("fidelity",), reference=True)
    names = [it.name for it in found]
    assert len(names) == len(set(names)) and names[0] == "psnr" and "world.color" in names
