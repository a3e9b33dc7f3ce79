"""What a session follows, and what it refuses to take for a step of its run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError
from kinora.accel.methods import TopBlocks
from kinora.accel.recipe import Recipe

Build = Callable[[str], Any]


def sparse(keep: float = 0.5) -> Recipe:
    return Recipe(attention=TopBlocks(keep=keep, tile="64x64"), when="always")


def test_steps_that_cannot_be_followed_are_refused(build: Build):
    model, other = build("wan"), build("wan")
    other.pipe.transformer = model.transformer
    with accelerate(model.pipe, sparse()):
        with pytest.raises(AccelerationError, match="steps that cannot be followed"):
            other()
        model.pipe.scheduler = copy.deepcopy(model.scheduler)
        with pytest.raises(AccelerationError, match="steps that cannot be followed"):
            model()


def test_a_call_of_the_denoiser_alone_is_refused_before_and_after_a_run(build: Build):
    for family in ("wan", "ltx"):
        model = build(family)
        calls: list[dict[str, Any]] = []
        handle = model.transformer.register_forward_pre_hook(
            lambda _module, _args, kwargs, calls=calls: calls.append(kwargs), with_kwargs=True
        )
        dense = model()
        handle.remove()
        alone = calls[-1]
        with accelerate(model, sparse()) as session:
            with pytest.raises(AccelerationError, match="steps that cannot be followed"):
                model.transformer(**alone)
            first = model()
            told = session.receipt
            with pytest.raises(AccelerationError, match="steps that cannot be followed"):
                model.transformer(**alone)
            assert session.receipt == told
            assert torch.equal(model(), first) and not torch.equal(first, dense)
        with torch.no_grad():
            model.transformer(**alone)


def test_pipelines_that_share_a_scheduler_are_told_how_not_to(build: Build):
    model, other = build("wan"), build("wan")
    dense = other()
    other.pipe.scheduler = model.scheduler
    with accelerate(model.pipe, sparse()) as session:
        remedy = r"shares its scheduler: .* by type\(scheduler\)\.from_config\(scheduler\.config\)"
        with pytest.raises(AccelerationError, match=remedy):
            other()
        scheduler = other.pipe.scheduler
        other.pipe.scheduler = type(scheduler).from_config(scheduler.config)
        assert torch.equal(other(), dense)
        model()
        assert session.receipt.steps == 3


def test_a_copy_made_inside_is_stock(build: Build):
    model, dense = build("ltx"), build("ltx")()
    with accelerate(model, sparse()):
        other = copy.deepcopy(model.transformer)
    vars(other).pop("_compiled_call_impl", None)
    model.transformer = other
    assert torch.equal(model(), dense)


def test_a_cache_that_skips_layers_is_refused_before_anything_runs(build: Build):
    import importlib

    diffusers: Any = importlib.import_module("diffusers")
    model = build("wan")
    model.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with (
        pytest.raises(AccelerationError, match=r"call disable_cache\(\)"),
        accelerate(model, sparse()),
    ):
        pass


def test_attention_with_gradients_takes_no_kernel_unseen(build: Build):
    model = build("ltx")
    model.scheduler.set_timesteps(2)
    x = torch.randn(model.latents, requires_grad=True)
    recipe = Recipe(attention=TopBlocks(keep=0.05, tile="64x64"))
    with accelerate(model, recipe) as session:
        model.scheduler.set_timesteps(2)
        time = model.scheduler.timesteps[:1]
        model.transformer(hidden_states=x, timestep=time, **model.arguments)
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels and "reference kernel" in ran.fallbacks[0]


def test_a_run_that_begins_in_the_middle_is_told_so(build: Build):
    seen: list[int] = []

    class Spy(TopBlocks):
        """Notes its steps."""

        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Any) -> Any:
            seen.append(site.step)
            return super().plan(q, k, site)

    model = build("cogvideox")
    pipe = model.pipe
    x = torch.randn(1, 2, 4, 16, 16)
    text = torch.zeros(1, 226, 16)
    assert not hasattr(pipe.scheduler, "begin_index")
    with accelerate(pipe, Recipe(attention=Spy(keep=0.5, tile="64x64"), when="always")):
        pipe.scheduler.set_timesteps(10)
        for t in pipe.scheduler.timesteps[5:7]:
            with torch.no_grad():
                out = pipe.transformer(x, text, t[None], return_dict=False)[0]
            x = pipe.scheduler.step(out, t, x)[0]
    assert seen == [5, 6]
