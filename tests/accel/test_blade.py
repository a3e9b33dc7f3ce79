"""`blade`: its scores against loops, what it keeps of them, and what it draws."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import Blade, blade
from kinora.accel.methods.blade import sampled, scores
from kinora.accel.site import Site
from kinora.accel.spans import At
from kinora.accel.tiles import forced, token_order
from kinora.accel.wrappers import ByLayer
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, tile_lengths

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile
DENSE = {"keep_least": 1.0, "keep": 1.0}


def site(text: int = 0, first: bool = False, grid: TokenGrid = GRID) -> Site:
    return Site(grid, layer=1, layers=4, step=2, steps=10, text=text, text_first=first, seed=5)


def tensors(at: Site, heads: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, at.tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"]


def smooth(at: Site) -> list[torch.Tensor]:
    """Neighbours alike, as in pictures."""
    order = token_order("gilbert", at.grid, at.text, at.text_first)
    found: list[torch.Tensor] = []
    for x in tensors(at):
        mean = torch.nn.functional.avg_pool1d(order.apply(x, 2).mT.flatten(0, 1), 65, 1, 32)
        found.append(order.undo(mean.unflatten(0, x.shape[:2]).mT, 2) * 8)
    return found


def planned(method: Blade, at: Site, q: torch.Tensor, k: torch.Tensor) -> BlockPlan:
    plan = method.plan(q, k, at)
    assert plan is not None
    plan.check()
    return plan


def scored(method: Blade, at: Site, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return scores(q, k, at, method.layout(at, q.device), method.samples).softmax(-1)


def by_loops(queries: list[torch.Tensor], keys: list[torch.Tensor]) -> torch.Tensor:
    """The scores of one head, from the tokens of each tile, `[samples, D]` each."""
    found = torch.zeros(len(queries), len(keys), dtype=torch.float64)
    for i, rows in enumerate(queries):
        for row in rows:
            logits = [max(float(row @ key) / math.sqrt(len(row)) for key in tile) for tile in keys]
            for j, logit in enumerate(logits):
                found[i, j] = max(float(found[i, j]), math.exp(logit - max(logits)))
        found[i] /= found[i].sum()
    return found


def test_the_scores_are_those_of_the_sampled_tokens():
    at, method = site(text=9, grid=TokenGrid(3, 5, 9)), Blade(samples=5, tile="64x64")
    q, k, _ = tensors(at)
    layout, seed = method.layout(at, q.device), blade.seed_of(at)
    queries, keys = (sampled(x, layout.places, 64, 5, seed + i) for i, x in enumerate((q, k)))
    found = scored(method, at, q, k)
    for b, h in itertools.product(range(2), range(3)):
        torch.testing.assert_close(found[b, h], by_loops([*queries[b, h]], [*keys[b, h]]))


@pytest.mark.parametrize("order", ["raster", "gilbert"])
@pytest.mark.parametrize("samples", [128, 256])
def test_with_all_tokens_drawn_it_is_the_largest_of_each_tile(samples: int, order: str):
    at = site(text=5, first=True, grid=TokenGrid(2, 7, 13))
    method = Blade(samples=samples, tile="128x64", order=order)  # pyright: ignore[reportArgumentType]
    q, k, _ = tensors(at)
    places = token_order(order, at.grid, 5, True).places
    queries, keys = q[1, 2, places].split(128), k[1, 2, places].split(64)
    torch.testing.assert_close(scored(method, at, q, k)[1, 2], by_loops([*queries], [*keys]))


@pytest.mark.parametrize("samples", [1, 7, 64])
def test_places_are_the_same_in_all_tiles_of_a_head_and_valid_in_the_last(samples: int):
    tokens, size = 300, 64  # the last tile has 44
    ids = torch.arange(tokens, dtype=torch.float64)[:, None].expand(2, 3, -1, 1)
    found = sampled(ids, torch.arange(tokens), size, samples, 3)[..., 0].long()
    assert found.shape == (2, 3, 5, samples)
    assert torch.equal(
        found[:, :, :4] - torch.arange(4)[:, None] * 64 - found[:, :, :1], 0 * found[:, :, :4]
    )
    for tile, length in enumerate(tile_lengths(tokens, size).tolist()):
        places = found[:, :, tile] - 64 * tile
        assert ((places >= 0) & (places < length)).all()
        for place in places.flatten(0, 1):
            assert tile == 4 or len(place.unique()) == samples
            assert samples < 64 or len(place.unique()) == length
    if samples == 7:
        assert len({tuple(it) for it in found[:, :, 0].flatten(0, 1).sort().values.tolist()}) == 6


def test_the_tokens_of_a_tile_may_change_places_where_all_are_drawn():
    at, method = site(text=9), Blade(samples=256, tile="128x64", tail="none")
    q, k, _ = tensors(at)
    plan = planned(method, at, q, k)
    assert plan.order is not None
    for x, size in ((q, 128), (k, 64)):
        parts = [it[torch.randperm(len(it), generator=torch.Generator().manual_seed(0))]
                 for it in plan.order.split(size)]  # fmt: skip
        x[:, :, plan.order] = x[:, :, torch.cat(parts)]
    assert torch.equal(planned(method, at, q, k).mask(), plan.mask())


def test_the_same_site_draws_the_same_and_other_ones_do_not():
    at, method = site(), Blade(samples=4, tile="64x64")
    q, k, _ = tensors(at)
    expected = planned(method, at, q, k).mask()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for same in (at, dataclasses.replace(at, branch=1, steps=50)):
        assert torch.equal(planned(method, same, q, k).mask(), expected)
    assert torch.equal(torch.get_rng_state(), state)
    others = [{"layer": 2}, {"step": 3}, {"seed": 6}, {"layer": 2, "step": 1}, {"seed": -5}]
    found = [planned(method, dataclasses.replace(at, **it), q, k).mask() for it in others]
    for one, other in itertools.combinations([expected, *found], 2):
        assert not torch.equal(one, other)


def test_queries_and_keys_heads_and_items_draw_for_themselves():
    at, method = site(), Blade(samples=8, tile="64x64")
    q, _, _ = tensors(at)
    same = q[:1, :1].expand_as(q)
    found = scored(method, at, same, same).flatten(0, 1)
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)
    # Were the same tokens drawn as queries and as keys, each would find itself in its own tile.
    assert (found.diagonal(dim1=1, dim2=2) < found.amax(-1)).any()


def test_heads_and_batch_items_choose_for_themselves():
    at, method = site(), Blade(samples=256, tile="64x64")
    q, k, _ = tensors(at)
    whole, one = planned(method, at, q, k), planned(method, at, q[1:, 2:], k[1:, 2:])
    assert torch.equal(whole.mask()[1:, 2:], one.mask())
    assert not torch.equal(whole.mask()[0], whole.mask()[1])
    assert not torch.equal(whole.mask()[:, 0], whole.mask()[:, 1])


@pytest.mark.parametrize("least_of_keep", [0, 0.6])
@pytest.mark.parametrize("keep", [0.05, 0.5, 1])
@pytest.mark.parametrize("mass", [0.01, 0.6, 0.95])
@pytest.mark.parametrize("text", [0, 70])
def test_a_row_keeps_the_fewest_best_tiles_that_reach_the_mass(
    least_of_keep: float, keep: float, mass: float, text: int
):
    at, keep_least = site(text), least_of_keep * keep
    method = Blade(mass=mass, keep_least=keep_least, keep=keep, tile="64x64")
    q, k, _ = tensors(at)
    q *= 2
    plan, found = planned(method, at, q, k), scored(method, at, q, k)
    always = forced(At(plan.tile, "gilbert", at.grid, text))
    most = max(1, math.floor(keep * plan.columns + 1e-9))
    least = max(1, math.floor(keep_least * plan.columns + 1e-9))
    mask = plan.mask()
    for b, h, row in itertools.product(range(2), range(3), range(plan.rows)):
        score = found[b, h, row].tolist()
        ranked = sorted(range(plan.columns), key=lambda j: (not always[row, j], -score[j], j))
        kept, total = 0, 0.0
        while total < mass * sum(score) - 1e-12:
            total += score[ranked[kept]]
            kept += 1
        kept = max(least, min(most, kept))
        expected = {*ranked[:kept], *always[row].nonzero()[:, 0].tolist()}
        assert set(mask[b, h, row].nonzero()[:, 0].tolist()) == expected
        if keep == 1 and kept > max(least, len(always[row].nonzero())):
            # One tile less, as in the authors' code, falls short.
            assert sum(score[j] for j in ranked[:kept]) >= mass - 1e-12
            assert sum(score[j] for j in ranked[: kept - 1]) < mass


@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "256x128"])
@pytest.mark.parametrize("order", ["raster", "morton", "gilbert"])
def test_text_and_the_tile_itself_are_kept_at_any_budget(tile: str, order: str):
    for text, first in ((0, False), (1, True), (70, False), (226, True)):
        at = site(text, first)
        method = Blade(mass=1e-6, keep_least=0, keep=1e-6, tile=tile, order=order)  # pyright: ignore[reportArgumentType]
        q, k, _ = tensors(at)
        plan = planned(method, at, q, k)
        assert plan.order is not None and (plan.counts >= 1).all()
        token = torch.arange(at.tokens)
        row, column = token // plan.tile.query, token // plan.tile.key
        is_text, mask = at.is_text()[plan.order], plan.mask()
        assert mask[..., row, column].all() and not mask.all()
        assert mask[..., row[is_text], :].all() and mask[..., column[is_text]].all()
        # Nothing beside these.
        assert torch.equal(mask, forced(At(plan.tile, order, at.grid, text, first)).expand_as(mask))


def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps():
    at = site(text=7)
    q, k, _ = tensors(at)
    by_mass = [{"mass": it, "keep": 1} for it in (0.05, 0.3, 0.7, 1)]
    by_most = [{"keep": it, "keep_least": 0.01} for it in (0.01, 0.2, 0.5)]
    by_least = [{"keep_least": it, "keep": 1, "mass": 0.2} for it in (0, 0.3, 0.6, 1)]
    for budgets in (by_mass, by_most, by_least):
        methods = [Blade(tile="64x64", **it) for it in budgets]  # pyright: ignore[reportArgumentType]
        masks = [it.sparse(q, k, at).mask() for it in methods]
        for less, more in itertools.pairwise(masks):
            assert (less <= more).all() and not torch.equal(less, more)


@pytest.mark.parametrize("options", [DENSE, {"mass": 1.0, "keep": 1.0}])
@pytest.mark.parametrize("tail", ["none", "complement"])
def test_to_keep_everything_is_dense(options: dict[str, float], tail: str):
    at = site(text=9)
    q, k, v = tensors(at)
    method = Blade(tile="64x64", tail=tail, **options)  # pyright: ignore[reportArgumentType]
    assert method.plan(q, k, at) is None and method.predict(at) == 1
    assert method.why_dense(at) == "because all of 15 tiles are kept"
    # As it would be executed.
    whole = method.sparse(q, k, at)
    assert whole.mask().all()
    out, _ = block_attention(q, k, v, whole)
    torch.testing.assert_close(out, torch.softmax(q @ k.mT / 4, -1) @ v)


@pytest.mark.parametrize("by", ["mass", "keep"])
def test_the_error_falls_as_more_is_kept_and_the_means_of_the_rest_help(by: str):
    at = site()
    q, k, v = smooth(at)
    dense = torch.softmax(q @ k.mT / 4, -1) @ v
    base = {"mass": 1.0} if by == "keep" else {"keep": 1.0}

    def error(budget: float, tail: str) -> float:
        method = Blade(tile="64x64", tail=tail, **{**base, by: budget})  # pyright: ignore[reportArgumentType]
        out, _ = block_attention(q, k, v, planned(method, at, q, k))
        return float((out - dense).norm() / dense.norm())

    budgets = (0.1, 0.4, 0.6, 0.9)
    plain = [error(budget, "none") for budget in budgets]
    pooled = [error(budget, "complement") for budget in budgets]
    assert plain == sorted(plain, reverse=True) and pooled == sorted(pooled, reverse=True)
    assert all(a < b for a, b in zip(pooled, plain, strict=True))


def test_where_keys_are_alike_in_each_tile_the_tail_is_exact():
    at, method = site(text=9), Blade(keep=0.1, tile="64x64")
    q, k, v = tensors(at)
    places = method.layout(at, q.device).places
    for part in places.split(64):
        k[:, :, part] = k[:, :, part[:1]]
    plan = planned(method, at, q, k)
    assert plan.tail == "complement" and float(plan.density().max()) < 0.5
    out, _ = block_attention(q, k, v, plan)
    torch.testing.assert_close(out, torch.softmax(q @ k.mT / 4, -1) @ v)


def test_the_tiles_that_matter_are_found():
    at, method = site(), Blade(tile="64x64")
    q, k, _ = tensors(at)
    places = method.layout(at, q.device).places[7 * 64 : 8 * 64]
    k[:, :, places] += 4
    q += 4
    mask = planned(method, at, q, k).mask()
    assert mask[..., 7].all()
    # Nothing else weighs anything: the mass is reached at once.
    assert (mask.sum(-1) <= 2).all()


@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "256x128"])
@pytest.mark.parametrize("text", [0, 70])
def test_the_prediction_is_what_is_kept_of_even_scores(tile: str, text: int):
    at = site(text, grid=TokenGrid(9, 16, 16))
    q, k, _ = tensors(at)
    for options in ({"keep": 0.2}, {"keep": 1.0}, {"keep": 1.0, "mass": 0.5}):
        method = Blade(tile=tile, **options)  # pyright: ignore[reportArgumentType]
        executed = float(planned(method, at, q, k).density().mean())
        assert method.predict(at) < 1
        assert executed <= method.predict(at) + 0.002  # few tiles: one is taken to be left out
        if options == {"keep": 0.2}:  # it holds always, and this grid has no ragged tiles
            assert executed == pytest.approx(method.predict(at), abs=1e-6 if not text else 0.01)
        peaked = float(planned(method, at, q * 8, k).density().mean())
        assert peaked <= executed + 1e-6


def test_equal_scores_keep_the_tile_itself_and_the_first_ones():
    at = site(grid=TokenGrid(4, 16, 16))  # 16 tiles: eight of them hold exactly half
    q = torch.zeros(1, 1, at.tokens, 8)
    plan = planned(Blade(mass=0.5, keep=1, tile="64x64"), at, q, q)
    for row, kept in enumerate(plan.mask()[0, 0]):
        assert kept.nonzero()[:, 0].tolist() == ([*range(8)] if row < 8 else [*range(7), row])


def test_the_bounds_are_rounded_down_but_at_least_one_tile():
    at = site()  # 15 tiles
    q, k, _ = tensors(at)
    for keep_least, keep, kept in ((0.2, 0.2, 3), (0.26, 0.26, 3), (0, 1e-3, 1)):
        method = Blade(keep_least=keep_least, keep=keep, tile="64x64")
        assert (planned(method, at, q, k).counts == kept).all()


def test_the_fewest_tiles_are_no_more_than_the_most():
    with pytest.raises(ValidationError, match=r"keep_least 0\.3 must not be above attention.keep"):
        Blade(keep_least=0.3, keep=0.2)
    with pytest.raises(ValidationError, match="keep_least"):
        ByLayer(method=Blade(), by_layer="keep 0.2 0.01")
    assert Blade(keep_least=0.2, keep=0.2).keep_least == 0.2


def test_scores_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch):
    at, method = site(text=3), Blade(tile="128x64")
    q, k, _ = tensors(at)
    expected = scored(method, at, q, k)
    for chunk in (1, 2 * 4 * len(q) * 8 * 16 * 15):
        monkeypatch.setattr("kinora.kernels.scores.JOINED_BYTES", chunk)
        torch.testing.assert_close(scored(method, at, q, k), expected)


@pytest.mark.parametrize("grid", [TokenGrid(1, 9, 15), TokenGrid(1, 1, 1), TokenGrid(3, 1, 70)])
@pytest.mark.parametrize("tile", ["64x64", "256x128"])
def test_any_grid(grid: TokenGrid, tile: str):
    for text in (0, 3):
        at = site(text, grid=grid)
        q, k, v = tensors(at)
        method = Blade(samples=64, tile=tile)  # pyright: ignore[reportArgumentType]
        plan = method.plan(q, k, at)
        assert (plan is None) == (method.predict(at) == 1)
        if plan is not None:
            plan.check()
            assert block_attention(q, k, v, plan)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_runs_in_any_precision(dtype: torch.dtype):
    at = site(text=5)
    q, k, v = tensors(at, dtype=dtype)
    plan = planned(Blade(tile="64x64"), at, q, k)
    assert block_attention(q, k, v, plan)[0].dtype == dtype
    # Scores are computed in float32 at the least.
    assert torch.equal(planned(Blade(tile="64x64"), at, q.double(), k.double()).counts, plan.counts)


def test_what_is_not_finite_still_makes_a_plan():
    at = site()
    q, k, _ = tensors(at)
    q[0, 0, 3], k[1, 1, 5], q[0, 1, 4] = torch.nan, torch.nan, torch.inf
    plan = planned(Blade(samples=256, tile="64x64"), at, q, k)
    assert (plan.counts >= 1).all()


def test_a_plan_made_again_for_the_backward_pass_is_the_same_draw():
    at, method = site(text=5), Blade(samples=4, tail="none", tile="64x64", keep=0.4)
    made: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        plan = planned(method, at, q, k)
        made.append(plan.mask())
        return block_attention(q, k, v, plan)[0]

    def gradients(*, again: bool) -> tuple[torch.Tensor, ...]:
        given = [x.requires_grad_() for x in tensors(at)]
        # Nothing but the site's seed may decide: the generator's state is not put back.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        out = checkpoint(attend, *given, **options) if again else attend(*given)
        torch.rand(3)
        return torch.autograd.grad((out * tensors(at)[0]).sum(), given)

    expected = gradients(again=False)
    found = gradients(again=True)
    assert len(made) == 3 and all(torch.equal(it, made[0]) for it in made)
    assert not made[0].all()
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0 and torch.equal(one, other)
    # Another draw would have been another plan.
    at = dataclasses.replace(at, seed=6)
    assert not torch.equal(planned(method, at, *tensors(at)[:2]).mask(), made[0])
