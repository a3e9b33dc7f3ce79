"""Caches beside sparse attention, and on the two denoisers of Wan 2.2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError
from kinora.accel.method import Planner
from kinora.accel.methods import TopBlocks
from kinora.accel.policies import (
    CachePolicy,
    FasterCache,
    FirstBlockCache,
    MagCache,
    Pattern,
    PyramidAttentionBroadcast,
    SeaCache,
    TaylorSeer,
)
from kinora.accel.recipe import Recipe
from kinora.accel.wrappers import Within

from .cached import blocks, cache_of, counted, ids, units
from .test_skipping_models import components, expert, library, run

Build = Callable[[str], Any]
STEPS = 16
seen: list[tuple[int, int]] = []


class Spy(TopBlocks):
    """Notes the step and layer of every plan."""

    def start(self) -> Planner:
        plan = super().start()

        def noted(q: torch.Tensor, k: torch.Tensor, site: Any) -> Any:
            seen.append((site.step, site.layer))
            return plan(q, k, site)

        return noted


def sparse(policy: CachePolicy | None, **options: Any) -> Recipe:
    return Recipe(attention=Spy(keep=0.5, tile="64x64", **options), when="always", steps=policy)


TOGETHER: list[tuple[str, CachePolicy]] = [
    ("wan", FirstBlockCache(threshold=0.3)),
    ("wan", TaylorSeer(cache_identifiers="blocks[.]0[.]attn1")),
    ("wan", TaylorSeer(cache_identifiers="blocks[.]1[.]attn1")),
    ("wan", SeaCache(threshold=1)),
    ("flux", MagCache()),
    ("mochi", FirstBlockCache(threshold=0.5)),
    ("mochi", PyramidAttentionBroadcast()),
    ("mochi", TaylorSeer(cache_identifiers="transformer_blocks[.]0[.]attn1")),
    ("hunyuan", PyramidAttentionBroadcast()),
    ("hunyuan", FirstBlockCache(threshold=0.5)),
]


@pytest.mark.parametrize(("family", "policy"), TOGETHER, ids=ids)
def test_attention_that_is_reused_makes_no_plan_and_the_other_is_its_own_layers(
    build: Build, family: str, policy: CachePolicy
):
    """Layers are told apart by where they ran, though some of them did not."""
    model = build(family)
    own = units(model.denoiser, TaylorSeer())
    ran: list[tuple[int, int]] = []
    step = 0

    def count(place: int) -> Callable[..., None]:
        return lambda *_: ran.append((step, place))

    def next_step(_: int) -> None:
        nonlocal step
        step += 1

    handles = [
        next(
            it for it in module.modules() if isinstance(it, torch.nn.Linear)
        ).register_forward_hook(count(place))
        for place, module in enumerate(own)
    ]
    seen.clear()
    with accelerate(model, sparse(policy)) as session:
        out = model(steps=STEPS, callback=next_step)
    for handle in handles:
        handle.remove()
    told, attention = cache_of(session.receipt), session.receipt.attention
    assert attention is not None and "r" in told.pattern and out.isfinite().all()
    # Mochi attends once for each text of a batch.
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(ran))
    assert len(seen) % len(ran) == 0
    assert sum(attention.kernels.values()) == attention.calls == len(seen)
    assert f"ran: {len(seen)} of {len(seen)} attention calls" in "\n".join(session.receipt.words())


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("wan", FirstBlockCache(threshold=0)),
        ("mochi", PyramidAttentionBroadcast(spatial_skip_range=1)),
    ],
    ids=ids,
)
def test_a_cache_that_reuses_nothing_leaves_sparse_attention_as_it_is(
    build: Build, family: str, policy: CachePolicy
):
    model = build(family)
    with accelerate(model, sparse(None)):
        alone = model(steps=8)
    with accelerate(model, sparse(policy)) as session:
        assert torch.equal(model(steps=8), alone)
    assert cache_of(session.receipt).pattern == "C" * 8


def test_dense_calls_by_a_named_kernel_go_with_a_cache(build: Build):
    model = build("wan")
    with accelerate(model, Recipe(dense_kernel="sdpa", steps=FirstBlockCache(threshold=0.3))) as it:
        model(steps=STEPS)
    attention, told = it.receipt.attention, cache_of(it.receipt)
    assert attention is not None and attention.dense_kernels == {"sdpa": told.evaluated}


def test_plans_do_not_follow_batches_that_are_halved(build: Build):
    with (
        pytest.raises(AccelerationError, match="faster-cache and sparse attention do not go toget"),
        accelerate(build("cogvideox"), sparse(FasterCache())),
    ):
        raise AssertionError("refused before anything runs")


def test_both_experts_have_a_cache_of_their_own(model_folders: dict[str, Path]):
    torch.manual_seed(0)
    high, low = (expert(layers=3).eval() for _ in range(2))
    parts = {**components(model_folders["wan"]), "transformer": high, "transformer_2": low}
    pipe = library().WanPipeline(**parts, boundary_ratio=0.8)
    given: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}
    full = run(pipe, **given)
    switch = sum(t >= 800 for t in pipe.scheduler.timesteps)
    recipe = Recipe(steps=FirstBlockCache(threshold=0.5))
    with (
        counted([*blocks(high), *blocks(low)]) as counts,
        accelerate(pipe, recipe, strict=True) as session,
    ):
        first, told = run(pipe, **given), cache_of(session.receipt)
        evaluated = counts.copy()
        assert torch.equal(run(pipe, **given), first) and cache_of(session.receipt) == told
    assert told.hooked == 6 and told.evaluated == sum(evaluated) < told.calls == 6 * 16
    assert told.pattern[0] == told.pattern[switch] == "C", "the other expert's past is no past"
    assert evaluated[0] == 2 * switch and evaluated[3] == 2 * (16 - switch)
    assert 0 < evaluated[1] < evaluated[0] and 0 < evaluated[4] < evaluated[3]
    assert torch.equal(run(pipe, **given), full) and not torch.equal(first, full)
    for policy in (MagCache(mag_ratios="1"), PyramidAttentionBroadcast()):
        told_of = "second of two denoisers" if isinstance(policy, MagCache) else "keeps one past"
        with (
            pytest.raises(AccelerationError, match=told_of),
            accelerate(pipe, Recipe(steps=policy)),
        ):
            raise AssertionError("refused before anything runs")


@pytest.mark.parametrize("leaves_out", ["nothing", "steps", "blocks"])
def test_strict_runs_may_leave_out_the_steps_of_their_attention(
    build: Build, leaves_out: str, tmp_path: Path
):
    """Attention in seven of sixteen steps, which a policy skips, or a cache may."""
    (tmp_path / "mask").write_text("CCCC" + "s" * 7 + "CCCCC")
    policies: dict[str, Any] = {
        "nothing": None,
        "steps": Pattern(mask=str(tmp_path / "mask")),
        "blocks": FirstBlockCache(threshold=0.5),
    }
    model = build("wan")
    keep = 1 if leaves_out != "steps" else 0.5
    inner = Within(method=TopBlocks(keep=keep, tile="64x64"), from_step=0.25, to_step=0.6875)
    recipe = Recipe(attention=inner, when="always", steps=policies[leaves_out])
    with accelerate(model, recipe, strict=True) as session:
        if leaves_out == "nothing":
            with pytest.raises(AccelerationError, match="strict: all attention ran dense"):
                model(steps=16)
        else:
            model(steps=16)
    ran = session.receipt.attention
    assert ran is not None and not ran.kernels and not ran.fallbacks
