"""How long a run would take is told by one that was made before."""

from __future__ import annotations

from typing import Any

import pytest

from kinora.accel import recipe as recipes
from kinora.accel.receipt import Receipt
from kinora.pipelines import planning
from kinora.pipelines.request import Request
from kinora.pipelines.sidecar import Machine, ModelRecord, Record
from kinora.pipelines.timing import timed

TIMES: dict[str, float] = {"load": 9.0, "text": 1.0, "denoise": 30.0, "decode": 2.0, "save": 1.0}
SKIPPING = recipes.changed(recipes.find("dense"), ["steps.policy=shadow"])


def plan(**fields: Any) -> planning.Plan:
    """Of a run on the CPU, of 30 steps."""
    return planning.plan(Request(prompt="a", device="cpu", **fields))


def record(created: str = "2026-01-01", **fields: Any) -> Record:
    """Of the same run, but for these fields; a step took a second."""
    receipt = Receipt(recipe={}, strict=False, steps=2, attention=None, stages_s=dict(TIMES))
    model = ModelRecord(name="m", pipeline="p", repo=None, fingerprint="f", vae_dtype="float32")
    machine = Machine(device="cpu", threads=1, versions={})
    request = plan().request.model_copy(update=fields)
    return Record(request=request, model=model, machine=machine, created=created,
                  latents_sha256="l", receipt=receipt)  # fmt: skip


def test_a_run_of_the_same_recipe_says_it_without_the_load() -> None:
    found = timed(plan(steps=60), [record(created="new"), record(created="old")])
    assert found is not None and (found.least_s, found.most_s) == pytest.approx((64, 64))
    assert found.same and found.by.created == "new"


def test_a_dense_run_says_it_with_the_speedup_that_is_predicted() -> None:
    skipping = plan(recipe=SKIPPING.table())
    assert skipping.speedup is not None and skipping.speedup[0] == 1 < skipping.speedup[1]
    found = timed(skipping, [record()])
    assert found is not None and not found.same
    expected = (4 + 30 / skipping.speedup[1], 34)
    assert (found.least_s, found.most_s) == pytest.approx(expected)
    same = timed(skipping, [record(), record(recipe=SKIPPING.table(), steps=15)])
    assert same is not None and same.same and same.most_s == pytest.approx(64)


@pytest.mark.parametrize(
    "other",
    [
        {"width": 64}, {"frames": 5}, {"device": "cuda"}, {"dtype": "bfloat16"}, {"guidance": 1.0},
        {"model": "another"}, {"recipe": {"attention": {"method": "blade"}}},
    ],
)  # fmt: skip
def test_other_runs_say_nothing(other: dict[str, Any]) -> None:
    assert timed(plan(), [record(**other)]) is None


def test_what_is_not_known_is_not_told() -> None:
    caching = plan(settings=("steps.policy=first-block-cache",))
    assert caching.speedup is None and timed(caching, [record()]) is None
    untimed = record().timed({})
    assert timed(plan(), [untimed]) is None
