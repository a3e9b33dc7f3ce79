"""`permuted-blocks`: its definition token by token, and what holds whatever the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import PermutedBlocks, TopBlocks
from kinora.accel.methods import permuted_blocks as module
from kinora.accel.recipe import Recipe
from kinora.accel.site import Site
from kinora.accel.spans import Spans
from kinora.accel.tiles import token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile
LONG = TokenGrid(5, 16, 16)
SEGMENTS = ("256", "512", "1024", "frame", "clip")
TILES = ("64x64", "128x64", "128x128", "256x128")


def site(text: int = 0, first: bool = False, grid: TokenGrid = GRID) -> Site:
    return Site(grid, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site, smooth: bool = True) -> list[torch.Tensor]:
    """Of 2 items and 3 heads; `smooth`: neighbours are alike, as in pictures."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, at.tokens, 16)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if not smooth:
        return made
    order = token_order("gilbert", at.grid, at.text, at.text_first)
    for x in made:
        flat = order.apply(x, 2).mT.flatten(0, 1)
        wide = torch.nn.functional.avg_pool1d(flat, 65, 1, 32, count_include_pad=False)
        x.copy_(order.undo(wide.unflatten(0, shape[:2]).mT, 2) * 10)
    return made


def method_of(**options: Any) -> PermutedBlocks:
    given: dict[str, Any] = {"tile": "64x64", **options}
    return PermutedBlocks(**given)


def planned(at: Site, **options: Any) -> BlockPlan:
    q, k, _ = tensors(at)
    plan = method_of(**options).plan(q, k, at)
    assert plan is not None
    plan.check()  # both orders are permutations, and no row is empty
    return plan


def orders_and_mask(plan: BlockPlan | None) -> tuple[torch.Tensor, torch.Tensor]:
    assert plan is not None and plan.key_order is not None
    return plan.key_order, plan.mask()


def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)


def segment_of(at: Site, segment: str, order: str) -> list[tuple[int, ...]]:
    """Of each place of the order, what must not mix, in the order in which it comes."""
    found: list[tuple[int, ...]] = []
    for place, token in enumerate(token_order(order, at.grid, at.text, at.text_first).places):
        if at.is_text()[token]:
            found.append((0 if at.text_first else 2,))
        elif segment == "frame":
            frame = int(token) - at.text * at.text_first
            found.append((1, frame // (at.grid.height * at.grid.width)))
        else:
            found.append((1, 0 if segment == "clip" else place // int(segment)))
    return found


def naive(
    q: torch.Tensor, k: torch.Tensor, at: Site, method: PermutedBlocks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orders of keys and tiles that are kept, head by head and token by token."""
    tile, _ = method.tiling()
    places = token_order(method.order, at.grid, at.text, at.text_first).places
    curve = token_order("gilbert", at.grid, at.text, at.text_first).places
    picture = [token for token in curve.tolist() if not at.is_text()[token]]
    count = min(method.samples, len(picture))
    cuts = [i * len(picture) // count for i in range(count + 1)]
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judges = [
        picture[a + int(drawn[i] * (b - a))] for i, (a, b) in enumerate(itertools.pairwise(cuts))
    ]
    segments = segment_of(at, method.segment, method.order)
    hot = attention(q[:, :, judges], k).mean(2)
    rows, columns = places.split(tile.query), places.split(tile.key)
    orders = torch.empty(*q.shape[:3], dtype=torch.int64)
    mask = torch.zeros(*q.shape[:2], len(rows), len(columns), dtype=torch.bool)
    run = int(method.segment) if method.segment.isdecimal() else None
    for b, h in itertools.product(*map(range, q.shape[:2])):
        weights = hot[b, h].float().tolist()
        best = sorted(range(at.tokens), key=lambda i: (segments[i], -weights[places[i]]))
        orders[b, h] = places[best]
        means = [k[b, h, part].mean(0) for part in orders[b, h].split(tile.key)]
        for i, row in enumerate(rows):
            at_row = range(i * tile.query, i * tile.query + len(row))
            for j, part in enumerate(orders[b, h].split(tile.key)):
                at_place = range(j * tile.key, j * tile.key + len(part))
                text = bool(at.is_text()[row].any() or at.is_text()[part].any())
                own = run and {it // run for it in at_place} & {it // run for it in at_row}
                mask[b, h, i, j] = text or bool(own)
            scores = [float(q[b, h, row].mean(0) @ it) for it in means]
            kept = math.ceil(round(method.keep * len(columns), 6))
            mass = [
                math.exp(s / math.sqrt(q.shape[-1])) * len(part)
                for s, part in zip(scores, columns, strict=True)
            ]
            fit = mass if method.mass < 1 else scores
            ranked = sorted(
                range(len(columns)), key=lambda j: (not bool(mask[b, h, i, j]), -fit[j])
            )
            held = 0.0
            for j in ranked[:kept]:
                if method.mass < 1 and held >= method.mass * sum(mass):
                    break
                mask[b, h, i, j] = True
                held += mass[j]
    return orders, mask


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("budget", [{"keep": 0.3}, {"keep": 1.0, "mass": 0.5}])
@pytest.mark.parametrize(
    ("at", "order", "tile"),
    [
        (site(), "gilbert", "64x64"),
        (site(70, True), "raster", "128x64"),
        (site(7), "morton", "256x128"),
        (site(70, True, LONG), "gilbert", "64x64"),
    ],
)
def test_it_is_what_the_definition_says(
    segment: str, budget: dict[str, float], at: Site, order: str, tile: str
):
    q, k, _ = tensors(at)
    method = method_of(segment=segment, order=order, tile=tile, samples=50, **budget)
    plan = method.plan(q, k, at)
    if plan is None:  # so few tokens in such long segments
        assert method.forces_all(at)
        return
    orders, mask = naive(q, k, at, method)
    assert all(map(torch.equal, orders_and_mask(plan), (orders, mask))) and not mask.all()


@pytest.mark.parametrize("grid", [GRID, TokenGrid(4, 32, 32), TokenGrid(1, 3, 4)])
@pytest.mark.parametrize("text", [0, 5])
def test_queries_that_judge_are_of_the_picture_and_all_over_it(grid: TokenGrid, text: int):
    for first, order in itertools.product((True, False), ("raster", "gilbert")):
        at = method_of(order=order).at(site(text, first, grid))
        queries = vars(module)["_on"](torch.device("cpu"), 128, "clip", at).queries
        assert len(queries.unique()) == len(queries) == min(128, grid.tokens)
        inside = queries - (text if first else 0)
        assert inside.min() >= 0 and inside.max() < grid.tokens
        # Neither frames nor columns are met at a few of their places only.
        for step, count in ((grid.height * grid.width, grid.frames), (1, grid.width)):
            assert len((inside // step % count).unique()) > 0.6 * count


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("at", [site(grid=LONG), site(70, True, LONG), site(7, False, LONG)])
def test_all_tiles_of_permuted_keys_are_dense_attention(segment: str, at: Site):
    q, k, v = tensors(at)
    tail = "none" if at.text == 7 else "complement"
    plan = planned(at, segment=segment, tail=tail, tile="128x64")
    full = BlockPlan.dense(tile=plan.tile, queries=at.tokens, keys=at.tokens)
    everything = dataclasses.replace(plan, indices=full.indices, counts=full.counts)
    out, _ = block_attention(q, k, v, everything)
    torch.testing.assert_close(out, attention(q, k) @ v, rtol=1e-9, atol=1e-9)


def test_keep_1_is_dense_and_so_is_what_only_text_and_own_segments_fill():
    q, k, _ = tensors(site())
    for options in ({"keep": 1.0}, {"keep": 0.1, "segment": "1024"}):
        method = method_of(**options)
        assert method.plan(q, k, site()) is None and method.predict(site()) == 1
    assert "0.1 of" not in method_of(segment="1024").why_dense(site())
    assert method_of(keep=1).why_dense(site()) == "because keep 1 is all of 15 tiles"
    assert method_of(segment="clip", tile="256x128").forces_all(site(900, grid=TokenGrid(1, 8, 8)))
    # All tiles are a budget, not a wish, where a mass is asked for.
    assert method_of(keep=1, mass=0.9).predict(site()) < 1


@pytest.mark.parametrize("segment", ["256", "frame", "clip"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("order", ["raster", "morton", "gilbert"])
def test_the_prediction_is_what_is_kept(segment: str, tile: str, order: str):
    at = site(70, grid=LONG)
    options: dict[str, Any] = {"keep": 0.3, "segment": segment, "tile": tile, "order": order}
    plan = planned(at, **options)
    method = method_of(**options)
    expected = method.predict(at)
    assert expected == pytest.approx(float(plan.density().mean()), abs=0.02)
    less = method_of(**options, mass=0.3)
    assert less.predict(at) < expected and float(planned(at, **options, mass=0.3).density().mean())


@pytest.mark.parametrize("text", [1, 70, 226])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("segment", ["256", "frame", "clip"])
def test_text_attends_and_is_attended_to_everywhere(text: int, first: bool, segment: str):
    at = site(text, first, LONG)
    plan = planned(at, keep=0.05, segment=segment)
    assert plan.order is not None and plan.key_order is not None
    rows = (at.is_text()[plan.order].nonzero()[:, 0] // 64).unique()
    mask = plan.mask()
    assert mask[..., rows, :].all() and not mask.all()
    for b, h in itertools.product(range(2), range(3)):
        columns = at.is_text()[plan.key_order[b, h]].nonzero()[:, 0] // 64
        assert mask[b, h, :, columns].all()
        # Text keys stay together, so that no more tiles than needed are forced.
        assert len(columns.unique()) <= -(-text // 64) + 1


@pytest.mark.parametrize(
    "budgets",
    [
        [{"keep": keep} for keep in (0.1, 0.3, 0.6, 0.9)],
        [{"keep": 0.8, "mass": mass} for mass in (0.1, 0.4, 0.7)],
        [{"keep": keep, "mass": 0.95} for keep in (0.3, 0.5, 0.8)],
    ],
)
@pytest.mark.parametrize("segment", ["256", "clip"])
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(
    budgets: list[dict[str, float]], segment: str
):
    masks = [planned(site(), segment=segment, **it).mask() for it in budgets]
    for less, more in itertools.pairwise(masks):
        assert (less <= more).all() and not torch.equal(less, more)


@pytest.mark.parametrize("segment", ["256", "frame", "clip"])
def test_the_error_falls_as_more_is_kept(segment: str):
    at = site()
    q, k, v = tensors(at)
    weights = attention(q, k)
    dense = weights @ v
    errors: list[float] = []
    for keep in (0.35, 0.6, 0.9):
        plan = planned(at, keep=keep, segment=segment)
        out, _ = block_attention(q, k, v, plan)
        errors.append(float((out - dense).norm() / dense.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_hot_keys_that_are_scattered_are_gathered():
    """What the method is for: a few keys all over the clip that every query wants."""
    at = site(grid=TokenGrid(4, 16, 16))
    q, k, v = tensors(at, smooth=False)
    generator = torch.Generator().manual_seed(1)
    hot = torch.rand(2, 3, at.tokens, generator=generator).topk(40).indices
    direction = torch.full((16,), 2.0, dtype=torch.float64)
    q += direction
    k.scatter_add_(2, hot[..., None].expand(-1, -1, -1, 16), direction.expand(2, 3, 40, 16))
    dense = attention(q, k) @ v
    error: dict[str, float] = {}
    for method in (method_of(keep=0.25, segment="clip"), TopBlocks(keep=0.25, tile="64x64")):
        plan = method.plan(q, k, at)
        assert plan is not None
        out, _ = block_attention(q, k, v, plan)
        error[method.name] = float((out - dense).norm() / dense.norm())
        if plan.key_order is not None:
            first = plan.key_order[..., :40].sort(-1).values
            assert torch.equal(first, hot.sort(-1).values) and plan.mask()[..., 0].all()
    assert error["permuted-blocks"] < error["top-blocks"] / 4


def test_heads_and_batch_items_choose_for_themselves_and_always_the_same():
    at = site()
    q, k, _ = tensors(at)
    method = method_of(keep=0.4, segment="clip")
    whole, one = method.plan(q, k, at), method.plan(q[1:, 2:], k[1:, 2:], at)
    again = method.plan(q, k, dataclasses.replace(at, seed=5, step=7, layer=3, branch=1))
    (order, mask), (own, own_mask) = orders_and_mask(whole), orders_and_mask(one)
    assert torch.equal(order[1:, 2:], own) and torch.equal(mask[1:, 2:], own_mask)
    assert all(map(torch.equal, orders_and_mask(again), (order, mask)))


def test_what_lies_beside_the_tensors_reaches_nothing():
    at = site(7)
    q, k, v = given = tensors(at)
    whole = torch.full((3, 2, at.tokens + 30, 5, 20), torch.nan, dtype=torch.float64)
    beside = whole[:, :, 3 : at.tokens + 3, 1:4, 2:18].transpose(2, 3).copy_(torch.stack(given))
    method = method_of(segment="clip", tail="complement")
    plan, other = method.plan(q, k, at), method.plan(beside[0], beside[1], at)
    assert plan is not None and other is not None
    assert all(map(torch.equal, orders_and_mask(plan), orders_and_mask(other)))
    out, _ = block_attention(beside[0], beside[1], beside[2], other)
    torch.testing.assert_close(out, block_attention(q, k, v, plan)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chooses_as_its_values_in_float32_do(dtype: torch.dtype):
    at = site()
    q, k, _ = (x.to(dtype) for x in tensors(at))
    method = method_of(keep=0.4)
    got = orders_and_mask(method.plan(q, k, at))
    assert all(map(torch.equal, got, orders_and_mask(method.plan(q.float(), k.float(), at))))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_number_still_makes_a_plan(broken: float):
    at = site(7)
    q, k, _ = tensors(at)
    k[0, 1, 5], q[1, 0, 8] = broken, -broken
    for options in ({}, {"mass": 0.5}, {"segment": "clip", "keep": 0.5}):
        plan = method_of(**options).plan(q, k, at)
        assert plan is not None
        plan.check()


def test_torchs_default_dtype_changes_no_plan():
    at = site(7, grid=TokenGrid(5, 11, 21))  # of this test alone: orders are kept
    q, k, _ = (x.float() for x in tensors(at))
    kept: list[Callable[..., Any]] = [vars(module)["_on"], token_order, Spans.density]

    def results() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for it in kept:
            it.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
        method = method_of(keep=0.3, mass=0.9)
        predicted = torch.tensor(method.predict(at), dtype=torch.float64)
        return *orders_and_mask(method.plan(q, k, at)), predicted

    expected = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_in_a_model_with_text_that_is_masked_nothing_of_the_padding_leaks(build: Any):
    """Of a batch of two: what masked tokens of the text hold changes no bit of the picture."""
    recipe = Recipe(attention=method_of(keep=0.5, segment="clip"), when="always")
    outs: list[torch.Tensor] = []
    for value in (0.0, 1e3):
        model = build("hunyuan")
        model.latents = (2, *model.latents[1:])
        model.arguments = {key: torch.cat([it, it]) for key, it in model.arguments.items()}
        model.arguments["encoder_hidden_states"][:, 5:] = value
        with accelerate(model, recipe) as session:
            outs.append(model())
        ran = session.receipt.attention
        assert ran is not None and ran.calls and not ran.dense and ran.density < 0.8
    assert torch.equal(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"keep": 1.0, "mass": 0.6}, {"segment": "clip"}])
def test_a_gpu_chooses_the_same(options: dict[str, Any]):
    at = site(7, grid=LONG)
    q, k, v = (x.float() for x in tensors(at))
    method = method_of(**options)
    plan, expected = method.plan(q.cuda(), k.cuda(), at), method.plan(q, k, at)
    assert plan is not None
    # Sums in another order decide between keys that are alike.
    for got, wanted in zip(orders_and_mask(plan), orders_and_mask(expected), strict=True):
        assert float((got.cpu() == wanted).float().mean()) > 0.99
    out, _ = block_attention(q.cuda(), k.cuda(), v.cuda(), plan)
    torch.testing.assert_close(
        out.cpu(), block_attention(q, k, v, plan.to("cpu"))[0], rtol=1e-3, atol=1e-3
    )
