"""Recipes against the dense run: what is said, what is refused, which case is shown first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinora.eval.clips import EvalError
from kinora.eval.compare import HEADLINE, compare
from kinora.eval.comparison import Comparison
from kinora.pipelines.world.grammar import phrase

Film = Callable[..., Path]
Make = Callable[..., Path]

SPARSE = {"dense_kernel": "fastest", "attention": {"method": "blade", "from_step": 0.2}}
EXACT = {"dense_kernel": "fastest"}


def attention(density: float = 1.0, **kernels: int) -> dict[str, Any]:
    """A receipt of 10 calls, 4 of them dense and by `kernels`, where those are given."""
    sparse = 6 if density < 1 else 0
    return {
        "asked": "something", "layers": 1, "calls": 10,
        "kernels": {"triton": sparse} if sparse else {}, "dense": {"as asked": 10 - sparse},
        "fallbacks": [], "density": density, "density_by_layer": [density],
        "dense_kernels": kernels,
    }  # fmt: skip


def model(**told: str) -> dict[str, Any]:
    return {"name": "kinora-tiny", "pipeline": "WanPipeline", "repo": None,
            "fingerprint": "sha256:0", "vae_dtype": "float32", **told}  # fmt: skip


def receipt(recipe: dict[str, Any], denoise_s: float, load_s: float = 0.0, **told: Any) -> Any:
    return {
        "recipe": recipe, "strict": False, "steps": 30, "attention": None,
        "peak_memory_bytes": 10**9,
        "stages_s": {"load": load_s, "text": 0.5, "denoise": denoise_s, "decode": 0.5}, **told,
    }  # fmt: skip


@pytest.fixture
def make(film: Film, tmp_path: Path, clips: Any) -> Make:
    """Write a folder of three runs without loss: true clips, or those that `damage` makes."""
    drawn = list(clips(3, frames=9, height=64, width=64))

    def write(
        name: str,
        recipe: dict[str, Any],
        denoise_s: float = 9.0,
        damage: Callable[[int, Any], Any] = lambda _, frames: frames,
        request: dict[str, Any] | None = None,
        told: dict[str, Any] | None = None,
        **record: Any,
    ) -> Path:
        folder = tmp_path / name
        for index, (scene, frames) in enumerate(drawn):
            film(
                folder / f"{index}.png", damage(index, frames), phrase(scene.description), index,
                request={"recipe": recipe, **(request or {})},
                receipt=receipt(recipe, denoise_s, 20.0 if not index else 0.0, **(told or {})),
                **record,
            )  # fmt: skip
        return folder

    return write


def compared(**folders: Path) -> Comparison:
    *_, last = compare(folders)
    assert isinstance(last, Comparison)
    json.dumps(last.to_json(), allow_nan=False)
    return last


def test_equal_videos_keep_everything_and_gain_what_the_receipts_say(make: Make):
    dense = make("dense", {})
    told = {"attention": attention(0.5)}
    fast = make("fast", {"attention": {"method": "blade", "from_step": 0.2}}, 4.0, told=told)
    found = compared(dense=dense, fast=fast)
    (one,) = found.recipes
    assert found.status == "ok" and one.ruling == "kept"
    headline = one.quality[HEADLINE]
    assert headline.ratio == 1 and headline.difference is not None and headline.sure
    assert (headline.difference.low, headline.difference.high) == (0, 0)
    assert one.fidelity["psnr"].mean == 100
    assert one.cost is not None and one.cost.density == 0.5 and one.cost.timed == 2
    gains = one.to_json(found.dense_cost)["gain"]
    assert gains == {"text": 1, "denoise": 9 / 4, "decode": 1, "all three": 2}


def test_damage_is_below_the_rule_and_its_case_comes_first(make: Make):
    def grey_last(index: int, frames: Any) -> Any:
        return np.full_like(frames, 128) if index == 2 else frames

    found = compared(dense=make("dense", {}), fast=make("fast", {}, damage=grey_last))
    (one,) = found.recipes
    assert one.ruling == "below" and one.quality[HEADLINE].ratio == pytest.approx(2 / 3)
    assert found.cases[0].identity[1] == 2
    assert found.cases[0].difference("fast", HEADLINE, "dense") == -1


def test_times_are_set_against_the_dense_run_of_the_same_kernel(make: Make):
    found = compared(
        dense=make("dense", {}, 9.0),
        exact=make("exact", EXACT, 7.0, told={"attention": attention(cudnn=10)}),
        fast=make("fast", SPARSE, 3.0, told={"attention": attention(0.4, cudnn=4)}),
    )
    exact, fast = found.recipes
    assert (exact.against, fast.against) == ("dense", "exact")
    told = fast.to_json(found.dense_cost)
    assert told["gain"]["all three"] == 10 / 4 and told["gain_against"]["all three"] == 2
    assert exact.ruling == fast.ruling == "kept"


def test_times_of_a_recipe_that_changed_nothing_are_called_noise(make: Make):
    told = {"attention": attention()}
    found = compared(
        dense=make("dense", {}, 9.0),
        same=make("same", SPARSE, 4.0, told=told),
        other=make("other", SPARSE, 4.0, told=told, latents_sha256="1"),
        fast=make("fast", SPARSE, 4.0, told={"attention": attention(0.9)}),
    )
    assert [it.same for it in found.recipes] == [True, False, False]
    exact = make("exact", EXACT, 4.0, told={"attention": attention(cudnn=10)})
    assert not compared(dense=make("dense", {}), exact=exact).notes()
    (note,) = found.notes()
    assert note.startswith("same computed just what dense did: 2.00× is how much other work")


def test_runs_whose_dense_kernels_differ_are_refused(make: Make):
    fast = make("fast", SPARSE, told={"attention": attention(0.4, cudnn=4)})
    found = compared(dense=make("dense", {}), fast=fast)
    (one,) = found.recipes
    assert one.ruling == "refused" and one.cost is None and found.status == "partial"
    assert "dense calls by the cudnn kernel, those of dense by the stock kernel" in one.reason
    assert one.reason.endswith("2 more") and found.failures() == [f"fast: {one.reason}"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"request": {"steps": 20}}, "steps 20, dense 30"),
        ({"request": {"guidance": 1.0}}, "guidance 1.0, dense 4.0"),
        ({"request": {"negative_prompt": "grey"}}, "negative_prompt 'grey', dense None"),
        ({"request": {"dtype": "float16"}}, "dtype 'float16', dense 'float32'"),
        (
            {"machine": {"device": "other", "threads": 1, "versions": {}}},
            "made on other, dense on cpu",
        ),
        ({"machine": {"device": "cpu", "threads": 2, "versions": {}}}, "made by 2 threads"),
        (
            {"machine": {"device": "cpu", "threads": 1, "versions": {"torch": "1"}}},
            "torch 1, dense None",
        ),
        (
            {"model": {"name": "kinora-tiny", "pipeline": "WanPipeline", "repo": None,
                       "fingerprint": "sha256:1", "vae_dtype": "float32"}},
            "weights sha256:1, dense sha256:0",
        ),
        ({"model": model(scheduler="Euler", scheduler_sha256="0")}, "scheduler Euler, dense UniPC"),
        (
            {"model": model(scheduler="UniPC", scheduler_sha256="1")},
            "UniPC with settings 1…, dense 0…",
        ),
    ],
)  # fmt: skip
def test_runs_that_differ_in_more_than_the_recipe_are_refused(
    make: Make, change: dict[str, Any], told: str
):
    scheduled = {"model": model(scheduler="UniPC", scheduler_sha256="0")}
    found = compared(dense=make("dense", {}, **scheduled), fast=make("fast", {}, **change))
    (one,) = found.recipes
    assert one.ruling == "refused" and told in one.reason and not one.quality[HEADLINE].kept


def test_earlier_records_that_name_no_scheduler_are_compared(make: Make):
    scheduled = {"model": model(scheduler="UniPC", scheduler_sha256="0")}
    (one,) = compared(dense=make("dense", {}), fast=make("fast", {}, **scheduled)).recipes
    assert one.ruling == "kept"


def test_a_run_without_its_fellow_is_refused_either_way(make: Make):
    dense, fast = make("dense", {}), make("fast", {})
    for file in fast.glob("1.*"):
        file.unlink()
    (one,) = compared(dense=dense, fast=fast).recipes
    assert one.ruling == "refused" and "fast has no run of the prompt and seed of" in one.reason
    (other,) = compared(dense=fast, fast=dense).recipes
    assert other.ruling == "refused"
    assert other.reason.endswith("1.png: dense has no run of its prompt and seed")


def test_a_video_that_cannot_be_read_leaves_no_verdict(make: Make):
    dense, fast = make("dense", {}), make("fast", {})
    (fast / "1.png").write_bytes(b"torn")
    found = compared(dense=dense, fast=fast)
    (one,) = found.recipes
    assert one.ruling == "none" and "1 of 3 pairs have no score" in one.reason
    assert one.fidelity["psnr"].status == "partial"


def test_what_is_no_set_of_runs_is_told_in_a_line(make: Make, tmp_path: Path):
    dense, fast = make("dense", {}), make("fast", SPARSE)
    empty = tmp_path / "empty"
    empty.mkdir()
    for folders, told in (
        ({"dense": dense}, "1 folders were given"),
        ({"dense": dense, "fast": empty}, "fast: .*empty holds no video"),
        ({"dense": dense, "fast": tmp_path / "gone"}, "gone of the recipe fast is no folder"),
        ({"fast": fast, "dense": dense}, "are not dense: name the dense ones first"),
    ):
        with pytest.raises(EvalError, match=told):
            list(compare(folders))
    (fast / "stray.png").write_bytes((dense / "0.png").read_bytes())
    with pytest.raises(EvalError, match="are of different recipes"):
        list(compare({"dense": dense, "fast": fast}))
    (dense / "twice.png").write_bytes((dense / "0.png").read_bytes())
    with pytest.raises(EvalError, match="have one prompt and seed"):
        list(compare({"dense": dense, "fast": dense}))
    (dense / "twice.png").write_bytes(b"nothing")
    with pytest.raises(EvalError, match="has no record of how it was made"):
        list(compare({"dense": dense, "fast": dense}))


def test_dense_runs_of_two_samplers_are_refused_at_once(make: Make, film: Film):
    dense = make("dense", {})
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    film(dense / "9.png", frames, "a red circle", 9, request={"steps": 4, "recipe": {}})
    with pytest.raises(EvalError, match="are not alike: steps 4, dense 30"):
        list(compare({"dense": dense, "fast": dense}))
