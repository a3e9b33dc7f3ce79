"""`threshold-blocks`: its rules as their definitions read, and what holds whatever the numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.methods import ThresholdBlocks
from kinora.accel.methods.threshold_blocks import similarity
from kinora.accel.site import Site
from kinora.accel.tiles import forced, token_order
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan
from kinora.kernels.ranking import by_mass

GRID = TokenGrid(5, 9, 20)  # 900 tokens: ragged with every tile
TILES = ("64x64", "128x64", "128x128", "256x128")
BUDGETS: list[dict[str, Any]] = [
    {"rule": "sigma", "beta": 1.0},
    {"rule": "sigma", "beta": -0.3},
    {"rule": "top", "keep": 0.2, "mass": 0.0},
    {"rule": "top", "keep": 0.0, "mass": 0.6},
    {"rule": "top", "keep": 0.3, "mass": 0.4},
]


def site(text: int = 0, first: bool = False) -> Site:
    return Site(GRID, layer=1, layers=4, step=2, steps=10, text=text, text_first=first)


def tensors(at: Site, seed: int = 0, smooth: bool = True) -> list[torch.Tensor]:
    """Of 2 items and 3 heads; `smooth`: neighbours are alike, as in pictures."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, at.tokens, 16)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if not smooth:
        return made
    order = token_order("gilbert", GRID, at.text, at.text_first)
    for x in made:
        flat = order.apply(x, 2).mT.flatten(0, 1)
        wide = torch.nn.functional.avg_pool1d(flat, 65, 1, 32, count_include_pad=False)
        x.copy_(order.undo(wide.unflatten(0, shape[:2]).mT, 2) * 10)
    return made


def planned(at: Site, seed: int = 0, smooth: bool = True, **options: Any) -> BlockPlan:
    q, k, _ = tensors(at, seed, smooth)
    plan = ThresholdBlocks(**options).plan(q, k, at)
    assert plan is not None
    plan.check()  # no row is empty
    return plan


def always(method: ThresholdBlocks, at: Site) -> torch.Tensor:
    return forced(method.at(at))


def naive(q: torch.Tensor, k: torch.Tensor, at: Site, method: ThresholdBlocks) -> torch.Tensor:
    """Row by row in float64, as the papers say it."""
    tile, kept = method.tiling()[0], always(method, at)
    places = token_order(method.order, at.grid, at.text, at.text_first).places
    rows, columns = places.split(tile.query), places.split(tile.key)
    k = k - k.mean(2, keepdim=True)

    def alike(tokens: torch.Tensor) -> float:
        unit = tokens / tokens.norm(dim=-1, keepdim=True)
        return float((unit @ unit.T).mean())

    mask = kept.expand(*q.shape[:2], *kept.shape).clone()
    for b, h, i in itertools.product(*map(range, mask.shape[:3])):
        own = q[b, h, rows[i]]
        scores = [float(own.mean(0) @ k[b, h, it].mean(0)) for it in columns]
        n = len(scores)
        if method.rule == "sigma":
            mean = sum(scores) / n
            deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / n)
            chosen = {j for j in range(n) if scores[j] > mean + method.beta * deviation}
        else:
            weights = [
                math.exp(s / math.sqrt(q.shape[-1])) * len(it)
                for s, it in zip(scores, columns, strict=True)
            ]
            # What is kept anyway comes first, then the heaviest.
            best = sorted(range(n), key=lambda j: (not bool(kept[i, j]), -weights[j]))
            chosen, held = set(best[: math.ceil(round(method.keep * n, 6))]), 0.0
            for j in best:
                if held >= method.mass * sum(weights):
                    break
                chosen.add(j)
                held += weights[j]
        if method.similar > 0:
            if alike(own) < method.similar:
                chosen = set(range(n))
            chosen |= {j for j in range(n) if alike(k[b, h, columns[j]]) < method.similar}
        mask[b, h, i, list(chosen)] = True
    return mask


@pytest.mark.parametrize("options", BUDGETS)
@pytest.mark.parametrize(
    ("at", "order", "tile", "similar"),
    [
        (site(), "gilbert", "64x64", 0.0),
        (site(70, True), "raster", "128x64", 0.04),
        (site(7), "morton", "256x128", 0.1),
    ],
)
def test_it_is_what_the_definition_says(
    options: dict[str, Any], at: Site, order: str, tile: str, similar: float
):
    q, k, _ = tensors(at)
    k = k + 2
    method = ThresholdBlocks(**options, order=order, tile=tile, similar=similar)  # pyright: ignore[reportArgumentType]
    plan = method.plan(q, k, at)
    assert plan is not None and 0 < float(plan.density().mean()) < 1
    assert torch.equal(plan.mask(), naive(q, k, at, method))


def test_similarity_is_the_mean_cosine_of_all_pairs():
    q, _, _ = tensors(site())
    order = torch.randperm(900, generator=torch.Generator().manual_seed(1))
    found = similarity(q, 64, order)
    tokens = torch.nn.functional.normalize(q[:, :, order], dim=-1)
    expected = [(it @ it.mT).mean((-2, -1)) for it in tokens.split(64, 2)]
    torch.testing.assert_close(found, torch.stack(expected, -1).float())
    assert found.shape[-1] == 15 and (found >= 0).all() and (found <= 1).all()
    shift = q.mean(2, keepdim=True).float()
    torch.testing.assert_close(similarity(q, 64, order, shift), similarity(q - shift, 64, order))


def test_similarity_of_equal_opposed_and_random_tokens():
    order, generator = torch.arange(128), torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 128, 32, generator=generator)
    assert similarity(x[:, :, :1].expand_as(x), 64, order) == pytest.approx(1.0)
    opposed = torch.cat([x[:, :, :64], -x[:, :, :64]], 2)
    assert similarity(opposed, 128, order) == pytest.approx(0, abs=1e-6)
    assert similarity(x, 128, order) == pytest.approx(1 / 128, abs=0.01)
    assert similarity(x[:, :, :100], 64, order[:100]).isfinite().all()
    assert (similarity(torch.zeros_like(x), 64, order) == 0).all()


@pytest.mark.parametrize(
    "steps",
    [
        [{"beta": beta} for beta in (2, 1, 0, -1)],
        [{"rule": "top", "mass": 0, "keep": keep} for keep in (0.1, 0.3, 0.6, 0.9)],
        [{"rule": "top", "keep": 0, "mass": mass} for mass in (0.1, 0.4, 0.7, 0.95)],
        [{"rule": "top", "keep": keep, "mass": mass} for keep, mass in ((0, 0.3), (0.4, 0.5))],
        [{"beta": 1.5, "similar": similar} for similar in (0, 0.5, 0.6, 1)],
        [{"rule": "top", "similar": similar} for similar in (0, 0.5, 0.6, 1)],
    ],
)
@pytest.mark.parametrize("text", [0, 70])
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps(steps: list[dict[str, Any]], text: int):
    masks = [planned(site(text), tile="64x64", **options).mask() for options in steps]
    for less, more in itertools.pairwise(masks):
        assert (less <= more).all() and not torch.equal(less, more)


@pytest.mark.parametrize(
    "options", [{"beta": -4}, {"rule": "top", "keep": 1}, {"rule": "top", "mass": 1}]
)
def test_the_largest_budgets_are_dense(options: dict[str, Any]):
    at, method = site(), ThresholdBlocks(tile="64x64", **options)
    q, k, v = tensors(at)
    assert method.plan(q, k, at) is None and method.predict(at) == 1
    assert method.why_dense(at).startswith("because ")
    mask = method.choose(q, k, at, method.layout(at, q.device))
    if options != {"rule": "top", "mass": 1}:  # what weighs nothing is not needed for any mass
        assert mask.all()
    everything = planned(at, tile="64x64", similar=1)
    assert (everything.density() == 1).all()
    dense = torch.softmax(q @ k.mT / 4, -1) @ v
    torch.testing.assert_close(block_attention(q, k, v, everything)[0], dense)


@pytest.mark.parametrize("options", [{"beta": 4}, {"rule": "top", "keep": 0, "mass": 0}])
@pytest.mark.parametrize(("text", "first"), [(0, False), (1, True), (70, True), (226, False)])
@pytest.mark.parametrize("tile", TILES)
def test_the_smallest_budgets_keep_what_is_always_kept(
    options: dict[str, Any], text: int, first: bool, tile: str
):
    at, method = site(text, first), ThresholdBlocks(**options, tile=tile)  # pyright: ignore[reportArgumentType]
    plan = planned(at, **options, tile=tile)
    kept = always(method, at)
    assert torch.equal(plan.mask(), kept.expand_as(plan.mask()))
    assert method.predict(at) == pytest.approx(float(plan.density().mean()), abs=1e-3)
    for budget in BUDGETS:
        assert (kept <= planned(at, tile=tile, **budget).mask()).all()


@pytest.mark.parametrize("options", BUDGETS)
def test_the_order_of_tokens_within_a_tile_changes_no_plan(options: dict[str, Any]):
    at = site()
    method = ThresholdBlocks(tile="64x64", order="raster", similar=0.03, **options)
    q, k, _ = tensors(at)
    generator = torch.Generator().manual_seed(2)
    tiles = torch.arange(900).split(64)
    within = torch.cat([it[torch.randperm(len(it), generator=generator)] for it in tiles])
    expected, found = method.plan(q, k, at), method.plan(q[:, :, within], k[:, :, within], at)
    assert expected is not None and found is not None
    assert torch.equal(found.mask(), expected.mask())


@pytest.mark.parametrize("similar", [0.0, 0.03])
@pytest.mark.parametrize("options", BUDGETS)
def test_what_is_added_to_all_keys_changes_no_plan(options: dict[str, Any], similar: float):
    at = site(7)
    method = ThresholdBlocks(tile="64x64", similar=similar, **options)
    q, k, _ = tensors(at)
    offset = torch.randn(2, 3, 1, 16, generator=torch.Generator().manual_seed(4)).double()
    expected, found = method.plan(q, k, at), method.plan(q, k + offset, at)
    assert expected is not None and found is not None
    assert torch.equal(found.mask(), expected.mask())


@pytest.mark.parametrize("options", BUDGETS)
def test_the_room_of_its_lists_is_foretold(options: dict[str, Any]):
    plan = planned(site(), tile="64x64", **options)
    longest = ThresholdBlocks(tile="64x64", **options).longest(float(plan.density().mean()), 0)
    assert plan.indices.shape[-1] == longest * plan.columns


@pytest.mark.parametrize("tail", ["none", "complement"])
@pytest.mark.parametrize("smooth", [True, False])
def test_the_error_falls_as_more_is_kept(tail: str, smooth: bool):
    at = site(7)
    q, k, v = tensors(at, smooth=smooth)
    weights = torch.softmax(q @ k.mT / 4, -1)
    steps = [{"beta": beta} for beta in (2, 1, 0, -1)]
    steps += [{"rule": "top", "keep": 0.05, "mass": mass} for mass in (0.2, 0.5, 0.8, 0.95)]
    errors: list[float] = []
    for options in steps:
        plan = ThresholdBlocks(tile="64x64", tail=tail, **options).plan(q, k, at)  # pyright: ignore[reportArgumentType]
        assert plan is not None
        errors.append(float((block_attention(q, k, v, plan)[0] - weights @ v).norm()))
    for part in (errors[:4], errors[4:]):
        assert part == sorted(part, reverse=True)


def test_the_kept_tiles_hold_the_mass_and_none_is_too_many():
    generator = torch.Generator().manual_seed(0)
    # Powers of two and a mass of a few bits: every sum is exact.
    powers = -torch.randint(0, 9, (2, 3, 9, 12), generator=generator).float()
    mass = 45 / 64
    kept_always = torch.rand(9, 12, generator=generator) < 0.1
    kept = by_mass(powers, mass, kept_always, 2, 12) | kept_always
    weights = powers.exp2()
    total, counts = weights.sum(-1), kept.sum(-1)
    assert ((weights * kept).sum(-1) >= mass * total).all() and (counts >= 2).all()
    free = kept & ~kept_always
    lightest = weights.masked_fill(~free, torch.inf).amin(-1)
    enough = ((weights * kept).sum(-1) - lightest >= mass * total) & free.any(-1) & (counts > 2)
    assert not enough.any()
    equal = by_mass(torch.zeros(1, 1, 1, 8), 0.5, torch.zeros(1, 8, dtype=torch.bool), 0, 8)
    assert equal[0, 0, 0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("beta", [-1, 0, 0.5, 1, 2])
def test_rule_sigma_is_predicted_by_the_bell_curve(tile: str, beta: float):
    at = Site(TokenGrid(9, 16, 16), layer=0, layers=1, step=0, steps=1)
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 8, at.tokens, 32, generator=generator)
    method = ThresholdBlocks(beta=beta, tile=tile)  # pyright: ignore[reportArgumentType]
    plan = method.plan(q, k, at)
    assert plan is not None
    assert method.predict(at) == pytest.approx(float(plan.density().mean()), abs=0.03)


def test_rule_top_is_predicted_between_smooth_and_random_tokens():
    at = site()
    for mass in (0.3, 0.5, 0.9):
        options: dict[str, Any] = {"rule": "top", "keep": 0.05, "mass": mass, "tile": "64x64"}
        predicted = ThresholdBlocks(**options).predict(at)
        low, high = (
            float(planned(at, smooth=it, **options).density().mean()) for it in (True, False)
        )
        assert low <= predicted <= high
    only = ThresholdBlocks(rule="top", keep=0.4, mass=0, tile="64x64")
    density = planned(at, rule="top", keep=0.4, mass=0, tile="64x64").density().mean()
    assert only.predict(at) == pytest.approx(float(density), abs=0.03)


@pytest.mark.parametrize("options", BUDGETS)
def test_what_is_no_number_is_kept(options: dict[str, Any]):
    at = site()
    q, k, _ = tensors(at)
    q[0, 0, 5] = torch.nan
    plan = ThresholdBlocks(tile="64x64", order="raster", **options).plan(q, k, at)
    assert plan is not None
    kept = plan.mask()[0, 0].all(-1)
    assert kept[0] and not kept[1:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("options", BUDGETS)
def test_a_gpu_chooses_the_same(options: dict[str, Any]):
    at, method = site(7), ThresholdBlocks(tile="64x64", similar=0.55, **options)
    q, k = (x.bfloat16() for x in tensors(at)[:2])
    expected, found = method.plan(q, k, at), method.plan(q.cuda(), k.cuda(), at)
    assert expected is not None and found is not None and found.indices.is_cuda
    assert (found.mask().cpu() != expected.mask()).float().mean() < 0.005
