"""Caches of libraries: they reuse what they say, leave nothing behind, and are refused if wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.attach.hooked import config_of
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
from kinora.accel.receipt import Receipt
from kinora.accel.recipe import Recipe

from .cached import blocks, cache_of, counted, ids, lite, state, units
from .conftest import Loop

Build = Callable[[str], Any]
STEPS = 16
PAB = PyramidAttentionBroadcast
# Of FasterCache's frequencies, which diffusers asks torch for as it did in earlier versions.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

LIVE: list[tuple[str, CachePolicy]] = [
    ("wan", FirstBlockCache(threshold=0.3)),
    ("flux", FirstBlockCache(threshold=0.3)),
    ("ltx", FirstBlockCache(threshold=0.5)),
    ("qwen", FirstBlockCache(threshold=0.5)),
    ("hunyuan", FirstBlockCache(threshold=0.5)),
    ("mochi", FirstBlockCache(threshold=0.5)),
    ("wan", TaylorSeer(use_lite_mode=True)),
    ("cogvideox", TaylorSeer(use_lite_mode=True, cache_interval=3)),
    ("flux", TaylorSeer()),
    ("wan", TaylorSeer(cache_identifiers="blocks[.].*attn1", max_order=2)),
    ("flux", MagCache()),
    ("wan", MagCache(mag_ratios="1, 0.99 0.98")),
    ("mochi", MagCache(mag_ratios="1")),
    ("wan", SeaCache(threshold=1)),
    ("wan", SeaCache(threshold=1, residual_order=0, max_consecutive_cached=0)),
    ("cogvideox", PAB()),
    ("mochi", PAB(spatial_skip_range=3)),
    ("flux", PAB()),
    ("cogvideox", FasterCache()),
    ("flux", FasterCache()),
]
NEVER: list[tuple[str, CachePolicy]] = [
    ("wan", FirstBlockCache(threshold=0)),
    ("mochi", FirstBlockCache(threshold=0)),
    ("flux", TaylorSeer(cache_interval=1)),
    ("wan", MagCache(mag_ratios="1", max_skip_steps=0)),
    ("wan", MagCache(calibrate=True)),
    ("wan", SeaCache(threshold=0)),
    ("cogvideox", PAB(spatial_skip_range=1)),
    ("flux", PAB(above_timestep=999)),
    ("cogvideox", FasterCache(spatial_skip_range=1, unconditional_skip_range=1)),
]


@pytest.mark.parametrize(
    "policy",
    [FirstBlockCache(), TaylorSeer(), MagCache(), SeaCache(), PAB(), FasterCache()],
    ids=ids,
)
def test_defaults_are_those_of_diffusers(policy: CachePolicy):
    """But for what diffusers asks for, or takes with a warning."""
    own = {"num_inference_steps", "mag_ratios", "tensor_format", "attention_weight_callback"}
    own |= {"current_timestep_callback"}
    made = config_of(policy, "CogVideoXTransformer3DModel", STEPS, lambda: 0.0)
    stock = type(made)(**({"mag_ratios": [1.0]} if isinstance(policy, MagCache) else {}))
    asked = {"spatial_attention_block_skip_range": 2} if isinstance(policy, PAB) else {}
    for field in dataclasses.fields(made):
        if field.name not in own:
            default = asked.get(field.name, getattr(stock, field.name))
            assert getattr(made, field.name) == default, field.name


@pytest.mark.parametrize(("family", "policy"), LIVE, ids=ids)
def test_a_live_cache_reuses_as_it_says(build: Build, family: str, policy: CachePolicy):
    model = build(family)
    modules = units(model.denoiser, policy)
    before = state(model)
    with counted(modules) as counts:
        full = model(steps=STEPS)
        stock, evaluated = counts.copy(), counts
        assert min(stock) == max(stock) > 0
        counts[:] = [0] * len(counts)
        with accelerate(model, Recipe(steps=policy)) as session:
            out = model(steps=STEPS)
            # Between runs it is off: the last step of one has taken it off.
            assert not model.denoiser.is_cache_enabled
        told = cache_of(session.receipt)
        # The last projection goes as the blocks do.
        share = (len(modules) + lite(policy)) / len(modules)
        assert told.evaluated == share * sum(evaluated) < told.calls == share * sum(stock)
        assert told.hooked == share * len(modules) and not told.inert
        assert len(told.pattern) == STEPS and set(told.pattern) == {"C", "r"}
        assert told.pattern[0] == "C"
        assert out.isfinite().all() and not torch.equal(out, full)
        assert session.receipt.steps == STEPS and session.receipt.skipped == 0
    assert state(model) == before
    assert torch.equal(model(steps=STEPS), full)
    words = session.receipt.words()
    reused = told.calls - told.evaluated
    assert words[0] == f"asked: steps by {policy.words()}"
    assert f"ran: {reused} of {told.calls} calls of {told.hooked} {policy.unit}s reused" in words[1]
    assert (told.halved > 0) == (isinstance(policy, FasterCache) and family == "cogvideox")


@pytest.mark.parametrize("policy", [SeaCache(threshold=1), FirstBlockCache(threshold=0.5)], ids=ids)
def test_steps_and_branches_are_told_to_caches_where_no_pipeline_does(
    build: Build, policy: CachePolicy
):
    """As in Wan's video to video: by itself one runs full there, and the other raises."""
    pipe = build("wan")
    text = {"encoder_hidden_states": torch.randn(1, 8, 16)}
    loop = Loop(pipe.transformer, pipe.scheduler, (1, 4, 3, 16, 16), text)
    full = loop(steps=STEPS)
    pipe.transformer.enable_cache(config_of(policy, "", STEPS, lambda: 0.0))
    if isinstance(policy, SeaCache):
        assert torch.equal(loop(steps=STEPS), full)
    else:
        with pytest.raises(ValueError, match="No cache context is set"):
            loop(steps=STEPS)
    pipe.transformer.disable_cache()
    with accelerate(loop, Recipe(steps=policy), strict=True) as session:
        out = loop(steps=STEPS)
    assert "r" in cache_of(session.receipt).pattern and not torch.equal(out, full)


@pytest.mark.parametrize(("family", "policy"), NEVER, ids=ids)
def test_what_reuses_nothing_is_bitwise_the_stock_pipeline(
    build: Build, family: str, policy: CachePolicy
):
    model = build(family)
    full = model(steps=STEPS)
    with accelerate(model, Recipe(steps=policy)) as session:
        assert torch.equal(model(steps=STEPS), full)
    told = cache_of(session.receipt)
    assert told.pattern == "C" * STEPS and told.calls == told.evaluated > 0
    if policy.measures():
        return
    assert f"{policy.name} reused nothing in 16 steps: " in told.inert
    assert session.receipt.words()[-1] == f"inert: {told.inert}"
    before = state(model)
    with (
        pytest.raises(AccelerationError, match=f"strict: {policy.name} reused nothing"),
        accelerate(model, Recipe(steps=policy), strict=True),
    ):
        model(steps=STEPS)
    assert state(model) == before


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_cache_that_finds_nothing_is_told_and_refused_if_strict(build: Build, family: str):
    """diffusers' TaylorSeer looks for modules called `attn`; these call theirs `attn1`."""
    model = build(family)
    full = model(steps=STEPS)
    with accelerate(model, Recipe(steps=TaylorSeer())) as session:
        assert "taylorseer found no module" in cache_of(session.receipt).inert
        assert torch.equal(model(steps=STEPS), full)
    assert cache_of(session.receipt).hooked == 0
    assert session.receipt.words()[-1].startswith("inert: taylorseer found no module in ")
    assert "steps.use_lite_mode=true" in session.receipt.words()[-1]
    with (
        pytest.raises(AccelerationError, match="strict: taylorseer found no module"),
        accelerate(model, Recipe(steps=TaylorSeer()), strict=True),
    ):
        raise AssertionError("refused before anything runs")


LASTING: list[tuple[str, CachePolicy]] = [
    ("wan", FirstBlockCache(threshold=0.3)),
    ("wan", TaylorSeer(use_lite_mode=True)),
    ("flux", MagCache()),
    ("wan", SeaCache(threshold=1)),
    ("cogvideox", PAB()),
    ("cogvideox", FasterCache()),
]


@pytest.mark.parametrize(("family", "policy"), LASTING, ids=ids)
def test_runs_do_not_know_of_each_other_broken_off_ones_neither(
    build: Build, family: str, policy: CachePolicy
):
    model = build(family)
    before, full = state(model), model(steps=STEPS)

    def stop(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with accelerate(model, Recipe(steps=policy)) as session:
        first, told = model(steps=STEPS), session.receipt
        with pytest.raises(KeyboardInterrupt):
            model(steps=STEPS, callback=stop)
        assert len(cache_of(session.receipt).pattern) == 10
        assert torch.equal(model(steps=STEPS), first) and session.receipt == told
        assert not torch.equal(model(steps=STEPS, seed=1), first)
        assert torch.equal(model(steps=STEPS), first)
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), accelerate(model, Recipe(steps=policy)):
        model(steps=STEPS, callback=stop)
    assert state(model) == before
    assert torch.equal(model(steps=STEPS), full)


def test_a_receipt_is_read_again_and_older_ones_too(build: Build):
    model = build("flux")
    with accelerate(model, Recipe(steps=MagCache(calibrate=True))) as session:
        assert session.receipt.words()[-1] == "nothing has run yet"
        model(steps=4)
    again = Receipt.model_validate_json(session.receipt.model_dump_json())
    assert again == session.receipt
    older = session.receipt.model_dump(exclude={"cache"})
    assert Receipt.model_validate(older).cache is None


def test_measured_ratios_are_those_of_what_the_blocks_add(build: Build):
    """Of the calls with the prompt, Wan's first in each step; then they serve a run."""
    model = build("wan")
    given: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    first, *_, last = blocks(model.denoiser)
    handles = [
        first.register_forward_hook(lambda _m, args, _out: given.append(args[0])),
        last.register_forward_hook(lambda _m, _args, out: added.append(out - given[-1])),
    ]
    model(steps=STEPS)
    for handle in handles:
        handle.remove()
    sizes = [it.norm(dim=-1) for it in added[::2]]
    expected = [1.0] + [float((b / a).mean()) for a, b in pairwise(sizes)]
    with accelerate(model, Recipe(steps=MagCache(calibrate=True)), strict=True) as session:
        model(steps=STEPS)
    ratios = cache_of(session.receipt).ratios
    assert ratios == pytest.approx(expected, abs=1e-4) and len(ratios) == STEPS
    told = session.receipt.words()[-1].removeprefix("measured: mag_ratios = ")
    with accelerate(model, Recipe(steps=MagCache(mag_ratios=told)), strict=True) as session:
        model(steps=STEPS)
    assert "r" in cache_of(session.receipt).pattern
