"""What a plan keeps and misses, and the lens that takes one call out of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.errors import AccelerationError
from kinora.accel.grid import TokenGrid
from kinora.accel.inspection import Caught, Lens, View, tile_mass
from kinora.accel.methods import Hierarchical, TopBlocks
from kinora.accel.order import AXES, axes
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site
from kinora.accel.wrappers import Within
from kinora.kernels.plan import BlockPlan, Tile

GRID = TokenGrid(3, 4, 5)
HEADS, TEXT, TILE = 3, 7, Tile(8, 6)
TOKENS = GRID.tokens + TEXT

Build = Callable[[str], Any]


def view(*, text_first: bool = False, by_head: bool = True, seed: int = 0) -> View:
    """A call with text and a random plan, whose heads have orders of their own or one for all."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(1, HEADS, TOKENS, 8, generator=rng) for _ in range(2))
    orders = [axes(GRID, it).beside_text(TEXT, first=text_first).places for it in AXES[1:4]]
    mask = torch.rand(1, HEADS, -(-TOKENS // 8), -(-TOKENS // 6), generator=rng) < 0.4
    mask[..., 0] = True
    plan = BlockPlan.from_mask(
        mask,
        tile=TILE,
        queries=TOKENS,
        keys=TOKENS,
        order=torch.stack(orders)[None] if by_head else orders[0],
    )
    site = Site(GRID, layer=0, layers=1, step=0, steps=1, text=TEXT, text_first=text_first)
    return View(site, q, k, plan)


def slowly(it: View) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention and whether it is kept, of each pair of tokens, `[H, L, L]`."""
    weights = (it.q[0] @ it.k[0].mT * 8**-0.5).softmax(-1)
    kept = torch.zeros_like(weights, dtype=torch.bool)
    mask, order = it.plan.mask()[0], it.plan.order
    assert order is not None
    for head in range(HEADS):
        own = order[0, head] if order.ndim == 3 else order
        for i, query in enumerate(own.tolist()):
            for j, key in enumerate(own.tolist()):
                kept[head, query, key] = mask[head, i // TILE.query, j // TILE.key]
    return weights, kept


@pytest.mark.parametrize("by_head", [False, True])
def test_shares_are_of_tokens_where_a_plan_masks_them(by_head: bool):
    it = view(by_head=by_head)
    shape = (*it.plan.indices.shape, TILE.query, 1)
    words = torch.randint(1, 2**TILE.key, shape, generator=torch.Generator().manual_seed(3))
    plan = dataclasses.replace(it.plan, within=words.to(torch.int32))
    it = dataclasses.replace(it, plan=plan)
    weights = (it.q[0] @ it.k[0].mT * 8**-0.5).softmax(-1)
    queries, keys = it.places
    kept = torch.stack(
        [
            mask[query][:, key]
            for mask, query, key in zip(plan.token_mask()[0], queries, keys, strict=True)
        ]
    )
    torch.testing.assert_close(it.density, kept.float().mean((1, 2)))
    torch.testing.assert_close(it.recall, (weights * kept).sum(-1).mean(-1))
    assert (it.recall < (it.mass * it.mask).sum(-1).mean(-1)).all()
    for token in (0, 30, TOKENS - 1):
        assert torch.equal(it.row(token)[1], kept[:, token])
    # The best tiles with as many pairs are fewer than those that are kept in part.
    best = dataclasses.replace(it, plan=dataclasses.replace(plan, within=None)).recall_at_best
    assert (it.recall_at_best < best).all()


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("text_first", [False, True])
def test_shares_are_those_of_all_pairs(by_head: bool, text_first: bool):
    it = view(by_head=by_head, text_first=text_first)
    weights, kept = slowly(it)
    torch.testing.assert_close(it.density, kept.float().mean((1, 2)))
    torch.testing.assert_close(it.recall, (weights * kept).sum(-1).mean(-1))
    for token in (0, 30, TOKENS - 1):
        row, seen = it.row(token)
        torch.testing.assert_close(row, weights[:, token])
        assert torch.equal(seen, kept[:, token])


def test_mass_is_a_share_of_each_row_and_no_plan_of_as_many_tiles_holds_more_than_the_best():
    for seed in range(5):
        it = view(seed=seed)
        mass = tile_mass(it.q, it.k, it.plan)
        torch.testing.assert_close(mass.sum(-1), torch.ones(1, HEADS, it.plan.rows))
        assert (it.recall_at_best >= it.recall - 1e-6).all()
    it = view()
    everything = BlockPlan.dense(tile=TILE, queries=TOKENS, keys=TOKENS)
    whole = View(it.site, it.q, it.k, everything)
    torch.testing.assert_close(whole.recall, torch.ones(HEADS))
    torch.testing.assert_close(whole.recall_at_best, torch.ones(HEADS))


@pytest.mark.parametrize("text_first", [False, True])
def test_tokens_are_found_by_their_place(text_first: bool):
    it = view(text_first=text_first)
    numbers = torch.arange(TOKENS)
    picture, text = it.picture(numbers), it.text(numbers)
    assert picture.shape == (3, 4, 5) and len(text) == TEXT
    assert picture[2, 1, 3] == it.token(2, 1, 3)
    assert torch.equal(torch.cat([picture.flatten(), text]).sort().values, numbers)
    assert it.site.is_text()[text].all()


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux"])
def test_a_lens_catches_the_call_that_was_asked_for(build: Build, family: str):
    model, method = build(family), TopBlocks(tile="64x64", keep=0.3)
    stock = model(steps=2)
    with (
        pytest.raises(Caught) as caught,
        accelerate(model.pipe, Recipe(attention=Lens(method, layer=0, step=1), when="always")),
    ):
        model(steps=2)
    it = caught.value.view
    assert (it.site.layer, it.site.step, it.q.shape[0]) == (0, 1, 1)
    assert (it.site.text > 0) == (family != "wan") and it.q.shape[2] == it.site.tokens
    again = method.plan(it.q, it.k, it.site)
    assert again is not None and torch.equal(again.mask(), it.plan.mask())
    assert torch.equal(model(steps=2), stock)


def test_of_a_batch_the_lens_takes_the_last_item_which_is_the_prompts(build: Build):
    model, seen = build("cogvideox"), list[torch.Tensor]()

    class Spy(TopBlocks):
        def plan(self, q: torch.Tensor, k: torch.Tensor, site: Site) -> BlockPlan | None:
            seen.append(q)
            return super().plan(q, k, site)

    lens = Lens(Spy(tile="64x64", keep=0.3), layer=0, step=0)
    with (
        pytest.raises(Caught) as caught,
        accelerate(model.pipe, Recipe(attention=lens, when="always")),
    ):
        model(steps=1)
    assert seen[-1].shape[0] == 2
    assert torch.equal(caught.value.view.q, seen[-1][1:])
    assert not torch.equal(caught.value.view.q, seen[-1][:1])


def test_of_items_attended_to_one_by_one_the_lens_takes_the_last_too(build: Build):
    """As Mochi does, with guidance in the batch and the prompt behind the unconditional item."""
    model = build("mochi")  # the first item has 8 tokens of text, the last 5
    lens = Lens(TopBlocks(tile="64x64", keep=0.3), layer=1, step=1)
    with (
        pytest.raises(Caught) as caught,
        accelerate(model, Recipe(attention=lens, when="always")),
    ):
        model(steps=2)
    site = caught.value.view.site
    assert (site.layer, site.step, site.item, site.items, site.text) == (1, 1, 1, 2, 5)


@pytest.mark.parametrize(
    ("method", "layer", "step", "told"),
    [
        (TopBlocks(tile="64x64"), 2, 0, "there is no layer 2: this run has 0 to 1"),
        (TopBlocks(tile="64x64"), 0, 3, "there is no step 3: this run has 0 to 2"),
        (
            Within(method=TopBlocks(tile="64x64"), from_step=0.5),
            1,
            0,
            "layer 1 at step 0 runs dense in the first 50% of the steps; "
            "the nearest sparse one is layer 1 at step 2",
        ),
        (
            TopBlocks(keep=1),
            0,
            0,
            "runs dense because keep 1 is all of 12 tiles; nowhere in this run",
        ),
        (
            Hierarchical(blocks=32),
            0,
            0,
            "dense because blocks 32 is all of 12 tiles; nowhere",
        ),
    ],
)
def test_a_call_that_is_not_there_or_dense_is_told_at_once(
    build: Build, method: Any, layer: int, step: int, told: str
):
    model, steps = build("wan"), list[int]()
    recipe = Recipe(attention=Lens(method, layer=layer, step=step), when="always")
    with pytest.raises(AccelerationError) as caught, accelerate(model.pipe, recipe):
        model(steps=3, callback=steps.append)
    assert told in str(caught.value) and not steps
