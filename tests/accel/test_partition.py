"""Partitions of a clip, and which blocks queries take: against loops that say the rule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.partition import (
    Rule,
    Scope,
    block_scores,
    by_choice,
    chosen_blocks,
    partition,
)

GRID = TokenGrid(3, 5, 8)
PARTS = TokenGrid(2, 3, 2)  # none of which divides
RULES: list[Rule] = ["top", "similarity", "softmax"]
SCOPES: list[Scope] = ["query", "head", "global"]
rules = pytest.mark.parametrize("rule", RULES)
scopes = pytest.mark.parametrize("scope", SCOPES)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_scores(heads: int = 2) -> torch.Tensor:
    """Eighths, so that there are ties and sums are exact."""
    return (random(2, heads, GRID.tokens, PARTS.tokens) * 8).round() / 8


def chosen(scores: torch.Tensor, rule: Rule, scope: Scope, share: float) -> torch.Tensor:
    cut = partition(GRID, PARTS)
    return chosen_blocks(
        scores, cut.owner, cut.sizes, rule=rule, scope=scope, share=share, scale=0.25
    )


def by_loops(scores: torch.Tensor, rule: Rule, scope: Scope, share: float) -> torch.Tensor:
    """The same, one pair of a query and a block after the other."""
    cut = partition(GRID, PARTS)
    owner, sizes = cut.owner.tolist(), cut.sizes.tolist()
    batch, heads, queries, count = scores.shape
    pools: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for at in itertools.product(*map(range, scores.shape)):
        b, h, i, _ = at
        key = {"query": (b, h, i), "head": (b, h), "global": (b,)}[scope]
        pools.setdefault(key, []).append(at)
    taken = torch.zeros(batch, heads, queries, count, dtype=torch.bool)
    for pool in pools.values():
        given = {at: float(scores[at]) for at in pool}
        weights = given
        if rule == "similarity":
            low, high = min(given.values()), max(given.values())
            weights = {at: (it - low) / (high - low) for at, it in given.items()}
        elif rule == "softmax":
            parts = {at: sizes[at[3]] * math.exp(0.25 * it) for at, it in given.items()}
            sums: dict[tuple[int, ...], float] = {}
            for at, it in parts.items():
                sums[at[:3]] = sums.get(at[:3], 0) + it
            weights = {at: it / sums[at[:3]] for at, it in parts.items()}
        own = [at for at in pool if owner[at[2]] == at[3]]
        rest = sorted((at for at in pool if at not in set(own)), key=lambda at: -weights[at])
        whole = len(own) * math.ceil(share * count) if rule == "top" else share * sum(
            weights.values()
        )  # fmt: skip
        held = 0.0
        for at in [*own, *rest]:
            if at not in own and held >= whole and share < 1:
                break
            taken[at] = True
            held += 1 if rule == "top" else weights[at]
    return taken


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        (GRID, PARTS),
        (TokenGrid(21, 30, 52), TokenGrid(3, 6, 4)),
        (TokenGrid(9, 7, 11), TokenGrid(7, 1, 1)),
        (TokenGrid(2, 9, 5), TokenGrid(7, 4, 40)),
        (TokenGrid(1, 1, 1), TokenGrid(3, 6, 4)),
    ],
    ids=str,
)
def test_blocks_are_cuboids_of_nearly_one_size_one_behind_the_other(
    grid: TokenGrid, parts: TokenGrid
):
    cut = partition(grid, parts)
    assert sorted(cut.places.tolist()) == list(range(grid.tokens))
    owners = cut.owner[cut.places]
    assert torch.equal(owners, owners.sort().values)
    assert torch.equal(cut.sizes, cut.owner.bincount()) and cut.sizes.min() > 0
    assert len(cut.sizes) == cut.blocks.tokens
    volume = cut.owner.view(grid.frames, grid.height, grid.width)
    sides: tuple[set[int], ...] = (set(), set(), set())
    for block in range(len(cut.sizes)):
        at = (volume == block).nonzero()
        spans = (at.amax(0) - at.amin(0) + 1).tolist()
        assert math.prod(spans) == cut.sizes[block]  # a cuboid without holes
        for side, span in zip(sides, spans, strict=True):
            side.add(span)
    assert all(max(side) - min(side) <= 1 for side in sides)


def test_the_papers_blocks_on_its_grid():
    grid = TokenGrid(21, 30, 52)
    for parts, size in (
        (TokenGrid(7, 1, 1), 3 * 30 * 52),
        (TokenGrid(1, 6, 4), 21 * 5 * 13),
        (TokenGrid(3, 6, 4), 7 * 5 * 13),
    ):
        assert partition(grid, parts).sizes.tolist() == [size] * parts.tokens


def test_scores_are_products_with_the_means_of_blocks():
    cut = partition(GRID, PARTS)
    q, k = (random(2, 3, GRID.tokens, 16, seed=it, dtype=torch.float64) for it in range(2))
    mean = k.mean(2)
    for block in range(len(cut.sizes)):
        expected = (q @ (k[:, :, cut.owner == block].mean(2) - mean)[..., None])[..., 0]
        found = block_scores(q, k, cut.owner, cut.sizes)[..., block]
        torch.testing.assert_close(found, expected.float())


@rules
@scopes
@pytest.mark.parametrize("share", [1e-6, 0.2, 0.45, 0.8, 1.0])
def test_it_takes_what_loops_take(rule: Rule, scope: Scope, share: float):
    scores = some_scores()
    if rule != "top":
        scores = random(*scores.shape)  # none are equal, since sums of weights are not exact
    expected = by_loops(scores, rule, scope, share)
    assert torch.equal(chosen(scores, rule, scope, share), expected)


@rules
@scopes
def test_its_own_block_is_always_taken_and_alone_where_that_is_enough(rule: Rule, scope: Scope):
    own = torch.arange(PARTS.tokens) == partition(GRID, PARTS).owner[:, None]
    scores = torch.where(own, -1.0, random(2, 2, *own.shape))
    assert chosen(scores, rule, scope, 0.3)[..., own].all()
    least = chosen(torch.where(own, 9.0, scores), rule, scope, 1e-6)
    assert torch.equal(least, own.expand_as(least))


@rules
@scopes
def test_more_is_taken_of_a_larger_share_and_nothing_lost(rule: Rule, scope: Scope):
    scores = some_scores()
    found = [chosen(scores, rule, scope, it / 10) for it in range(1, 11)]
    for less, more in itertools.pairwise(found):
        assert (less <= more).all()
    assert found[0].sum() < found[-2].sum() and found[-1].all()


@scopes
def test_top_takes_as_many_as_it_says(scope: Scope):
    queries = GRID.tokens
    for scores in (random(2, 3, queries, 12), torch.zeros(2, 3, queries, 12)):
        taken = chosen(scores, "top", scope, 0.25).sum(-1)
        assert (taken.sum((1, 2)) == 3 * queries * 3).all()
        if scope != "global":
            assert (taken.sum(2) == queries * 3).all()
        if scope == "query":
            assert (taken == 3).all()


@pytest.mark.parametrize("rule", ["similarity", "softmax"])
@scopes
def test_of_equal_weights_the_first_are_taken(rule: Rule, scope: Scope):
    grid, parts = TokenGrid(4, 6, 8), TokenGrid(2, 1, 4)  # even blocks
    cut = partition(grid, parts)
    scores = torch.full((2, 3, grid.tokens, 8), 0.5)
    given: dict[str, Any] = {"rule": rule, "scope": scope, "share": 0.5, "scale": 0.25}
    taken = chosen_blocks(scores, cut.owner, cut.sizes, **given)
    assert (taken.sum((1, 2, 3)) == 3 * grid.tokens * 4).all()
    if scope == "query":
        expected = torch.arange(8) < torch.where(cut.owner < 4, 4, 3)[:, None]
        own = torch.arange(8) == cut.owner[:, None]
        assert torch.equal(taken, (expected | own).expand_as(taken))


@rules
@scopes
def test_items_never_and_heads_not_but_with_global_decide_for_each_other(rule: Rule, scope: Scope):
    scores = random(3, 4, GRID.tokens, 12) * torch.tensor([1.0, 5, 2, 3])[:, None, None]
    found = chosen(scores, rule, scope, 0.3)
    turned = chosen(scores[[2, 0, 1]], rule, scope, 0.3)
    assert torch.equal(turned, found[[2, 0, 1]])
    alone = torch.cat([chosen(it, rule, scope, 0.3) for it in scores.split(1, 1)], 1)
    assert torch.equal(alone, found) == (scope != "global")
    if scope == "global":
        assert found.sum((2, 3)).unique().numel() > 1  # some heads take more than others


@rules
@scopes
def test_what_is_no_number_is_taken_first(rule: Rule, scope: Scope):
    scores = random(1, 2, GRID.tokens, 12)
    scores[0, 0, 7, 3] = torch.nan
    if rule == "top":
        assert chosen(scores, rule, scope, 0.3)[0, 0, 7, 3]
    scores[:] = torch.nan
    assert chosen(scores, rule, scope, 0.3).any(-1).all()


@rules
def test_torchs_default_dtype_changes_no_choice(rule: Rule):
    q, k = (random(2, 3, GRID.tokens, 16, seed=it) for it in range(2))

    def found() -> torch.Tensor:
        partition.cache_clear()
        cut = partition(GRID, PARTS)
        return chosen(block_scores(q, k, cut.owner, cut.sizes), rule, "head", 0.4)

    expected = found()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = found()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, expected)


def test_queries_that_choose_alike_stand_together():
    cut = partition(GRID, PARTS)
    found = chosen(random(2, 3, GRID.tokens, 12), "top", "query", 0.2)
    order = by_choice(found, cut.places)
    assert torch.equal(order.sort().values, torch.arange(GRID.tokens).expand_as(order))
    place = cut.places.argsort()
    for b, h in itertools.product(range(2), range(3)):
        seen: set[tuple[bool, ...]] = set()
        last = None
        for i in order[b, h].tolist():
            choice = tuple(found[b, h, i].tolist())
            if choice != last and last is not None:
                assert choice not in seen
                seen.add(last)
            last = choice
        groups = found[b, h, order[b, h]].unique_consecutive(dim=0, return_counts=True)[1].tolist()
        for group in order[b, h].split(groups):
            assert (place[group].diff() > 0).all()  # in their order


def test_more_blocks_than_fit_a_number_are_sorted_too():
    many = random(1, 2, 64, 150) > 0.5
    many[:, :, 32:] = many[:, :, :32].flip(2)
    order = by_choice(many, torch.arange(64))
    pairs = many.gather(2, order[..., None].expand_as(many)).unflatten(2, (32, 2))
    assert torch.equal(pairs[..., 0, :], pairs[..., 1, :])
