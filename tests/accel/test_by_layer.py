"""`by-layer`: one option of a method as a curve over the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.errors import RecipeError
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import SlidingTile, ThresholdBlocks, TopBlocks
from kinora.accel.recipe import changed, find, from_table
from kinora.accel.site import Site
from kinora.accel.wrappers import ByLayer, Reuse, Within
from kinora.kernels.plan import BlockPlan

Build = Callable[[str], Any]
GRID = TokenGrid(5, 9, 20)
METHOD = TopBlocks(keep=0.25, tile="64x64")


def site(layer: int, layers: int = 9) -> Site:
    return Site(GRID, layer, layers, step=0, steps=4)


def keeps(text: str, layers: int = 9) -> list[float]:
    wrapper = ByLayer(method=METHOD, by_layer=text)
    found = [wrapper.at(site(layer, layers)) for layer in range(layers)]
    assert all(isinstance(it, TopBlocks) and it.tile == "64x64" for it in found)
    return [it.keep for it in found if isinstance(it, TopBlocks)]


def test_values_lie_evenly_and_on_straight_lines_between():
    assert keeps("keep 0.5 0.1 0.3", 5) == [0.5, 0.3, 0.1, 0.2, 0.3]
    assert keeps("keep 0.9 0.1") == [round(0.9 - 0.1 * i, 9) for i in range(9)]


def test_as_many_values_as_layers_are_one_each():
    values = [0.31, 0.07, 0.9, 0.123456, 0.5, 0.1, 0.2]
    assert keeps(f"keep {' '.join(map(str, values))}", 7) == values


def test_one_value_is_the_same_everywhere_and_so_is_one_layer():
    assert keeps("keep 0.4") == [0.4] * 9
    assert keeps("keep, 0.4, 0.2", 1) == [0.4]


@pytest.mark.parametrize("layers", [1, 2, 3, 30])
def test_no_layer_leaves_the_range_of_the_values(layers: int):
    found = keeps("keep 1 0.001 0.7 0.05", layers)
    assert min(found) >= 0.001 and max(found) <= 1 and found[0] == 1


def test_each_layer_plans_and_predicts_as_the_method_with_its_value():
    wrapper = ByLayer(method=METHOD, by_layer="keep 1 0.2")
    planner = wrapper.start()
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, GRID.tokens, 16, generator=generator)
    for layer, keep in enumerate(keeps("keep 1 0.2")):
        at, alone = site(layer), TopBlocks(keep=keep, tile="64x64")
        found, expected = planner(q, k, at), alone.plan(q, k, at)
        assert wrapper.predict(at) == alone.predict(at)
        if expected is None:
            assert found is None and wrapper.plan(q, k, at) is None
            assert wrapper.why_dense(at) == alone.why_dense(at)
        else:
            again = wrapper.plan(q, k, at)
            assert isinstance(found, BlockPlan) and isinstance(again, BlockPlan)
            assert torch.equal(found.mask(), expected.mask())
            assert torch.equal(again.mask(), expected.mask())


def test_all_of_it_in_every_layer_is_dense():
    wrapper = ByLayer(method=METHOD, by_layer="keep 1 1")
    assert all(wrapper.predict(site(layer)) == 1 for layer in range(9))


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (ThresholdBlocks(tile="64x64"), "beta 0 2"),
        (SlidingTile(tile="64x64"), "frames 1 0.2"),
        (ThresholdBlocks(rule="top", tile="64x64"), "mass 0.9 0.1"),
    ],
)
def test_any_number_of_any_method_can_change(method: Any, text: str):
    wrapper = ByLayer(method=method, by_layer=text)
    densities = [wrapper.predict(site(layer)) for layer in range(9)]
    assert densities == sorted(densities, reverse=True) and densities[0] > densities[-1]
    assert wrapper.tiling() == method.tiling()


def test_a_run_is_sparser_where_the_curve_is_lower_and_the_receipt_says_so(build: Build):
    model = build("wan")
    given = ["when=always", "attention.method=top-blocks", "attention.tile=64x64"]
    given += ["attention.by_layer=keep 0.7 0.3", "attention.every=2", "attention.from_step=0"]
    recipe = changed(find("dense"), given)
    assert recipe.attention == Reuse(
        method=ByLayer(method=TopBlocks(tile="64x64"), by_layer="keep 0.7 0.3"), every=2
    )
    with accelerate(model, recipe) as session:
        model()
    told = session.receipt.attention
    assert told is not None and "keep 0.7 to 0.3 from layer to layer" in told.asked
    first, second = told.density_by_layer
    assert first == pytest.approx(0.75, abs=0.03) and second == pytest.approx(0.33, abs=0.03)


def test_the_prediction_is_the_mean_of_the_layers():
    shape = Shape((transformer_layer(4, 64, 1024, text=0, cross_attention=True),) * 3)

    def density(method: Any) -> float:
        return predict(
            method, shape, GRID, device="cpu", dtype=torch.float32, steps=2, always=True
        ).density

    found = density(ByLayer(method=METHOD, by_layer="keep 0.6 0.2"))
    parts = [density(METHOD.model_copy(update={"keep": it})) for it in (0.6, 0.4, 0.2)]
    assert found == pytest.approx(sum(parts) / 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kep 0.5 0.2", "is 'kep 0.5 0.2' (did you mean keep?); it begins with an option of"),
        ("0.5 0.2", "that is a number (keep), then its values"),
        ("tile 64 128", "that is a number (keep)"),
        (" ", "it begins with an option"),
        ("keep", "it gives keep no value"),
        ("keep 0.5 2", "attention.by_layer: keep must be a number above 0 to 1, not 2"),
        ("keep 0.5 0 0.5", "above 0 to 1, not 0"),
        ("keep 0.5 nan", "above 0 to 1, not nan"),
        ("keep 0.5 x", "above 0 to 1, not x"),
    ],
)
def test_what_is_no_curve_is_told_in_one_line(text: str, told: str):
    with pytest.raises(RecipeError) as caught:
        from_table({"attention": {"method": "top-blocks", "by_layer": text}})
    assert told in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(pydantic.ValidationError):
        ByLayer(method=METHOD, by_layer=text)


def test_none_at_all_is_the_method():
    assert ByLayer(method=METHOD).at(site(3)) == METHOD
    assert ByLayer(method=METHOD).words() == METHOD.words()
    emptied = changed(find("dense"), ["attention.method=top-blocks", "attention.by_layer="])
    assert emptied.attention == Within(method=TopBlocks())
