"""cache-dit's DBCache: refused where it is not installed, else counted as the others are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError
from kinora.accel.policies import DBCache
from kinora.accel.recipe import Recipe

from .cached import blocks, cache_of, counted, state

Build = Callable[[str], Any]
STEPS = 16
installed = importlib.util.find_spec("cache_dit") is not None
needs_it = pytest.mark.skipif(not installed, reason="needs cache-dit")
LIVE = DBCache(fn_compute_blocks=1, max_warmup_steps=3, residual_diff_threshold=1)


def test_it_is_refused_where_cache_dit_is_not_installed(
    build: Build, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with (
        pytest.raises(AccelerationError, match="cache-dit's, which is not installed: pip install"),
        accelerate(build("wan"), Recipe(steps=DBCache())),
    ):
        raise AssertionError("refused before anything runs")


@needs_it
@pytest.mark.parametrize("family", ["wan", "mochi"])
def test_it_reuses_as_it_says_and_leaves_nothing(build: Build, family: str):
    model = build(family)
    full, before = model(steps=STEPS), state(model)

    def stop(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with (
        counted(blocks(model.denoiser)) as counts,
        accelerate(model, Recipe(steps=LIVE), strict=True) as session,
    ):
        first, told = model(steps=STEPS), cache_of(session.receipt)
        assert told.evaluated == sum(counts) < told.calls
        assert told.pattern.startswith("CCC") and "r" in told.pattern and not told.inert
        assert first.isfinite().all() and not torch.equal(first, full)
        with pytest.raises(KeyboardInterrupt):
            model(steps=STEPS, callback=stop)
        assert torch.equal(model(steps=STEPS), first) and cache_of(session.receipt) == told
    assert state(model) == before and torch.equal(model(steps=STEPS), full)


@needs_it
@pytest.mark.parametrize("family", ["wan", "mochi"])
def test_what_reuses_nothing_is_the_stock_pipeline_and_told(build: Build, family: str):
    model = build(family)
    full = model(steps=STEPS)
    never = DBCache(fn_compute_blocks=1, residual_diff_threshold=0)
    with accelerate(model, Recipe(steps=never)) as session:
        assert torch.equal(model(steps=STEPS), full)
    assert "dbcache reused nothing in 16 steps" in cache_of(session.receipt).inert


@needs_it
def test_guidance_that_it_does_not_count_on_is_refused(build: Build):
    model = build("qwen")
    with (
        pytest.raises(AccelerationError, match="counts on 2 calls of QwenImageTransformer2DModel"),
        accelerate(model, Recipe(steps=LIVE)),
    ):
        model(steps=STEPS)
    model = build("flux")
    model.arguments |= {"true_cfg_scale": 2.0, "negative_prompt": "a blue star"}
    with (
        pytest.raises(AccelerationError, match="counts on 1 calls of FluxTransformer2DModel in a"),
        accelerate(model, Recipe(steps=LIVE)),
    ):
        model(steps=STEPS)


@needs_it
def test_guidance_that_is_off_is_not_counted_on(build: Build):
    model = build("wan")
    model.arguments |= {"guidance_scale": 1.0}
    with accelerate(model, Recipe(steps=LIVE), strict=True) as session:
        model(steps=STEPS)
    assert cache_of(session.receipt).calls == 2 * STEPS


@needs_it
def test_a_denoiser_that_cache_dit_does_not_know_is_refused(build: Build):
    with (
        pytest.raises(AccelerationError, match="UNet2DConditionModel"),
        accelerate(build("sdxl"), Recipe(steps=LIVE)),
    ):
        raise AssertionError("refused before anything runs")
