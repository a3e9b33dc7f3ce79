"""Recipes in `generate` and in `plan`: what runs is told, what cannot run is refused before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import memory, models, sidecar
from kinora.pipelines.errors import AccelerationError, MemoryLimitError, RecipeError
from kinora.pipelines.events import STAGES, Notice
from kinora.pipelines.generate import generate
from kinora.pipelines.planning import plan
from kinora.pipelines.request import Request
from kinora.pipelines.run import Output, Run

Ask = Callable[..., Request]
SPARSE = ("attention.tile=64x64", "attention.keep=0.3", "when=always")


@pytest.fixture
def ask(wan_folder: Path, tmp_path: Path) -> Ask:
    """A request for 512 tokens, 5 steps, on the tiny Wan pipeline; keywords change it."""

    def make(**fields: Any) -> Request:
        small = {"prompt": "a red circle", "model": str(wan_folder), "width": 128, "height": 128}
        small |= {"frames": 5, "steps": 5, "output": str(tmp_path / "out"), "recipe": "balanced"}
        return Request.model_validate({**small, **fields})

    return make


def finish(request: Request, **options: Any) -> tuple[Output, ...]:
    *_, last = generate(request, **options)
    assert isinstance(last, Run)
    return last.outputs


def test_the_receipt_says_what_ran_and_stands_in_both_records(ask: Ask) -> None:
    (output,) = finish(ask(settings=SPARSE))
    receipt = output.receipt
    assert receipt is not None and receipt.attention is not None
    assert receipt.steps == 5 and receipt.peak_memory_bytes
    assert receipt.attention.kernels == {"cpu": 4 * 2 * 2}
    assert receipt.attention.dense == {"in the first 20% of the steps": 2 * 2}
    assert receipt.recipe["attention"]["keep"] == 0.3
    for record in (sidecar.read(output.sidecar), sidecar.read(output.path)):
        assert record.receipt is not None and record.receipt.attention == receipt.attention
        assert record.request.recipe == receipt.recipe and record.request.settings == ()


def test_precision_is_predicted_run_told_and_kept(ask: Ask) -> None:
    request = ask(settings=(*SPARSE, "attention.qk=int8"))
    (part,) = plan(request).parts
    assert "by the cpu kernel in int8 x input; " in part.why and part.speedup
    assert "queries and keys in int8" in part.asked
    (output,) = finish(request)
    record = sidecar.read(output.sidecar)
    assert record.receipt is not None and record.receipt.attention is not None
    assert record.receipt.attention.precision == "int8 x input"
    assert record.request.recipe["attention"]["qk"] == "int8"
    assert any("by the cpu kernel in int8 x input; " in it for it in record.receipt.words())


def test_a_sidecar_with_a_recipe_makes_the_video_again(ask: Ask) -> None:
    (output,) = finish(ask(settings=SPARSE))
    record = sidecar.read(output.sidecar)
    (again,) = finish(record.request.request(), original=record)
    assert again.identical is True
    (dense,) = finish(ask(recipe="dense"), original=record)
    assert dense.identical is None and dense.frames_sha256 != output.frames_sha256


def test_a_record_from_before_recipes_reads_as_dense(ask: Ask) -> None:
    (output,) = finish(ask(recipe="dense"))
    content = json.loads(output.sidecar.read_text())
    for name in ("recipe", "settings", "strict"):
        del content["request"][name]
    content["stages_s"] = content.pop("receipt")["stages_s"]
    output.sidecar.write_text(json.dumps(content))
    record = sidecar.read(output.sidecar)
    assert record.receipt is not None and record.receipt.attention is None
    assert record.stages_s == content["stages_s"]
    (again,) = finish(record.request.request(), original=record)
    assert again.identical is True


def test_a_record_with_its_times_beside_the_receipt_is_read(ask: Ask) -> None:
    (output,) = finish(ask(settings=SPARSE))
    expected = sidecar.read(output.sidecar)
    content = json.loads(output.sidecar.read_text())
    content["stages_s"] = content["receipt"].pop("stages_s")
    output.sidecar.write_text(json.dumps(content))
    assert sidecar.read(output.sidecar) == expected and set(expected.stages_s) == set(STAGES)


def test_a_record_from_before_dense_beginnings_is_sparse_from_the_start(ask: Ask) -> None:
    (output,) = finish(ask(settings=(*SPARSE, "attention.from_step=0")))
    content = json.loads(output.sidecar.read_text())
    for key in ("request", "receipt"):
        del content[key]["recipe"]["attention"]["from_step"]
    output.sidecar.write_text(json.dumps(content))
    record = sidecar.read(output.sidecar)
    (again,) = finish(record.request.request(), original=record)
    assert again.identical is True
    assert again.receipt is not None and again.receipt.attention is not None
    assert again.receipt.attention.dense == {}


def test_the_dense_recipe_is_bitwise_the_stock_pipeline_and_says_so(ask: Ask) -> None:
    import importlib

    import torch

    from kinora.pipelines.frames import from_result, sha256

    request = ask(recipe="dense")
    (output,) = finish(request)
    pipe = importlib.import_module("diffusers").DiffusionPipeline.from_pretrained(request.model)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        request.prompt,
        width=128,
        height=128,
        num_frames=5,
        num_inference_steps=5,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="pt",
    )
    assert sha256(from_result(stock)) == output.frames_sha256
    assert output.receipt is not None and output.receipt.attention is None
    assert output.receipt.words() == ["nothing accelerated: the stock pipeline ran"]


def test_runs_on_one_shelf_do_not_see_each_other(ask: Ask) -> None:
    shelf = models.Shelf()
    dense = finish(ask(recipe="dense"), shelf=shelf)
    finish(ask(settings=SPARSE), shelf=shelf)
    again = finish(ask(recipe="dense"), shelf=shelf)
    assert dense[0].frames_sha256 == again[0].frames_sha256


def test_each_video_has_a_receipt_of_its_own(ask: Ask) -> None:
    for output in finish(ask(settings=SPARSE, num_videos=2)):
        assert output.receipt is not None and output.receipt.attention is not None
        assert output.receipt.attention.calls == 5 * 2 * 2


def test_strict_ends_a_run_that_falls_back_and_leaves_nothing(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Almost nothing is left out: predicted to lose.
    settings = ("attention.keep=0.8", "attention.tile=64x64")
    (output,) = finish(ask(settings=settings))
    assert output.receipt is not None and output.receipt.attention is not None
    assert "predicted to take" in output.receipt.attention.fallbacks[0]
    output.path.unlink()
    output.sidecar.unlink()
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))  # it is known before
    with pytest.raises(AccelerationError, match="strict: attention would not run as asked"):
        finish(ask(settings=settings, strict=True))
    assert not list((tmp_path / "out").iterdir())


def test_a_model_without_known_attention_is_refused_before_it_is_loaded(
    ask: Ask, unknown_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match="PixArtTransformer2DModel cannot be accelerated yet"):
        finish(ask(model=str(unknown_folder)))


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "sdxl"])
def test_what_is_predicted_is_what_runs(
    ask: Ask, model_folders: dict[str, Path], family: str
) -> None:
    frames = {"wan": 5, "cogvideox": 9, "flux": 1, "sdxl": 1}[family]
    request = ask(model=str(model_folders[family]), frames=frames, settings=SPARSE)
    (part,) = plan(request).parts
    assert part.verdict == "ok" and part.speedup is not None
    (output,) = finish(request)
    assert output.receipt is not None and output.receipt.attention is not None
    # A ragged last tile, which is always kept where it holds text, is smaller than predicted.
    assert output.receipt.attention.density == pytest.approx(part.density, abs=0.03)


def test_a_recipe_that_accelerates_nothing_is_told(ask: Ask) -> None:
    events = generate(ask(settings=("attention.from_layer=90",)))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any("the recipe accelerates nothing here: all calls run dense" in it for it in notices)


def test_a_plan_loads_nothing_and_tells_refusals(
    ask: Ask, unknown_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    most = ("attention.method=top-blocks", "attention.keep=0.9", "attention.tile=64x64")
    (part,) = plan(ask(settings=most)).parts
    assert part.verdict == "idle" and part.speedup == 1
    assert part.why.startswith("all calls run dense") and part.why.endswith(
        "because keep 0.9 is all of 8 tiles"
    )
    (part,) = plan(ask(settings=("attention.from_layer=90",))).parts
    assert part.verdict == "idle" and "in the first 90 layers" in part.why
    (part,) = plan(ask(settings=("attention.keep=0.8", "attention.tile=64x64"))).parts
    assert part.verdict == "adjusted" and "all calls run dense because" in part.why
    (part,) = plan(ask(settings=("attention.tile=64x64", "when=always"))).parts
    assert part.verdict == "ok" and "it loses" in part.why
    assert plan(ask(recipe="dense")).parts == ()
    parts = plan(ask(model=str(unknown_folder))).parts
    assert [it.part for it in parts] == ["attention", "dense kernel"]
    assert all(it.verdict == "refused" and it.speedup is None for it in parts)
    told = plan(ask(model=str(unknown_folder))).to_json()
    assert json.loads(json.dumps(told))["parts"][0]["verdict"] == "refused"


def test_a_dense_kernel_is_planned_refused_and_told(
    ask: Ask, unknown_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = ask(recipe="dense", settings=("dense_kernel=flash",))
    (part,) = plan(baseline).parts
    assert (part.part, part.asked, part.verdict) == ("dense kernel", "flash", "ok")
    (output,) = finish(baseline)
    receipt = output.receipt
    assert receipt is not None and receipt.recipe["dense_kernel"] == "flash"
    assert receipt.words()[:3] == [
        "asked: attention by the flash kernel",
        "ran: all 20 attention calls dense",
        "20 calls dense as asked",
    ]
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    attention, kernel = plan(ask(settings=(*SPARSE, "dense_kernel=sage"))).parts
    assert attention.verdict == "ok" and kernel.verdict == "refused"
    with pytest.raises(RecipeError, match=r"sage cannot run on cpu: .*; available are sdpa, flash"):
        finish(ask(recipe="dense", settings=("dense_kernel=sage",)))
    with pytest.raises(RecipeError, match="PixArtTransformer2DModel cannot be accelerated yet"):
        settings = ("dense_kernel=flash",)
        finish(ask(model=str(unknown_folder), recipe="dense", settings=settings))


def test_memory_of_sparse_attention_is_in_the_plan_and_in_the_check_of_a_run(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, dense = ask(settings=SPARSE, width=256, height=256), ask(recipe="dense")
    planned = plan(sparse)
    assert planned.parts[0].workspace_bytes == planned.memory.workspace > 10**7
    assert plan(dense).memory.workspace == 0
    least = planned.memory.peak
    assert least > replace(planned.memory, workspace=0).peak
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "host_free_bytes", lambda: least - 1)
    with pytest.raises(MemoryLimitError, match="for sparse attention"):
        finish(sparse)


def test_sparse_attention_and_skipped_steps_are_planned_together(ask: Ask) -> None:
    policy = ("steps.policy=pattern", "steps.pattern=sC")
    alone = plan(ask(settings=SPARSE, steps=50))
    assert alone.together is None and len(alone.parts) == 1
    both = plan(ask(settings=(*SPARSE, *policy), steps=50))
    attention, steps = both.parts
    assert attention.speedup is not None and steps.speedup is not None and both.together
    assert both.together[0] == both.together[1] == both.to_json()["together"][0]
    # Dense steps at the start are evaluated all.
    assert both.together[0] != pytest.approx(attention.speedup * steps.speedup, rel=1e-3)
    least, most = plan(ask(settings=(*SPARSE, "steps.policy=easy"), steps=50)).together or (0, 0)
    assert least == pytest.approx(attention.speedup) and most > least
    cached = plan(ask(settings=(*SPARSE, "steps.policy=first-block-cache"), steps=50))
    assert cached.together is None
