"""`vmoba`: that plans attend to exactly what queries have chosen, on any grid, and say how much."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.grid import TokenGrid
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import VMoBA
from kinora.accel.methods.vmoba import layout
from kinora.accel.methods.vmoba import planned as plan_of
from kinora.accel.partition import partition
from kinora.accel.site import Site
from kinora.accel.wrappers import ByLayer, Quantised, Reuse, Within
from kinora.kernels import bits
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile, tile_lengths

RAGGED = TokenGrid(5, 7, 18)  # 630 tokens; no default divides it but one
EVEN = TokenGrid(6, 12, 8)
SMALL: dict[str, Any] = {
    "tile": "64x64",
    "shared": False,
    "temporal": 3,
    "spatial_height": 3,
    "spatial_width": 2,
    "cube_frames": 3,
    "cube_height": 2,
    "cube_width": 2,
}
SETTINGS: list[dict[str, Any]] = [
    {"keep": 0.3},
    {"keep": 0.4, "scope": "head"},
    {"keep": 0.4, "scope": "global"},
    {"rule": "similarity", "scope": "head", "mass": 0.4},
    {"rule": "softmax", "mass": 0.4},
    {"rule": "softmax", "scope": "global", "mass": 0.3},
]
settings = pytest.mark.parametrize("setting", SETTINGS, ids=str)
layers = pytest.mark.parametrize("layer", [0, 1, 2])
texts = pytest.mark.parametrize(
    ("text", "first"), [(0, False), (7, True), (7, False), (70, True), (70, False)]
)


def small(**options: Any) -> VMoBA:
    return VMoBA(**(SMALL | options))


def site(
    layer: int = 0, text: int = 0, first: bool = False, grid: TokenGrid = RAGGED, step: int = 2
) -> Site:
    return Site(grid, layer=layer, layers=6, step=step, steps=10, text=text, text_first=first)


def tensors(at: Site, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, at.tokens, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qkv"]


def planned(method: VMoBA, at: Site) -> BlockPlan:
    q, k, _ = tensors(at)
    plan = method.plan(q, k, at)
    assert plan is not None
    plan.check()
    return plan


def attended(method: VMoBA, at: Site) -> torch.Tensor:
    """Which keys each query attends to by the rule, `[B, H, L, L]` bool, tokens as they come."""
    q, k, _ = tensors(at)
    chosen = method.choose(q, k, at)
    picture = ~at.is_text()
    kept = torch.ones(*q.shape[:2], at.tokens, at.tokens, dtype=torch.bool)
    owner = partition(at.grid, method.parts(at)).owner
    kept[:, :, picture.nonzero(), picture] = chosen[..., owner]
    return kept


def by_plan(plan: BlockPlan) -> torch.Tensor:
    """The same, as the plan says it."""
    order, key_order = plan.orders
    assert order is not None and key_order is not None
    mask = plan.token_mask()
    rows = order.argsort(-1)[..., None].expand_as(mask)
    return mask.gather(2, rows)[..., key_order.argsort()]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.softmax((q @ k.mT / 4).masked_fill(~kept, -torch.inf), -1) @ v


@settings
@layers
@texts
def test_a_plan_attends_to_what_queries_have_chosen_and_no_more(
    setting: dict[str, Any], layer: int, text: int, first: bool
):
    at, method = site(layer, text, first), small(**setting)
    plan, kept = planned(method, at), attended(method, at)
    assert torch.equal(by_plan(plan), kept) and not kept.all()
    assert kept[:, :, at.is_text()].all() and kept[..., at.is_text()].all()
    assert torch.equal(plan.density(), kept.sum((2, 3)) / torch.tensor(at.tokens**2))
    # No tile is gone over for nothing.
    assert plan.within is not None
    masked = plan.kept[..., : plan.within.shape[3]]
    assert (plan.within[masked] != 0).flatten(1).any(1).all()


@settings
@texts
def test_it_is_attention_over_chosen_tokens_with_its_gradients(
    setting: dict[str, Any], text: int, first: bool
):
    at, method = site(2, text, first), small(**setting)
    plan, kept = planned(method, at), attended(method, at)
    q, k, v = given = [x.requires_grad_() for x in tensors(at)]
    out, _ = block_attention(q, k, v, plan)
    expected = dense(q, k, v, kept)
    torch.testing.assert_close(out, expected)
    seed = tensors(at, seed=1)[0]
    for found, wanted in zip(
        torch.autograd.grad((out * seed).sum(), given),
        torch.autograd.grad((expected * seed).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@layers
def test_no_backend_of_the_cpu_says_otherwise(layer: int):
    at = site(layer, 7, True)
    q, k, v = (x.float() for x in tensors(at))
    plan = small(keep=0.3).plan(q, k, at)
    assert plan is not None
    expected, _ = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="cpu")[0], expected)


def test_layers_cut_time_space_and_both_in_turn():
    method = VMoBA(keep=0.25, shared=False)
    cuts = [method.parts(site(it)) for it in range(6)]
    assert cuts == [TokenGrid(7, 1, 1), TokenGrid(1, 6, 4), TokenGrid(3, 6, 4)] * 2
    # The paper's 2, 6 and 18 blocks of each query.
    grid = TokenGrid(21, 30, 52)
    for layer, kept, count in ((0, 2, 7), (1, 6, 24), (2, 18, 72)):
        assert method.predict(site(layer, grid=grid)) == pytest.approx(kept / count)


@layers
def test_everything_taken_is_dense(layer: int):
    at = site(layer)
    q, k, _ = tensors(at)
    for all_of in (VMoBA(keep=1), VMoBA(rule="similarity", mass=1), VMoBA(rule="softmax", mass=1)):
        assert all_of.plan(q, k, at) is None
        assert all_of.predict(at) == all_of.computed(at) == 1
        assert "blocks are taken" in all_of.why_dense(at)


@pytest.mark.parametrize("text", [0, 7])
def test_nearly_everything_taken_is_nearly_dense_and_errors_fall_on_the_way(text: int):
    at = site(2, text)
    q, k, v = tensors(at)
    whole = torch.ones(at.tokens, at.tokens, dtype=torch.bool)
    errors: list[float] = []
    for keep in (0.1, 0.3, 0.6, 0.9):
        plan = planned(small(keep=keep), at)
        out, _ = block_attention(q, k, v, plan)
        errors.append(float((out - dense(q, k, v, whole)).norm()))
    assert errors == sorted(errors, reverse=True)
    full = BlockPlan.from_mask(
        torch.ones_like(plan.mask()), tile=plan.tile, queries=at.tokens, keys=at.tokens,
        order=plan.order, key_order=plan.key_order,
    )  # fmt: skip
    torch.testing.assert_close(block_attention(q, k, v, full)[0], dense(q, k, v, whole))


@layers
@pytest.mark.parametrize("rule", ["similarity", "softmax"])
@pytest.mark.parametrize("scope", ["query", "head", "global"])
def test_a_larger_mass_takes_all_that_a_smaller_one_takes(layer: int, rule: str, scope: str):
    at = site(layer, 7, True)
    kept = [
        by_plan(planned(small(rule=rule, scope=scope, mass=mass), at)) for mass in (0.1, 0.3, 0.6)
    ]
    assert (kept[0] <= kept[1]).all() and (kept[1] <= kept[2]).all()
    assert kept[0].sum() < kept[2].sum()


def test_one_block_is_dense():
    picture = site(0, grid=TokenGrid(1, 20, 30))
    q, k, _ = tensors(picture)
    assert VMoBA().plan(q, k, picture) is None and VMoBA().predict(picture) == 1
    assert "the clip of 1×20×30 tokens is one block" in VMoBA().why_dense(picture)
    assert VMoBA(shared=False, keep=0.4).predict(dataclasses.replace(picture, layer=1)) < 0.5


@layers
@pytest.mark.parametrize("scope", ["query", "head", "global"])
@pytest.mark.parametrize(("text", "first"), [(0, False), (70, True)])
def test_the_density_of_top_is_predicted(layer: int, scope: str, text: int, first: bool):
    for grid, off in ((EVEN, 1e-6), (RAGGED, 0.05)):
        at = site(layer, text, first, grid)
        method = small(keep=0.4, scope=scope)
        found = float(planned(method, at).density().mean())
        assert method.predict(at) == pytest.approx(found, abs=off)
        assert method.predict(at) <= method.computed(at) <= 1


@settings
@layers
@pytest.mark.parametrize("text", [0, 70])
def test_tiles_that_all_queries_take_whole_come_last(
    setting: dict[str, Any], layer: int, text: int
):
    plan = planned(small(**setting), site(layer, text))
    assert plan.within is not None
    most, width = plan.within.shape[3], plan.indices.shape[3]
    taken = bits.unpack(plan.within, plan.tile.key)
    taken = torch.nn.functional.pad(taken, (0, 0, 0, 0, 0, width - most), value=True)
    queries = torch.arange(plan.rows * 64).view(-1, 1, 64, 1) < plan.queries
    keys = torch.arange(64) < tile_lengths(plan.keys, 64)[plan.indices.long()][..., None, None]
    whole = (taken | ~(queries & keys)).flatten(-2).all(-1)
    assert not whole[plan.kept].all() and whole[plan.kept].any()
    assert (whole | ~plan.kept).int().diff(dim=-1).min() >= 0
    assert most == int((~whole & plan.kept).sum(-1).max())


@pytest.mark.parametrize(("of", "value"), [("BYTES", 1), ("_TOGETHER", 1), ("_TOGETHER", 3)])
def test_how_many_masks_are_made_at_a_time_changes_nothing(
    of: str, value: int, monkeypatch: pytest.MonkeyPatch
):
    at, method = site(2, 7), small(keep=0.3, cube_height=7, cube_width=18)
    expected = planned(method, at)
    monkeypatch.setattr(f"kinora.kernels.masks.{of}", value)
    found = planned(method, at)
    assert found.within is not None and expected.within is not None
    assert torch.equal(found.within, expected.within)


@layers
def test_masks_of_an_odd_number_of_words(layer: int):
    at, method = site(layer, 7, True), small(keep=0.3)
    q, k, _ = tensors(at)
    chosen = method.choose(q, k, at)
    found = layout(chosen.device, method.parts(at), at.grid, at.text, True, Tile(48, 96))
    assert torch.equal(by_plan(plan_of(chosen, found, shared=False)), attended(method, at))


def test_no_masks_where_all_tiles_are_whole():
    method, at = small(), site(0, grid=EVEN)
    chosen = torch.tensor([True, False, True]).expand(1, 2, EVEN.tokens, 3)
    found = layout(chosen.device, method.parts(at), EVEN, 0, False, Tile(64, 64))
    plan = plan_of(chosen, found, shared=False)
    assert plan.within is None and plan.mask().sum(-1).unique().tolist() == [6]


@settings
@layers
def test_shared_plans_take_all_of_the_tiles_and_no_more_time(setting: dict[str, Any], layer: int):
    at = site(layer, 7)
    own, shared = (planned(small(**setting, shared=it), at) for it in (False, True))
    assert shared.within is None and torch.equal(shared.mask(), own.mask())
    assert (by_plan(own) <= by_plan(shared)).all() and (own.density() < shared.density()).all()
    method = small(**setting, shared=True)
    assert method.predict(at) == method.computed(at)


def test_queries_of_a_tile_are_those_that_take_alike():
    at = site(0, grid=TokenGrid(8, 8, 8))
    method = small(temporal=4, keep=0.5)
    q, k, _ = tensors(at)
    kept, chosen = planned(method, at).mask().float().mean(), method.choose(q, k, at)
    places = partition(at.grid, method.parts(at)).places
    unsorted = chosen[:, :, places].unflatten(2, (-1, 64)).any(3).float().mean()
    assert kept < unsorted - 0.2


@settings
def test_the_same_call_makes_the_same_plan_in_each_item_for_itself(setting: dict[str, Any]):
    at, method = site(2, 7), small(**setting)
    q, k, _ = tensors(at)
    plan, again = planned(method, at), planned(method, at)
    for name in ("indices", "counts", "order", "within"):
        assert torch.equal(getattr(plan, name), getattr(again, name))
    turned = method.plan(q.flip(0), k.flip(0), at)
    assert turned is not None and torch.equal(by_plan(turned), by_plan(plan).flip(0))
    heads = slice(None) if method.scope == "global" else slice(1, 2)
    alone = method.choose(q[1:, heads], k[1:, heads], at)
    assert torch.equal(alone, method.choose(q, k, at)[1:, heads])


@settings
def test_chunks_change_nothing(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    at, method = site(1), small(**setting)
    q, k, _ = tensors(at)
    expected = method.choose(q, k, at)
    monkeypatch.setattr("kinora.accel.methods.vmoba.CHUNK", 1)
    assert torch.equal(method.choose(q, k, at), expected)


@settings
@pytest.mark.parametrize("text", [0, 7])
def test_a_vector_added_to_all_keys_changes_no_choice(setting: dict[str, Any], text: int):
    at, method = site(2, text), small(**setting)
    q, k, _ = tensors(at)
    shift = tensors(at, seed=5)[0][:, :, :1] * 3
    assert torch.equal(method.choose(q, k + shift, at), method.choose(q, k, at))


@settings
def test_text_changes_no_choice_of_the_picture_not_even_where_it_is_no_number(
    setting: dict[str, Any],
):
    method, plain = small(**setting), site(2)
    q, k, _ = tensors(plain)
    expected = method.choose(q, k, plain)
    text = torch.full((2, 3, 7, 16), torch.nan, dtype=torch.float64)
    for first in (True, False):
        wide_q, wide_k = (torch.cat([text, x] if first else [x, text], dim=2) for x in (q, k))
        assert torch.equal(method.choose(wide_q, wide_k, site(2, 7, first)), expected)


def test_half_precision_chooses_as_its_values_in_float64_do():
    at, method = site(2, 7), small(keep=0.3)
    q, k = (x.bfloat16() for x in tensors(at)[:2])
    masks = [
        method.choose(q.to(it), k.to(it), at)
        for it in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "256x128"])
@pytest.mark.parametrize(("text", "first"), [(0, False), (7, True)])
def test_blocks_smaller_and_larger_than_tiles(tile: str, text: int, first: bool):
    fine: dict[str, Any] = {"cube_frames": 5, "cube_height": 7, "cube_width": 9}
    for changes, layer in [(fine, 2), ({}, 0), ({}, 2)]:
        at, method = site(layer, text, first), small(**changes, tile=tile, keep=0.3)
        assert torch.equal(by_plan(planned(method, at)), attended(method, at))


def test_cost_goes_by_the_tiles_in_every_wrapper():
    at, method = site(0), VMoBA(keep=0.25, shared=False)
    for wrapped in (Quantised(method=method), Reuse(method=method), Within(method=method)):
        assert wrapped.computed(at) == method.computed(at) > wrapped.predict(at)
    assert Within(method=method, from_layer=1).computed(at) == 1
    curve = ByLayer(method=method, by_layer="keep 1 0.25")
    assert curve.computed(at) == 1 and curve.computed(site(5)) < 1


def test_the_memory_of_masks_is_predicted_and_none_where_there_are_none():
    grid, layer = TokenGrid(9, 32, 32), transformer_layer(4, 16, 64)
    given: dict[str, Any] = {
        "device": "cpu", "dtype": torch.float32, "steps": 1, "always": True, "batch": 2,
    }  # fmt: skip

    def needed(method: AttentionMethod) -> int:
        return predict(method, Shape((layer,) * 3), grid, **given).workspace

    own, shared = VMoBA(shared=False), VMoBA()
    # The most of the three kinds of layers.
    most = max(own.computed(site(it, grid=grid)) for it in range(3))
    masks = 2 * 4 * most * grid.tokens**2 / 8
    for made, plans in (
        ((shared, own), 1),
        ((Reuse(method=shared, every=0), Reuse(method=own, every=0)), 3),
    ):
        less, more = map(needed, made)
        assert more - less == pytest.approx(plans * masks, rel=1e-6)
    q, k = (torch.randn(1, 4, grid.tokens, 16, generator=torch.Generator()) for _ in range(2))
    plan = own.plan(q, k, site(2, grid=grid))
    assert plan is not None and plan.within is not None
    assert plan.within.nbytes == pytest.approx(masks / 2, rel=0.35)
