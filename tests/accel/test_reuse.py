"""`reuse`: plans kept over steps and shared between guidance branches; SparseD's invariants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.grid import TokenGrid
from kinora.accel.method import Plan, Planner
from kinora.accel.methods import TopBlocks, XAttention
from kinora.accel.recipe import Recipe, changed, find
from kinora.accel.site import Site
from kinora.accel.wrappers import Reuse, Within
from kinora.kernels.plan import BlockPlan, Tile

Build = Callable[[str], Any]
GRID = TokenGrid(8, 9, 10)
SITE = Site(GRID, layer=0, layers=2, step=0, steps=10)
SPARSED = (
    "attention.method=x-attention",
    "attention.threshold=0",
    "attention.stride=1",
    "attention.least=0.3",
    "attention.tile=64x64",
    "attention.from_step=0.2",
    "attention.every=0",
)


class Spy(TopBlocks):
    """Notes step, branch, layer and batch of what it is asked."""

    asked: list[tuple[int, int, int, int]]

    def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
        """See `AttentionMethod`."""
        self.asked.append((site.step, site.branch, site.layer, q.shape[0]))
        return super().plan(q, k, site)


def spy() -> Spy:
    return Spy(asked=[], keep=0.5, tile="64x64")


def tensors(batch: int = 1, site: Site = SITE, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, 3, site.tokens, 16)
    q, k = torch.randn(shape, generator=generator, dtype=torch.float64)
    return q, k


def sparsed() -> Planner:
    method = changed(find("dense"), SPARSED).attention
    assert method is not None
    return method.start()


def asked(planner: Planner, batch: int = 1, **site: Any) -> Plan | None:
    return planner(*tensors(batch), dataclasses.replace(SITE, **site))


def same(first: Plan | None, second: Plan | None) -> bool:
    assert isinstance(first, BlockPlan) and isinstance(second, BlockPlan)
    return torch.equal(first.mask(), second.mask())


# --- SparseD ----------------------------------------------------------------------------------


def test_after_the_dense_steps_one_plan_is_made_and_kept_to_the_end():
    planner = sparsed()
    plans = [asked(planner, step=step) for step in range(10)]
    assert plans[:2] == [None, None] and plans[2] is not None
    assert all(plan is plans[2] for plan in plans[2:])


@pytest.mark.parametrize("text", [0, 70])
def test_each_head_keeps_the_tiles_of_the_most_attention_and_all_text(text: int):
    """The literal definition: softmax, means over tiles, the best of each row of each head."""
    at = dataclasses.replace(SITE, step=2, text=text)
    q, k = tensors(site=at)
    plan = sparsed()(q, k, at)
    assert isinstance(plan, BlockPlan) and plan.order is not None
    weights = (q @ k.mT / 4).softmax(-1)[..., plan.order, :][..., plan.order]
    tiles = torch.arange(at.tokens) // 64
    pooled = weights.new_zeros(1, 3, plan.rows, plan.columns)
    pooled.index_put_(
        (torch.tensor(0), torch.arange(3)[:, None, None], tiles[:, None], tiles),
        weights[0],
        accumulate=True,
    )
    forced = torch.eye(plan.rows, dtype=torch.bool)
    has_text = at.is_text()[plan.order].nonzero()[:, 0] // 64
    forced[has_text], forced[:, has_text] = True, True
    count = -(-3 * plan.columns // 10)
    best = pooled.masked_fill(forced, 9e9).topk(count, -1).indices
    expected = torch.zeros_like(pooled, dtype=torch.bool).scatter_(-1, best, True) | forced
    assert torch.equal(plan.mask(), expected)
    assert (plan.counts[..., ~forced.all(-1)] == count).all()
    assert not torch.equal(plan.mask()[0, 0], plan.mask()[0, 1])


def test_a_constant_added_to_the_logits_of_a_query_changes_nothing():
    q, k = tensors()
    at = dataclasses.replace(SITE, step=2)
    shifted = k + torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert same(sparsed()(q, k, at), sparsed()(q, shifted, at))


def test_the_whole_share_is_dense():
    whole = Reuse(method=XAttention(threshold=0, stride="1", least=1), every=0)
    assert whole.start()(*tensors(), SITE) is None and whole.predict(SITE) == 1


# --- keeping ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "made"), [(1, 6), (2, 3), (4, 2), (0, 1), (1000, 1)])
def test_a_plan_serves_as_many_steps_as_asked(every: int, made: int):
    inner = spy()
    planner = Reuse(method=inner, every=every).start()
    for step in range(6):
        asked(planner, step=step)
    assert len(inner.asked) == made


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 1},
        {"expert": 1},
        {"branch": 1},
        {"text": 5},
        {"grid": TokenGrid(8, 9, 11)},
    ],
)
def test_layers_denoisers_branches_and_tokens_have_plans_of_their_own(change: dict[str, Any]):
    inner = spy()
    planner = Reuse(method=inner, every=0).start()
    other = dataclasses.replace(SITE, **change)
    plans = [planner(*tensors(site=at), at) for at in (SITE, other, SITE, other)]
    assert len(inner.asked) == 2
    assert plans[0] is plans[2] and plans[1] is plans[3] and plans[0] is not plans[1]


def test_each_run_begins_anew():
    inner = spy()
    method = Reuse(method=inner, every=0)
    runs = [method.start(), method.start()]
    for run in (*runs, *runs):
        asked(run)
    assert len(inner.asked) == 2


# --- guidance ---------------------------------------------------------------------------------


def test_branches_choose_for_themselves_or_the_prompts_for_all():
    q, k = tensors(batch=2)
    apart = [(q[i : i + 1], k[i : i + 1]) for i in range(2)]
    second = dataclasses.replace(SITE, branch=1)
    own = Reuse(method=spy(), every=0).start()
    assert not same(own(*apart[0], SITE), own(*apart[1], second))
    for every in (0, 1):
        inner = spy()
        planner = Reuse(method=inner, every=every, branches="shared").start()
        assert planner(*apart[0], SITE) is planner(*apart[1], second)
        assert [branch for _, branch, _, _ in inner.asked] == [0]


@pytest.mark.parametrize("prompts", [1, 3])
def test_shared_plans_are_the_same_whether_guidance_is_batched_or_not(prompts: int):
    q, k = tensors(batch=2 * prompts)
    both = dataclasses.replace(SITE, branches=2)
    batched = Reuse(method=spy(), branches="shared").start()(q, k, both)
    # In a batch the prompts are last, of calls theirs is first.
    alone = Reuse(method=spy(), branches="shared").start()(q[prompts:], k[prompts:], SITE)
    assert isinstance(batched, BlockPlan) and isinstance(alone, BlockPlan)
    assert batched.indices.shape[0] in (1, 2 * prompts)
    mask = batched.mask().expand(2 * prompts, -1, -1, -1)
    assert torch.equal(mask, alone.mask().repeat(2, 1, 1, 1))


def test_a_batch_is_split_from_when_it_is_known_to_be_two_branches():
    inner = spy()
    planner = Reuse(method=inner, every=0, branches="shared").start()
    plans = [asked(planner, batch=2, step=i, branches=min(2, i + 1)) for i in range(4)]
    assert [batch for *_, batch in inner.asked] == [2, 1]
    assert plans[1] is plans[2] is plans[3]


def test_own_plans_do_not_depend_on_what_is_known_of_the_batch():
    inner = spy()
    planner = Reuse(method=inner, every=0).start()
    assert asked(planner, batch=2) is asked(planner, batch=2, step=1, branches=2)


@pytest.mark.parametrize("branches", ["own", "shared"])
def test_pipelines_with_guidance_in_calls_and_in_batches(build: Build, branches: Any):
    shared = branches == "shared"
    for family, calls, layers in (("wan", 2, 2), ("cogvideox", 1, 1)):
        inner, model = spy(), build(family)
        method = Within(method=Reuse(method=inner, every=2, branches=branches), from_step=0.2)
        recipe = Recipe(attention=method, when="always")
        with accelerate(model, recipe) as session:
            out = model(steps=5)
        told = session.receipt.attention
        assert told is not None and told.kernels == {"cpu": 4 * calls * layers} and told.density < 1
        items = 1 if calls == 2 or shared else 2
        assert inner.asked == [
            (step, branch, layer, items)
            for step in (1, 3)
            for branch in range(1 if shared else calls)
            for layer in range(layers)
        ]
        with accelerate(model, recipe):
            assert torch.equal(model(steps=5), out)  # nothing is left from the first run


# --- memory and words -------------------------------------------------------------------------


@pytest.mark.parametrize("branches", ["own", "shared"])
def test_the_memory_of_kept_plans_is_predicted(branches: Any):
    shape = Shape((transformer_layer(4, 64, 1024, text=0, cross_attention=True),) * 3)
    grid = TokenGrid(9, 16, 16)

    def workspace(method: Any) -> int:
        return predict(
            method, shape, grid, device="cpu", dtype=torch.float32, steps=4, always=True
        ).workspace

    method = TopBlocks(keep=0.25, tile="64x64")
    more = workspace(Reuse(method=method, every=0, branches=branches)) - workspace(method)
    at = Site(grid, 0, 3, 0, 4)
    q, k = torch.randn(2, 2, 4, grid.tokens, 64)
    plan = method.plan(q, k, at)
    assert plan is not None
    held = 4 * (plan.indices.numel() + plan.counts.numel())
    assert more == 3 * held // (2 if branches == "shared" else 1)


def test_it_says_what_it_does():
    assert Reuse(method=TopBlocks(), every=4).words().endswith("each plan kept for 4 steps")
    kept = Reuse(method=TopBlocks(), every=0, branches="shared").words()
    assert kept.endswith("each plan kept to the end, one for all guidance branches")
    only = Reuse(method=TopBlocks(), branches="shared").words()
    assert "kept" not in only.replace("keep", "") and only.endswith("for all guidance branches")


def test_a_plan_is_repeated_with_all_that_it_has():
    plan = BlockPlan(
        indices=torch.randint(0, 3, (2, 1, 3, 2), dtype=torch.int32),
        counts=torch.ones(2, 1, 3, dtype=torch.int32),
        tile=Tile(64, 64), queries=150, keys=150,
        order=torch.stack([torch.randperm(150) for _ in range(2)])[:, None],
        bias=torch.randn(2, 1, 3, 2),
    )  # fmt: skip
    twice = plan.repeated(2)
    for name in ("indices", "counts", "order", "bias"):
        assert torch.equal(getattr(twice, name), torch.cat([getattr(plan, name)] * 2))
    alike = dataclasses.replace(plan, order=None, bias=None, indices=plan.indices[:1],
                                counts=plan.counts[:1])  # fmt: skip
    assert alike.repeated(5).indices.shape[0] == 1
