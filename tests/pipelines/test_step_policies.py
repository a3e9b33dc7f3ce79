"""Step policies in `generate` and in `plan`: what cannot run is refused before it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import memory, models, sidecar
from kinora.pipelines.errors import (
    AccelerationError,
    MemoryLimitError,
    ModelError,
    RecipeError,
    RequestError,
)
from kinora.pipelines.generate import generate
from kinora.pipelines.jobs import Jobs
from kinora.pipelines.planning import plan
from kinora.pipelines.request import Request
from kinora.pipelines.run import Output, Run

Ask = Callable[..., Request]


@pytest.fixture
def ask(wan_folder: Path, tmp_path: Path) -> Ask:
    """A request for 14 steps of the tiny Wan pipeline; `scheduler` takes the place of its own."""

    def make(
        *settings: str, scheduler: str = "", config: dict[str, Any] | None = None, **fields: Any
    ) -> Request:
        folder = Path(fields.pop("model", wan_folder))
        if scheduler:
            shutil.copytree(folder, folder := tmp_path / scheduler)
            index = json.loads((folder / "model_index.json").read_text())
            index["scheduler"] = ["diffusers", scheduler]
            (folder / "model_index.json").write_text(json.dumps(index))
            told = {"_class_name": scheduler, **(config or {})}
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
        small = {"prompt": "a red circle", "model": str(folder), "width": 32, "height": 32}
        small |= {"frames": 5, "steps": 14, "output": str(tmp_path / "out")}
        return Request.model_validate({**small, "settings": settings, **fields})

    return make


def finish(request: Request, **options: Any) -> Output:
    *_, last = generate(request, **options)
    assert isinstance(last, Run)
    return last.outputs[0]


def test_a_video_of_skipped_steps_is_made_again_from_its_sidecar(ask: Ask) -> None:
    output = finish(ask("steps.policy=shadow", "steps.threshold=10"))
    record = sidecar.read(output.sidecar)
    assert record.receipt is not None and record.receipt.policy is not None
    assert record.receipt.policy.pattern == "CCCCsCsCsCsCCC"
    assert record.request.recipe["steps"]["threshold"] == 10
    assert finish(record.request.request(), original=record).identical is True
    assert finish(ask()).frames_sha256 != output.frames_sha256


@pytest.mark.parametrize(
    ("scheduler", "config", "told"),
    [
        ("HeunDiscreteScheduler", {}, "takes several evaluations for a step"),
        ("EulerAncestralDiscreteScheduler", {}, "draws new noise in each step"),
        ("LCMScheduler", {}, "is for models of few steps"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "draws new noise"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(
    ask: Ask, scheduler: str, config: dict[str, Any], told: str
) -> None:
    request = ask("steps.policy=pattern", scheduler=scheduler, config=config)
    (part,) = plan(request).parts
    assert (part.part, part.verdict) == ("steps", "refused") and told in part.why
    with pytest.raises(RecipeError, match=told):
        finish(request)
    assert not Path(request.output or "").exists()


def test_a_scheduler_that_cannot_be_made_is_told(ask: Ask, tmp_path: Path) -> None:
    request = ask("steps.policy=pattern", scheduler="DDIMScheduler", config={"beta_schedule": "no"})
    jobs = Jobs(tmp_path / "jobs")
    for asked in (plan, jobs.resolve):
        with pytest.raises(ModelError, match="has a scheduler of the wrong form"):
            asked(request)
    jobs.close()


def test_a_scheduler_that_is_not_known_is_told_and_refused_if_strict(ask: Ask) -> None:
    request = ask("steps.policy=pattern", scheduler="LMSDiscreteScheduler")
    (part,) = plan(request).parts
    assert part.verdict == "adjusted" and "LMSDiscreteScheduler makes of an output" in part.why
    with pytest.raises(AccelerationError, match="strict: steps would not run as asked"):
        finish(request.model_copy(update={"strict": True}))
    sada = request.model_copy(update={"settings": ("steps.policy=sada",)})
    assert plan(sada).parts[0].verdict == "refused"


def test_a_plan_counts_the_timesteps_of_the_scheduler(
    ask: Ask, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """PNDM evaluates its second timestep twice, which makes one more."""
    mask = tmp_path / "mask"
    settings = ("steps.policy=pattern", f"steps.mask={mask}")
    request = ask(
        *settings,
        model=model_folders["sdxl"],
        frames=1,
        scheduler="PNDMScheduler",
        config={"skip_prk_steps": True},
    )
    mask.write_text("CCCCCsCsCsCCCC")
    (part,) = plan(request).parts
    assert part.verdict == "refused"
    assert "of 14 steps, the run has 15: give one" in part.why
    assert part.why.endswith("; PNDMScheduler makes 15 timesteps of 14 steps")
    with pytest.raises(RecipeError, match="of 14 steps, the run has 15"):
        finish(request)
    jobs = Jobs(tmp_path / "jobs")
    with pytest.raises(RequestError, match="of 14 steps, the run has 15"):
        jobs.resolve(request)
    mask.write_text("CCCCCsCsCsCCCCC")
    assert jobs.resolve(request).steps == 14
    jobs.close()
    planned = plan(request)
    (part,) = planned.parts
    assert part.verdict == "ok" and part.speedup == 15 / 12
    assert part.why == ("12 of 15 steps evaluated; PNDMScheduler makes 15 timesteps of 14 steps")
    assert planned.speedup == (15 / 12, 15 / 12)
    receipt = finish(request).receipt
    assert receipt is not None and receipt.policy is not None
    assert (receipt.steps, receipt.policy.evaluations) == (15, 12)


def test_a_damaged_scheduler_is_told(ask: Ask) -> None:
    config = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    request = ask("steps.policy=pattern", scheduler="DPMSolverMultistepScheduler", config=config)
    with pytest.raises(ValueError, match="has a scheduler of the wrong form"):
        plan(request)


def test_attention_and_steps_are_predicted_side_by_side(ask: Ask) -> None:
    parts = plan(ask("attention.method=top-blocks", "steps.policy=pattern")).parts
    assert [it.part for it in parts] == ["attention", "steps"]
    assert parts[1].speedup == pytest.approx(14 / 10)


@pytest.fixture
def experts_folder(wan_folder: Path, tmp_path: Path) -> Path:
    """Wan with a second denoiser, which takes over at 80 % of the noise."""
    folder = tmp_path / "experts"
    shutil.copytree(wan_folder, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.8}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        ("steps.policy=pattern", "steps.from_step=0"),
        ("steps.policy=sada", "steps.from_step=0", "steps.lagrange_step=0.1"),
    ],
)
def test_what_a_second_denoiser_evaluates_anew_is_predicted(
    ask: Ask, experts_folder: Path, settings: tuple[str, ...]
) -> None:
    """Its first steps have no past of their own to be told from."""
    request = ask(*settings, model=str(experts_folder), steps=24)
    (part,) = plan(request).parts
    record = sidecar.read(finish(request).sidecar)
    assert record.receipt is not None and record.receipt.policy is not None
    ran = record.receipt.policy.evaluations
    one = plan(ask(*settings, steps=24)).parts[0].why
    least, most = map(int, part.why.split(" of ")[0].split(" to "))
    assert ran > int(one.split(" of ")[0].split(" to ")[-1])  # more than one alone ever needs
    assert least <= ran <= most < 24
    speedup = plan(request).speedup
    assert speedup is not None and speedup[0] <= 24 / ran <= speedup[1]


PRUNED = ("steps.policy=sign", "steps.max_skip=0", "steps.prune=true")


def test_tokens_that_pruning_keeps_are_in_the_plan_and_in_the_check_of_a_run(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"width": 256, "height": 256, "frames": 33}
    request = ask(*PRUNED, **large)
    planned = plan(request)
    (part,) = planned.parts
    # Two guidance branches, and as many numbers of 4 bytes a token as the model is wide.
    assert part.verdict == "ok" and part.workspace_bytes == 2 * planned.tokens * 24 * 4
    assert planned.memory.pruning == part.workspace_bytes and planned.memory.workspace == 0
    assert f"on some tokens alone; {memory.amount(part.workspace_bytes)} kept for" in part.why
    assert plan(request.model_copy(update={"guidance": 1.0})).memory.pruning * 2 == (
        part.workspace_bytes
    )
    assert plan(ask("steps.policy=sign", **large)).memory.pruning == 0
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "host_free_bytes", lambda: part.workspace_bytes)
    with pytest.raises(MemoryLimitError, match="for pruned tokens"):
        finish(request)
    monkeypatch.setattr(memory, "host_free_bytes", lambda: part.workspace_bytes - 1)
    (none,) = plan(request).parts
    told = memory.amount(part.workspace_bytes)
    assert none.verdict == "refused" and f"pruning keeps {told} of tokens, which is ab" in none.why
    with pytest.raises(RecipeError, match="pruning keeps"):
        finish(request)


@pytest.mark.parametrize("family", ["wan", "cogvideox", "sdxl"])
def test_what_is_kept_is_what_was_planned(
    ask: Ask, model_folders: dict[str, Path], family: str
) -> None:
    size = {"width": 128, "height": 64, "frames": 1 if family == "sdxl" else 9}
    model = str(model_folders[family])
    request = ask(*PRUNED, "steps.kappa=-1", model=model, **size)
    output = finish(request)
    record = sidecar.read(output.sidecar)
    assert record.receipt is not None and record.receipt.policy is not None
    told = record.receipt.policy
    assert "p" in told.pattern and told.kept is not None
    assert told.cache_bytes == plan(request).memory.pruning > 0
    assert finish(record.request.request(), original=record).identical is True


def test_blocks_that_are_not_known_are_refused_before_the_model_is_loaded(
    ask: Ask, unknown_folder: Path
) -> None:
    request = ask(*PRUNED, model=str(unknown_folder))
    (part,) = plan(request).parts
    assert part.verdict == "refused"
    assert "PixArtTransformer2DModel cannot be pruned: its blocks are not known" in part.why
    with pytest.raises(RecipeError, match=r"leave steps\.prune out"):
        finish(request)
