"""Caches of libraries that are wrong for a model or a run end in one line, most before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError
from kinora.accel.policies import (
    CachePolicy,
    FasterCache,
    FirstBlockCache,
    MagCache,
    PyramidAttentionBroadcast,
    SeaCache,
    TaylorSeer,
)
from kinora.accel.recipe import Recipe

from .cached import blocks, cache_of, counted, ids
from .conftest import Loop

Build = Callable[[str], Any]
STEPS = 16
PAB = PyramidAttentionBroadcast
# Of FasterCache's frequencies, which diffusers asks torch for as it did in earlier versions.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")


@pytest.mark.parametrize(
    ("family", "policy", "told"),
    [
        ("wan", PAB(), "keeps one past for all calls, and WanTransformer3DModel is called once fo"),
        ("wan", FasterCache(), "in whose batches there is no such half: choose first-block-cache"),
        ("ltx", FasterCache(), "which it does of CogVideoXTransformer3DModel, MochiTransformer3DM"),
        ("wan", MagCache(), "diffusers has none for WanTransformer3DModel: run once with steps.ca"),
        ("flux", SeaCache(), "finds the latents in Wan's text-to-video denoiser alone, not in Flu"),
        ("cogvideox", FirstBlockCache(), "needs two blocks or more, and this CogVideoXTransformer"),
        ("sdxl", FirstBlockCache(), "UNet2DConditionModel has none (it is no CacheMixin): choose"),
        ("sd3", TaylorSeer(), "SD3Transformer2DModel has none (it is no CacheMixin): choose a pol"),
    ],
    ids=ids,
)
def test_a_cache_that_is_wrong_is_refused_before_anything_runs(
    build: Build, family: str, policy: CachePolicy, told: str
):
    model = build(family)
    with (
        pytest.raises(AccelerationError) as caught,
        accelerate(model, Recipe(steps=policy)),
    ):
        raise AssertionError("refused before anything runs")
    assert told in str(caught.value) and len(str(caught.value)) < 300


def test_a_compiled_or_cached_denoiser_is_refused(build: Build):
    model = build("flux")
    block = model.transformer.transformer_blocks[0]
    vars(block)["_compiled_call_impl"] = block._call_impl  # as `Module.compile` does
    with (
        pytest.raises(AccelerationError, match="is compiled, and first-block-cache changes its"),
        accelerate(model, Recipe(steps=FirstBlockCache())),
    ):
        pass
    from diffusers import FirstBlockCacheConfig

    model = build("flux")
    model.transformer.enable_cache(FirstBlockCacheConfig())
    with (
        pytest.raises(AccelerationError, match=r"call disable_cache\(\) on it first"),
        accelerate(model, Recipe(steps=FirstBlockCache())),
    ):
        pass


def test_several_processes_must_decide_alike(build: Build):
    model = build("wan")
    model.transformer._parallel_config = object()
    with (
        pytest.raises(AccelerationError, match="in each process for itself, and WanTransformer3DM"),
        accelerate(model, Recipe(steps=FirstBlockCache())),
    ):
        raise AssertionError("refused before anything runs")
    with accelerate(model, Recipe(steps=TaylorSeer(use_lite_mode=True))):
        pass  # its rhythm is the same in all


class Guided(Loop):
    """Guidance in one batch, the unconditional half first, or in calls of its own."""

    separate = False

    def __call__(self, steps: int = 3, seed: int = 0, callback: Any = None) -> torch.Tensor:
        x = torch.randn(self.latents, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                if self.separate:
                    outs = [self._call(x, t, place) for place in (0, 1)]
                else:
                    outs = self._call(torch.cat([x, x]), t, slice(None)).chunk(2)
            out = outs[0] + 3 * (outs[1] - outs[0])
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        return x

    def _call(self, x: torch.Tensor, t: torch.Tensor, place: Any) -> torch.Tensor:
        place = slice(place, place + 1) if isinstance(place, int) else place
        given = {key: it[place] for key, it in self.arguments.items()}
        given |= {"hidden_states": x, "timestep": t.expand(len(x))}
        return self.denoiser(**given, return_dict=False)[0]


@pytest.fixture
def mochi(build: Build) -> Guided:
    made = build("mochi")
    return Guided(made.transformer, made.scheduler, (1, 4, 4, 8, 16), made.arguments)


def test_the_unconditional_half_is_left_out_of_a_batch(mochi: Guided):
    full = mochi(steps=STEPS)
    with accelerate(mochi, Recipe(steps=FasterCache()), strict=True) as session:
        out = mochi(steps=STEPS)
    told = cache_of(session.receipt)
    low = [float(t) < 641 for t in mochi.scheduler.timesteps]
    expected = [inside and i % 5 != 0 for i, inside in enumerate(low)]
    assert told.halved == sum(expected) > 0
    assert f"half was left out of {told.halved} batches" in session.receipt.words()[2]
    assert out.isfinite().all() and not torch.equal(out, full)


@pytest.mark.parametrize("policy", [PAB(), FasterCache()], ids=ids)
def test_guidance_in_calls_of_its_own_is_refused_where_only_the_run_tells(
    mochi: Guided, policy: CachePolicy
):
    mochi.separate = True
    told = "needs guidance" if isinstance(policy, FasterCache) else "is called again in a step"
    with (
        pytest.raises(AccelerationError, match=told),
        accelerate(mochi, Recipe(steps=policy)),
    ):
        mochi(steps=STEPS)


def test_branches_do_not_share_a_past(mochi: Guided):
    """Where no pipeline names them: each has the first evaluation of its own."""
    mochi.separate = True
    with (
        counted(blocks(mochi.denoiser)) as counts,
        accelerate(mochi, Recipe(steps=MagCache(mag_ratios="1", retention_ratio=0))) as session,
    ):
        mochi(steps=8)
    assert cache_of(session.receipt).pattern == "CrrrCrrr" and counts == [4, 4]


def test_two_items_without_guidance_are_no_two_branches(build: Build):
    with (
        pytest.raises(AccelerationError, match="faster-cache needs guidance, and this run has no"),
        accelerate(build("mochi"), Recipe(steps=FasterCache())) as session,
    ):
        session.pipe(steps=STEPS)


@pytest.mark.parametrize(
    ("family", "policy", "told"),
    [
        ("wan", MagCache(mag_ratios="1"), "this run begins with step 4: choose first-block-cache"),
        ("flux", FasterCache(below_timestep=800), "would extrapolate attention before it was eva"),
    ],
)
def test_a_run_that_begins_in_the_middle_is_refused_where_it_matters(
    build: Build, family: str, policy: CachePolicy, told: str
):
    model = build(family)
    denoiser, scheduler = model.denoiser, model.scheduler
    with (
        pytest.raises(AccelerationError, match=told),
        accelerate(model, Recipe(steps=policy)),
    ):
        scheduler.set_timesteps(STEPS, **({"mu": 1.0} if family == "flux" else {}))
        scheduler.set_begin_index(4)
        if family == "wan":
            given = {"hidden_states": torch.randn(1, 4, 3, 16, 16)}
            text = torch.randn(1, 8, 16)
        else:
            given = {"hidden_states": torch.randn(1, 16, 16), "txt_ids": torch.zeros(8, 3)}
            given |= {"img_ids": torch.zeros(16, 3), "pooled_projections": torch.randn(1, 16)}
            text = torch.randn(1, 8, 16)
        timestep = scheduler.timesteps[4:5]
        denoiser(**given, timestep=timestep, encoder_hidden_states=text)
