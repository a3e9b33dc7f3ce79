"""Precision as an option of any method: what runs is what the operator computes, and is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import TopBlocks
from kinora.accel.options import options_of
from kinora.accel.receipt import AttentionReceipt
from kinora.accel.recipe import Recipe, changed, find
from kinora.accel.wrappers import Quantised, Reuse, Within
from kinora.kernels.precision import INPUT, Precision

Build = Callable[[str], Any]
SHAPE = Shape((transformer_layer(4, 64, 1024, cross_attention=True),) * 2)


def recipe(*settings: str) -> Recipe:
    """Half of the tiles in all steps, whatever it costs, and what `settings` say of it."""
    given = ("when=always", "attention.method=top-blocks", "attention.keep=0.5")
    given = (
        *given,
        "attention.tile=64x64",
        "attention.from_step=0",
        *(f"attention.{it}" for it in settings),
    )
    return changed(find("dense"), given)


def ran(model: Any, *settings: str) -> tuple[torch.Tensor, AttentionReceipt]:
    with accelerate(model, recipe(*settings)) as session:
        out = model()
    assert session.receipt.attention is not None
    return out, session.receipt.attention


@pytest.mark.parametrize(
    ("qk", "pv", "most"), [("int8", "input", 0.02), ("int8", "fp8", 0.05), ("int4", "int8", 0.2)]
)
def test_what_runs_is_computed_so_and_the_receipt_says_it(
    build: Build, qk: str, pv: str, most: float
):
    model = build("wan")
    plain, before = ran(model)
    rounded, told = ran(model, f"qk={qk}", f"pv={pv}")
    assert 1e-6 < (rounded - plain).norm() / plain.norm() < most
    assert (before.precision, told.precision) == ("input x input", f"{qk} x {pv}")
    assert told.kernels == {"cpu" if pv == "input" else "reference": told.calls} and not told.dense
    assert told.density == pytest.approx(before.density, abs=0.01)


def test_the_operator_is_asked_for_it(build: Build, monkeypatch: pytest.MonkeyPatch):
    from kinora.accel.attach import forward

    asked: list[Precision] = []
    stock = forward.block_attention

    def spy(*tensors: Any, precision: Precision, **given: Any) -> Any:
        asked.append(precision)
        return stock(*tensors, precision=precision, **given)

    monkeypatch.setattr(forward, "block_attention", spy)
    _, told = ran(build("wan"), "qk=int4", "from_step=0.5")
    assert asked == [Precision("int4")] * sum(told.kernels.values()) and asked


def test_dense_calls_stay_as_the_model_makes_them(build: Build):
    model = build("wan")
    dense = model()
    for settings in (("qk=int8", "from_layer=2"), ("qk=int8", "keep=1")):
        out, told = ran(model, *settings)
        assert torch.equal(out, dense) and not told.kernels


def test_where_nothing_multiplies_so_it_loses_and_says_so(build: Build):
    """The reference does on every device; on a CPU nothing else rounds weights."""
    model = build("wan")
    dense = model()
    faster = changed(recipe("qk=int8", "pv=int8"), ["when=faster"])
    with accelerate(model, faster) as session:
        assert torch.equal(model(), dense)
    told = session.receipt.attention
    assert told is not None and not told.kernels
    assert all("the reference kernel is predicted" in it for it in told.fallbacks)
    with (
        pytest.raises(AccelerationError, match="the reference kernel"),
        accelerate(model, faster, strict=True),
    ):
        model()


def test_the_prediction_is_of_the_kernel_that_multiplies_so():
    def kernel(**bits: Any) -> tuple[str, str]:
        method = Quantised(method=TopBlocks(), **bits) if bits else TopBlocks()
        found = predict(
            Within(method=Reuse(method=method, every=2), from_step=0.2),
            SHAPE, TokenGrid(9, 32, 32), device="cpu", dtype=torch.float32, steps=5, always=True,
        )  # fmt: skip
        return found.kernel, found.precision

    assert kernel() == ("cpu", "")
    assert kernel(qk="int8") == ("cpu", "int8 x input")
    assert kernel(qk="int8", pv="fp8") == ("reference", "int8 x fp8")


def test_wrappers_hand_the_precision_on():
    inner = Quantised(method=TopBlocks(), qk="int8", pv="int4")
    for method in (inner, Reuse(method=inner, every=3), Within(method=inner, from_layer=1)):
        assert method.precision() == Precision("int8", "int4")
        assert "queries and keys in int8, weights and values in int4" in method.words()
    assert TopBlocks().precision() == INPUT
    assert "weights" not in Quantised(method=TopBlocks(), qk="int8").words()


def test_a_recipe_can_say_every_precision_of_the_operator():
    allowed = get_type_hints(Precision)
    for it in options_of(Quantised):
        assert it.choices == get_args(allowed[it.name]) and it.default == "input"
