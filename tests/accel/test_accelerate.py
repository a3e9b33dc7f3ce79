"""`accelerate` on every family: what it leaves as it was, and what it changes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError, RecipeError
from kinora.accel.methods import TopBlocks
from kinora.accel.recipe import Recipe
from kinora.accel.wrappers import Reuse, Within

Build = Callable[[str], Any]


def sparse(keep: float = 0.5, **options: Any) -> Recipe:
    method = TopBlocks(keep=keep, tile="64x64", **options)
    return Recipe(attention=method, when="always")


def state(model: Any) -> list[Any]:
    """Everything on the instances of a pipeline that accelerating might touch."""
    modules = [model.denoiser, *model.denoiser.modules()]
    return [
        *(dict(vars(model.scheduler)).keys(),),
        *({k for k in vars(m)} for m in modules),
        *(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        *(
            getattr(m.processor, "_attention_backend", None)
            for m in modules
            if hasattr(m, "processor")
        ),
    ]


def test_a_sparse_run_is_near_the_dense_one_and_no_more(model: Any):
    dense = model()
    with accelerate(model, sparse(0.5)) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.kernels == {"cpu": ran.calls} and not ran.dense
    assert ran.layers == len(ran.density_by_layer) and 0.4 < ran.density < 0.95
    error = (out - dense).norm() / dense.norm()
    assert 1e-7 < error < 0.1


def test_nothing_enabled_is_bitwise_the_stock_pipeline(model: Any):
    dense = model()
    with accelerate(model, Recipe()) as session:
        assert torch.equal(model(), dense)
    assert session.receipt.attention is None


def test_dense_calls_of_an_accelerated_run_are_bitwise_the_stock_ones(model: Any):
    dense = model()
    late = Recipe(attention=Within(method=TopBlocks(keep=0.1, tile="64x64"), from_step=1.0))
    with accelerate(model, late) as session:
        assert torch.equal(model(), dense)
    ran = session.receipt.attention
    assert ran is not None and ran.dense == {"in the first 100% of the steps": ran.calls}
    assert ran.density == 1 and not ran.fallbacks


def test_keep_1_is_dense_to_rounding_through_the_kernel(model: Any):
    dense = model()

    class Everything(TopBlocks):
        """Keeps all tiles, and says that it does not."""

        def predict(self, site: Any) -> float:
            del site
            return 0.99

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Any) -> Any:
            plan = TopBlocks(keep=0.5, tile="64x64").plan(q, k, site)
            assert plan is not None
            full = plan.from_mask(
                torch.ones_like(plan.mask()),
                tile=plan.tile,
                queries=plan.queries,
                keys=plan.keys,
                order=plan.order,
            )
            # A bias of zeros keeps the kernel from taking its way for dense plans.
            return dataclasses.replace(full, bias=torch.zeros(full.indices.shape))

    with accelerate(model, Recipe(attention=Everything(), when="always")) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.density == 1 and ran.kernels
    # Latents of hundreds, which a random UNet makes, are as near as those of ones.
    assert (out - dense).norm() < 1e-5 * dense.norm()


def test_keep_1_runs_the_stock_attention(model: Any):
    dense = model()
    with accelerate(model, sparse(1.0)) as session:
        assert torch.equal(model(), dense)
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels and ran.density == 1


def test_afterwards_everything_is_as_before(model: Any):
    dense = model()
    before = state(model)
    with accelerate(model, sparse()):
        model()
    assert state(model) == before
    assert torch.equal(model(), dense)


def test_an_exception_in_the_middle_of_a_run_leaves_nothing_behind(model: Any):
    with accelerate(model, sparse()):
        fresh = model()
    before = state(model)

    def broken(step: int) -> None:
        if step == 1:
            raise RuntimeError("broken off")

    recipe = Recipe(attention=Reuse(method=TopBlocks(tile="64x64", keep=0.5), every=100))
    recipe = recipe.model_copy(update={"when": "always"})
    with accelerate(model, recipe) as session:
        with pytest.raises(RuntimeError, match="broken off"):
            model(seed=1, callback=broken)
        again = model()
        counted = session.receipt.steps
    with accelerate(model, recipe):
        alone = model()
    assert torch.equal(again, alone) and counted == 3
    with pytest.raises(RuntimeError, match="broken off"), accelerate(model, sparse()):
        model(callback=broken)
    assert state(model) == before
    with accelerate(model, sparse()):
        assert torch.equal(model(), fresh)


def test_two_pipelines_do_not_see_each_other(build: Build):
    first, second, other = build("wan"), build("wan"), build("cogvideox")
    dense, joint = second(), other()
    with accelerate(first, sparse(0.2)):
        assert torch.equal(second(), dense) and torch.equal(other(), joint)
        with accelerate(other, sparse(0.2)) as inner:
            assert not torch.equal(first(), dense)
            assert not torch.equal(other(), joint)
    ran = inner.receipt.attention
    assert ran is not None and ran.layers == 1


def test_the_same_pipeline_cannot_be_accelerated_twice_at_once(build: Build):
    model = build("wan")
    for inner in (sparse(), Recipe(), "dense"):  # "dense" would not be: the outer one runs
        with (
            accelerate(model, sparse()),
            pytest.raises(
                AccelerationError, match="transformer of this pipeline is accelerated al"
            ),
            accelerate(model, inner),
        ):
            pass
    with accelerate(model, sparse()):
        model()
    with accelerate(model, "dense"), accelerate(model, sparse()) as session:
        model()
    assert session.receipt.steps == 3


def test_text_encoders_and_cross_attention_stay_stock(build: Build):
    model = build("wan")
    calls: list[tuple[int, int]] = []

    def stock_arguments(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> None:
        """As torch names them."""

    stock = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = inspect.signature(stock_arguments).bind(*args, **kwargs).arguments
        calls.append((given["query"].shape[2], given["key"].shape[2]))
        return stock(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        with accelerate(model, sparse()):
            model()
    tokens = 3 * 16 * 16
    assert calls and (tokens, tokens) not in calls
    assert (tokens, 512) in calls


def test_steps_layers_and_branches_are_told_to_the_method(build: Build):
    seen: list[tuple[int, int, int]] = []

    class Spy(TopBlocks):
        """Notes its sites."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Any) -> Any:
            seen.append((site.step, site.branch, site.layer))
            assert (site.steps, site.layers) == (3, 2) and site.grid.tokens == 768
            return super().plan(q, k, site)

    model = build("wan")
    with accelerate(model, Recipe(attention=Spy(keep=0.5, tile="64x64"), when="always")):
        model()
    assert seen == [(s, b, i) for s in range(3) for b in range(2) for i in range(2)]


def test_a_window_counts_steps_of_the_schedule(build: Build):
    model = build("wan")
    within = Within(
        method=TopBlocks(keep=0.5, tile="64x64"), from_step=0.2, to_step=0.8, from_layer=1
    )
    with accelerate(model, Recipe(attention=within, when="always")) as session:
        model(steps=10)
    ran = session.receipt.attention
    assert ran is not None
    assert ran.kernels == {"cpu": 6 * 2}  # steps 2 to 7, two branches, the second layer
    assert ran.dense["in the first 20% of the steps"] == 2 * 2 * 2
    assert ran.dense["after 80% of the steps"] == 2 * 2
    assert ran.dense["in the first layer"] == 8 * 2
    first, second = ran.density_by_layer
    assert first == 1 and second is not None and second < 1
    assert ran.density == pytest.approx((first + second) / 2, abs=1e-3)


def test_a_plan_is_kept_for_as_many_steps_as_asked(build: Build):
    made: list[int] = []

    class Spy(TopBlocks):
        """Notes its steps."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Any) -> Any:
            made.append(site.step)
            return super().plan(q, k, site)

    model = build("wan")
    recipe = Recipe(attention=Reuse(method=Spy(keep=0.5, tile="64x64"), every=2), when="always")
    with accelerate(model, recipe):
        model(steps=5)
    assert made == [step for step in (0, 2, 4) for _ in range(2 * 2)]


def test_masked_text_is_left_out_and_the_picture_equals_the_dense_one(build: Build):
    for family in ("hunyuan", "qwen"):
        model = build(family)
        dense = model()

        class All(TopBlocks):
            """Every tile, through the kernel."""

            def predict(self, site: Any) -> float:
                assert site.text in (5, 7)
                return 0.9

            def plan(self, q: torch.Tensor, k: torch.Tensor, site: Any) -> Any:
                assert q.shape[2] == k.shape[2] == site.tokens
                return self.dense_plan(site.tokens)

            @staticmethod
            def dense_plan(tokens: int) -> Any:
                from kinora.kernels.plan import BlockPlan, Tile

                full = BlockPlan.dense(tile=Tile(64, 64), queries=tokens, keys=tokens)
                return dataclasses.replace(full, bias=torch.zeros(full.indices.shape))

        with accelerate(model, Recipe(attention=All(), when="always")) as session:
            out = model()
        ran = session.receipt.attention
        assert ran is not None and ran.kernels == {"cpu": ran.calls}
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_sparse_runs_dense_and_is_told_or_refused(build: Build):
    model = build("hunyuan")
    model.latents = (2, *model.latents[1:])
    for key, value in model.arguments.items():
        model.arguments[key] = torch.cat([value, value])
    model.arguments["encoder_attention_mask"][1, 2:] = 0
    dense = model()
    with accelerate(model, sparse()) as session:
        assert torch.equal(model(), dense)
    ran = session.receipt.attention
    reason = "because texts of different lengths are in one batch"
    assert ran is not None and ran.fallbacks == [reason] and ran.dense == {reason: ran.calls}
    assert any("fell back" in line and reason in line for line in session.receipt.words())
    told = r"strict: attention of layer 0 would run dense .*\(strict=False, --no-strict\)"
    with (
        pytest.raises(AccelerationError, match=told),
        accelerate(model, sparse(), strict=True),
    ):
        model()


@pytest.mark.parametrize("family", ["wan", "ltx", "sd3"])
def test_a_strict_run_in_which_nothing_was_sparse_is_refused(build: Build, family: str):
    """As where the method itself keeps every call dense, which is no fallback."""
    model, dense = build(family), sparse(1)
    with accelerate(model, dense) as session:
        model()
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels and not ran.fallbacks
    told = "strict: all attention ran dense because keep 1 .*; change the recipe"
    with pytest.raises(AccelerationError, match=told), accelerate(model, dense, strict=True):
        model()
    with accelerate(model, sparse(), strict=True) as session:
        model()
    ran = session.receipt.attention
    assert ran is not None and ran.kernels


def test_a_part_that_is_predicted_to_lose_runs_dense(build: Build):
    model = build("wan")
    dense = model()
    method = TopBlocks(keep=0.9, tile="64x64")
    with accelerate(model, Recipe(attention=method)) as session:
        assert torch.equal(model(), dense)
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels
    assert "predicted to take" in ran.fallbacks[0]


def test_a_pipeline_without_known_attention_is_refused():
    class Nothing:
        """A pipeline without a denoiser."""

    class Unknown:
        """A pipeline with one of another kind."""

        transformer = torch.nn.Linear(1, 1)

    for pipe, told in (
        (Nothing(), "Nothing has no denoiser whose attention could be accelerated; known are Wan"),
        (Unknown(), "attention of Linear cannot be accelerated yet; known are Wan"),
    ):
        with pytest.raises(AccelerationError, match=told), accelerate(pipe, sparse()):
            pass


def test_what_is_given_must_be_a_pipeline_and_a_recipe(build: Build):
    model = build("wan")
    with (
        pytest.raises(AccelerationError, match="WanTransformer3DModel is a denoiser: give"),
        accelerate(model.transformer, sparse()),
    ):
        pass
    nothing: Any = {"keep": 0.5}
    with (
        pytest.raises(RecipeError, match="the recipe is a dict: give a preset's name"),
        accelerate(model.pipe, nothing),
    ):
        pass


def test_a_session_says_that_nothing_has_run_yet(build: Build):
    with accelerate(build("wan"), sparse()) as session:
        assert session.receipt.words()[-1] == "nothing has run yet"


def test_a_denoiser_compiled_in_the_block_is_told(build: Build):
    model = build("wan")
    with (
        pytest.raises(AccelerationError, match="compile it before the block"),
        accelerate(model, sparse()),
    ):
        model.transformer.compile(backend="eager")
        model()


def test_attention_taken_over_by_something_else_is_noticed(build: Build):
    model = build("wan")
    processor = model.transformer.blocks[1].attn1.processor
    with (
        pytest.raises(AccelerationError, match="attends 2 times a call, 1 of these reached"),
        accelerate(model, sparse()),
    ):
        processor._attention_backend = None
        model()


def test_the_scheduler_keeps_its_signature_and_copies_are_not_followed(build: Build):
    model = build("wan")
    plain = inspect.signature(model.scheduler.step)
    with accelerate(model, sparse()) as session:
        assert inspect.signature(model.scheduler.step) == plain
        other = copy.deepcopy(model.scheduler)
        other.set_timesteps(4)
        x = torch.zeros(1, 2)
        other.step(x, other.timesteps[0], x)
        assert session.receipt.steps == 0 and other.step_index == 1
        assert model.scheduler.step_index is None
        model()
        assert session.receipt.steps == 3
