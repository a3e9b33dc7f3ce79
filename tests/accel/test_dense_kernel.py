"""The kernel of dense calls: one for the baseline and for what an accelerated run leaves dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel import recipe as recipes
from kinora.accel.attach import accelerate, dense, forward
from kinora.accel.attach.sites import NoSiteError
from kinora.accel.errors import AccelerationError, RecipeError
from kinora.accel.methods import TopBlocks
from kinora.accel.recipe import Recipe
from kinora.accel.wrappers import Within
from kinora.kernels.dense import DENSE_KERNELS, fastest

Build = Callable[[str], Any]
LATE = Within(method=TopBlocks(keep=0.5, tile="64x64"), from_step=0.5)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What dense kernels were called with."""
    calls: list[dict[str, Any]] = []
    stock = dense.dense_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
        calls.append({"tokens": q.shape[2], **given})
        return stock(q, k, v, **given)

    monkeypatch.setattr(dense, "dense_attention", spy)
    return calls


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_the_baseline_runs_by_it_and_is_the_stock_result(
    model: Any, kernel: Any, counted: list[dict[str, Any]]
) -> None:
    expected = model()
    with accelerate(model, Recipe(dense_kernel=kernel)) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels and not ran.fallbacks and ran.density == 1
    assert ran.asked == f"the {kernel} kernel" and ran.dense == {"as asked": ran.calls}
    assert ran.dense_kernels == {kernel: ran.calls} and len(counted) == ran.calls
    assert {it["kernel"] for it in counted} == {kernel}
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(model(), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's compiler, of itself
@pytest.mark.parametrize("family", ["wan", "sdxl"])
def test_a_compiled_kernel_runs_behind_both_routes(build: Build, family: str) -> None:
    model = build(family)
    expected = model()
    with accelerate(model, Recipe(dense_kernel="flex")) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.dense_kernels == {"flex": ran.calls}
    assert (out - expected).norm() < 1e-5 * expected.norm()


def test_dense_calls_of_an_accelerated_run_are_those_of_the_baseline(
    model: Any, counted: list[dict[str, Any]]
) -> None:
    with accelerate(model, Recipe(attention=LATE, when="always", dense_kernel="flash")) as session:
        model(steps=4)
    ran = session.receipt.attention
    assert ran is not None and ran.kernels and not ran.fallbacks
    assert ran.dense_kernels == {"flash": sum(ran.dense.values())} == {"flash": len(counted)}
    assert f"{len(counted)} dense calls by the flash kernel" in session.receipt.words()
    never = Recipe(attention=TopBlocks(keep=1), dense_kernel="flash")
    with accelerate(model, never):
        accelerated = model()
    with accelerate(model, Recipe(dense_kernel="flash")):
        assert torch.equal(model(), accelerated)


@pytest.mark.parametrize("family", ["hunyuan", "qwen"])
def test_masked_text_is_left_out_of_what_kernels_without_masks_see(
    build: Build, family: str, counted: list[dict[str, Any]]
) -> None:
    model = build(family)
    with accelerate(model, Recipe(dense_kernel="flash")):
        model()
    valid = {"hunyuan": 5, "qwen": 7}[family]
    assert {(it["tokens"], it["mask"]) for it in counted} == {(512 + valid, None)}


def test_a_mask_that_a_kernel_cannot_take_is_told_or_refused(build: Build) -> None:
    model = build("hunyuan")
    model.latents = (2, *model.latents[1:])
    for key, value in model.arguments.items():
        model.arguments[key] = torch.cat([value, value])
    model.arguments["encoder_attention_mask"][1, 2:] = 0
    expected = model()
    reason = "as asked, not by the flash kernel because texts of different lengths are in one batch"
    with accelerate(model, Recipe(dense_kernel="flash")) as session:
        assert torch.equal(model(), expected)
    ran = session.receipt.attention
    assert ran is not None and ran.fallbacks == [reason] and not ran.dense_kernels
    with (
        pytest.raises(AccelerationError, match="strict: attention of layer 0 would run dense as a"),
        accelerate(model, Recipe(dense_kernel="flash"), strict=True),
    ):
        model()
    with accelerate(model, Recipe(dense_kernel="sdpa"), strict=True):
        assert torch.equal(model(), expected)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient", "xformers", "sage"])
def test_what_cannot_run_here_is_refused_with_what_can(build: Build, kernel: Any) -> None:
    model = build("wan")
    told = (
        f"the dense kernel {kernel} cannot run on cpu: it is for CUDA devices; "
        f"available are sdpa, flash, flex"
    )
    with (
        pytest.raises(AccelerationError, match=f"^{told}$"),
        accelerate(model.pipe, Recipe(dense_kernel=kernel)),
    ):
        pass
    model()


def test_a_kernel_that_fails_is_told_with_the_others(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("No available kernel.\nSecond line")

    monkeypatch.setattr(dense, "dense_attention", broken)
    model = build("cogvideox")
    told = r"kernel flash failed on q \(2, 2, 418, 8\) .*: No available kernel\.; others are sdpa, "
    with (
        pytest.raises(AccelerationError, match=told),
        accelerate(model.pipe, Recipe(dense_kernel="flash")),
    ):
        model()


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_it_works_under_compile(build: Build, family: str, counted: list[dict[str, Any]]) -> None:
    model = build(family)
    expected = model()
    torch.compiler.reset()
    model.transformer.compile(backend="aot_eager", fullgraph=True)
    with accelerate(model.pipe, Recipe(dense_kernel="flash")) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.dense_kernels == {"flash": ran.calls} and counted
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_it_is_an_option_of_every_recipe() -> None:
    baseline = recipes.changed(recipes.find("dense"), ["dense_kernel=flash"])
    assert not baseline.empty and baseline.attention is None
    assert baseline.words() == "attention by the flash kernel"
    sparse = recipes.changed(recipes.find("balanced"), ["dense_kernel=flash"])
    assert sparse.words().endswith(", dense calls by the flash kernel")
    for recipe in (baseline, sparse):
        assert recipes.from_table(recipe.table()).dense_kernel == "flash"
        assert 'dense_kernel = "flash"' in recipe.to_toml()
    with pytest.raises(
        RecipeError, match=r"one of stock, fastest, sdpa, .*not cuddn \(did you mean cudnn"
    ):
        recipes.changed(baseline, ["dense_kernel=cuddn"])
    (own,) = (it for it in recipes.options_of(Recipe) if it.name == "dense_kernel")
    assert own.choices == ("stock", "fastest", *DENSE_KERNELS)


def test_the_fastest_is_the_stock_kernel_where_nothing_is_faster(
    model: Any, counted: list[dict[str, Any]]
) -> None:
    expected = model()
    with accelerate(model, "exact", strict=True) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and not ran.fallbacks and not ran.dense_kernels and not counted
    assert torch.equal(out, expected)


def test_where_the_fastest_takes_no_such_call_the_stock_kernel_is_no_fallback(
    model: Any, counted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(_: torch.Tensor) -> str:
        return "flash"

    monkeypatch.setattr(forward, "fastest", found)
    with accelerate(model, "exact", strict=True) as session:
        model()
    ran = session.receipt.attention
    assert ran is not None and ran.dense_kernels == {"flash": len(counted)} and counted

    def refused(*_: Any) -> Any:
        raise NoSiteError("because it is another one")

    monkeypatch.setattr(forward, "by_kernel", refused)
    with accelerate(model, "exact", strict=True) as session:
        model()
    ran = session.receipt.attention
    assert ran is not None and not ran.dense_kernels and not ran.fallbacks


@pytest.mark.gpu
def test_on_a_hopper_gpu_it_is_that_of_cudnn() -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    hopper = torch.cuda.get_device_capability()[0] >= 9
    assert fastest(q) == ("cudnn" if hopper else None)
    assert fastest(q.float()) is None and fastest(q.cpu()) is None
