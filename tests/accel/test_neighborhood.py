"""`neighborhood`: windows as NATTEN has them, on any grid, and masks exact to the token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kinora.accel.cost import Shape, predict, transformer_layer
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import Neighborhood
from kinora.accel.methods.neighborhood import axis_windows, sizes_of, windows_of
from kinora.accel.site import Site
from kinora.accel.wrappers import ByLayer
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile

RAGGED = TokenGrid(3, 7, 10)
EVEN = TokenGrid(4, 16, 16)
ALONE: dict[str, Any] = {"stride_frames": 1, "stride_height": 1, "stride_width": 1}
"""Every token has a window of its own."""
CASES: list[tuple[TokenGrid, dict[str, Any]]] = [
    (TokenGrid(1, 1, 130), {"width": 9, **ALONE}),
    (TokenGrid(1, 1, 130), {"width": 8, **ALONE, "stride_width": 4}),
    (TokenGrid(1, 1, 130), {"width": 8, **ALONE, "stride_width": 3, "dilation_width": 4}),
    (TokenGrid(1, 1, 130), {"width": 9, **ALONE, "causal": "width"}),
    (TokenGrid(1, 11, 13), {"height": 3, "width": 5, **ALONE}),
    (TokenGrid(1, 11, 13), {"height": 4, "width": 6, **ALONE, "stride_height": 3}),
    (TokenGrid(1, 11, 13), {"height": 0.5, "width": 0.5}),
    (TokenGrid(1, 11, 13), {"height": 3, "width": 3, **ALONE, "dilation_height": 3,
                            "dilation_width": 2, "causal": "height"}),
    (RAGGED, {"frames": 0.5, "height": 3, "width": 5, **ALONE}),
    (RAGGED, {"frames": 2, "height": 3, "width": 4, **ALONE, "causal": "frames"}),
    (RAGGED, {"frames": 1, "height": 4, "width": 4, "stride_height": 2, "stride_width": 4}),
    (RAGGED, {"frames": 1, "height": 3, "width": 3, **ALONE, "dilation_height": 2,
              "dilation_width": 3, "causal": "all", "stride_width": 2}),
    (EVEN, {"frames": 0.3, "height": 0.4, "width": 0.4}),
    (EVEN, {"frames": 1, "height": 0.3, "width": 9, "stride_width": 2}),
]  # fmt: skip
cases = pytest.mark.parametrize(("grid", "given"), CASES)


def site(grid: TokenGrid = RAGGED, text: int = 0, first: bool = False, step: int = 2) -> Site:
    return Site(grid, layer=1, layers=4, step=step, steps=10, text=text, text_first=first)


def method_of(given: dict[str, Any], tile: Any = "64x64") -> Neighborhood:
    return Neighborhood(**given, tile=tile)


def tensors(at: Site, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, at.tokens, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"]


def planned(method: Neighborhood, at: Site) -> BlockPlan:
    q, k, _ = tensors(at)
    plan = method.plan(q, k, at)
    assert plan is not None
    plan.check()
    assert plan.indices.shape[:2] == (1, 1), "one for all of a batch and all heads"
    return plan


def attended(size: int, window: int, stride: int, dilation: int, causal: bool) -> list[set[int]]:
    """What each token in a row attends to, each dilation group a row of its own, by loops."""
    found: list[set[int]] = [set() for _ in range(size)]
    for start in range(dilation):
        group = list(range(start, size, dilation))
        for at, token in enumerate(group):
            sharing = [it for it in range(len(group)) if it // stride == at // stride]
            if causal:
                # The last of those who share has the window that ends at it.
                leader = min(sharing[0] + stride - 1, len(group) - 1)
                inside = [it for it in range(len(group)) if leader - window < it <= at]
            else:
                leader = min(sharing[0] + stride // 2, len(group) - 1)
                first = leader - window // 2
                while first < 0:
                    first += 1
                while first + window > len(group):
                    first -= 1
                inside = list(range(first, first + window))
            found[token] = {group[it] for it in inside}
    return found


def by_loops(method: Neighborhood, at: Site) -> torch.Tensor:
    """All pairs of tokens as the model numbers them, `[L, L]` bool."""
    sides = at.grid.frames, at.grid.height, at.grid.width
    box = method.windows(at).box
    rows: list[list[set[int]]] = []
    for size, side, axis in zip(
        sides, (box.frames, box.height, box.width), method.axes, strict=True
    ):
        rows.append(attended(size, *sizes_of(size, side, axis), axis[3]))
    cells = list(itertools.product(*map(range, sides)))
    start = at.text if at.text_first else 0
    found = torch.zeros(at.tokens, at.tokens, dtype=torch.bool)
    found[at.is_text()], found[:, at.is_text()] = True, True
    for i, query in enumerate(cells):
        inside = [row[position] for row, position in zip(rows, query, strict=True)]
        keys = [j for j, key in enumerate(cells) if all(map(set.__contains__, inside, key))]
        found[start + i, start + torch.tensor(keys)] = True
    return found


def in_place(plan: BlockPlan) -> torch.Tensor:
    """The tokens that a plan keeps, as the model numbers them, `[L, L]` bool."""
    assert plan.order is not None
    back = plan.order.argsort()
    return plan.token_mask()[0, 0][back][:, back]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_windows_along_an_axis(size: int, dilation: int, causal: bool):
    if dilation > size:
        return
    for window in range(1, size // dilation + 1):
        for stride in range(1, window + 1):
            near = axis_windows(size, window, stride, dilation, causal)
            expected = attended(size, window, stride, dilation, causal)
            assert [set(row.nonzero()[:, 0].tolist()) for row in near] == expected
            assert near.diagonal().all()
            if not causal:
                assert (near.sum(-1) == window).all()
            # A dilation is as many problems without one.
            for group in range(dilation):
                part = near[group::dilation, group::dilation]
                assert torch.equal(part, axis_windows(len(part), window, stride, 1, causal))


def test_the_numbers_of_natten():
    def windows(size: int, window: int, stride: int = 1) -> list[list[int]]:
        rows = axis_windows(size, window, stride)
        return [sorted(it) for it in {tuple(row.nonzero()[:, 0].tolist()) for row in rows}]

    assert len(windows(10, 5)) == 6 and len(windows(10, 4)) == 7
    assert len(windows(10, 4, 2)) == 5 and len(windows(12, 6, 3)) == 4
    assert len(windows(16, 8, 8)) == 2
    assert sorted(windows(30, 18, 16)) == [list(range(18)), list(range(12, 30))]
    causal = axis_windows(8, 4, 2, causal=True)
    assert causal[4].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert causal[6].nonzero()[:, 0].tolist() == [4, 5, 6]
    assert axis_windows(8, 4, 4, causal=True)[4].nonzero()[:, 0].tolist() == [4]
    # Of an even window one more key is before than behind.
    assert axis_windows(10, 4)[5].nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert axis_windows(6, 6).all()


@pytest.mark.parametrize("given", [(4, 5, 1, 1), (4, 2, 3, 1), (4, 3, 1, 2), (4, 2, 0, 1)])
def test_windows_that_do_not_fit_are_refused(given: tuple[int, int, int, int]):
    with pytest.raises(ValueError, match=f"on {given[0]} tokens; the stride is at most"):
        axis_windows(*given)


@cases
@pytest.mark.parametrize(("text", "first"), [(0, False), (5, True), (70, False)])
def test_exactly_the_windows_are_attended_to(
    grid: TokenGrid, given: dict[str, Any], text: int, first: bool
):
    at, method = site(grid, text, first), method_of(given)
    plan, expected = planned(method, at), by_loops(method, at)
    assert torch.equal(in_place(plan), expected)
    # What is predicted is executed, to the pair.
    share = int(expected.sum()) / at.tokens**2
    assert method.predict(at) == share
    assert plan.density().tolist() == [[pytest.approx(share, abs=1e-7)]]
    assert plan.tile == method.tiling()[0] and plan.tail == "none"
    everything = dataclasses.replace(plan, within=None).density()
    assert float(everything) <= method.computed(at) + 1e-7
    assert (plan.within is None) == (method.computed(at) == share)


@cases
def test_attention_is_softmax_over_the_windows(grid: TokenGrid, given: dict[str, Any]):
    at, method = site(grid, 5, True), method_of(given)
    q, k, v = tensors(at)
    out, _ = block_attention(q, k, v, planned(method, at))
    mask = by_loops(method, at)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "256x128"])
@pytest.mark.parametrize("stride", [{}, ALONE], ids=["box", "alone"])
def test_every_token_has_all_keys_of_its_window(tile: str, stride: dict[str, Any]):
    """On any grid, at the borders too, whatever the tile."""
    for grid in (RAGGED, EVEN, TokenGrid(1, 30, 17), TokenGrid(13, 1, 9)):
        method = method_of({"frames": 0.4, "height": 0.4, "width": 0.4, **stride}, tile)
        at = site(grid)
        box = method.windows(at).box
        sides = zip(
            (grid.frames, grid.height, grid.width),
            (box.frames, box.height, box.width),
            method.axes,
            strict=True,
        )
        keys = math.prod(sizes_of(*it)[0] for it in sides)
        q, k, _ = tensors(at)
        plan = method.plan(q, k, at)
        if plan is None:
            assert keys == grid.tokens
            continue
        assert (plan.token_mask().sum(-1) == keys).all()
        if stride:
            assert in_place(plan).diagonal().all()


@pytest.mark.parametrize("text", [0, 70])
@pytest.mark.parametrize("tile", ["64x64", "128x64", "128x128", "256x128"])
def test_where_boxes_divide_the_grid_nothing_is_masked(tile: str, text: int):
    """And no pair is computed in vain: the density of tiles is that of tokens."""
    at = site(TokenGrid(8, 32, 48), text)
    method = method_of({}, tile)
    plan, found = planned(method, at), method.windows(at)
    assert plan.within is None and found.exact
    assert method.computed(at) == method.predict(at)
    # So it is for the windows in tokens that come to the same.
    tokens = {
        f"stride_{name}": side
        for name, side in zip(
            ("frames", "height", "width"),
            (found.box.frames, found.box.height, found.box.width),
            strict=True,
        )
    }
    same = planned(method_of(tokens | windows_in_tokens(found.near), tile), at)
    assert same.within is None and torch.equal(in_place(same), in_place(plan))


def windows_in_tokens(near: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    names = "frames", "height", "width"
    # 1 would be the whole axis.
    return {
        name: int(it[0].sum()) if it[0].sum() > 1 else 1e-9
        for name, it in zip(names, near, strict=True)
    }


def test_windows_of_the_paper_in_tokens():
    """Its case for HunyuanVideo, window and stride in tokens: nearly nothing is wasted."""
    at = site(TokenGrid(30, 48, 80))
    given = {"frames": 18, "height": 24, "width": 24}
    strides = {"stride_frames": 16, "stride_height": 8, "stride_width": 8}
    strided, alone = method_of(given | strides, "256x128"), method_of(given | ALONE, "256x128")
    share = 18 * 24 * 24 / at.tokens
    assert strided.predict(at) == alone.predict(at) == pytest.approx(share)
    assert strided.computed(at) < 1.02 * share < 1.5 * share < alone.computed(at)
    # Shares serve it without masks, with the same window.
    shares = Neighborhood(frames=0.6, height=0.5, width=0.3)
    assert shares.windows(at).exact
    assert shares.predict(at) == pytest.approx(share)


def test_shares_become_odd_windows():
    def window(share: float, size: int, stride: int = 1, side: int = 4) -> int:
        return sizes_of(size, side, (share, stride, 1, False))[0]

    assert [window(share, 10) for share in (1e-9, 0.3, 0.39, 0.5, 0.99, 1)] == [1, 3, 3, 5, 9, 10]
    assert window(0.3, 10, stride=0, side=2) == 2 and window(0.6, 10, stride=0, side=2) == 6
    assert window(1, 10, stride=0, side=4) == 10
    assert window(18, 30) == 18 and window(18, 7) == 7 and window(4, 30) == 4
    assert window(1.01, 30) == 2 and window(4.5, 30) == 5
    # Strides and dilations that a grid is too small for end at its size.
    assert sizes_of(5, 4, (3, 8, 1, False)) == (3, 3, 1)
    assert sizes_of(5, 4, (1, 1, 8, False)) == (1, 1, 5)
    for size in range(1, 30):
        found = [window(share / 50, size, stride) for stride in (0, 1) for share in range(1, 51)]
        assert found[:50] == sorted(found[:50]) and found[50:] == sorted(found[50:])
        assert found[49] == found[99] == size and min(found) >= 1


def test_a_window_of_the_whole_grid_is_dense():
    for text in (0, 7):
        at = site(text=text)
        q, k, _ = tensors(at)
        for given in ({"frames": 1, "height": 1, "width": 1},
                      {"frames": 3, "height": 70, "width": 10, **ALONE}):  # fmt: skip
            whole = method_of(given)
            assert whole.plan(q, k, at) is None
            assert whole.predict(at) == whole.computed(at) == 1
            assert "the window is all 3×7×10 tokens" in whole.why_dense(at)
    assert Neighborhood(frames=1, height=1, width=1, dilation_width=2).predict(site()) == 0.5


def test_plans_are_made_once_and_of_the_grid_alone():
    method = method_of({"frames": 0.6, "height": 0.5, "width": 0.3})
    q, k, _ = tensors(site())
    first = method.plan(q, k, site())
    assert first is method.plan(k, q, site(step=7))
    assert first is not method.plan(q, k, site(RAGGED, 0, True))


def test_boxes_may_have_any_number_of_tokens():
    """Key tiles that begin within boxes, and query tiles that hold parts of several."""
    for box, tile in itertools.product(
        (TokenGrid(2, 2, 2), TokenGrid(1, 3, 4)), (Tile(8, 4), Tile(16, 40), Tile(5, 3))
    ):
        found = windows_of(box, tile, method_of({"frames": 2, **ALONE}).axes, RAGGED, 3)
        at = found.positions(RAGGED)
        inside = torch.ones(RAGGED.tokens, RAGGED.tokens, dtype=torch.bool)
        for mask, position in zip(found.near, at, strict=True):
            inside &= mask[position][:, position]
        tokens = torch.ones(found.tokens, found.tokens, dtype=torch.bool)
        tokens[: RAGGED.tokens, : RAGGED.tokens] = inside
        for i, rows in enumerate(tokens.split(tile.query)):
            for j, part in enumerate(rows.split(tile.key, dim=1)):
                assert bool(found.whole[i, j]) == bool(part.all())
                assert bool(found.tiles[i, j]) >= bool(part.any())


def test_what_is_computed_is_what_costs():
    """Masks need `triton` on a GPU, and time for all pairs of the tiles that they mask."""
    shape = Shape((transformer_layer(4, 64, 1024),) * 2)
    given = {"frames": 0.3, "height": 0.3, "width": 0.3}
    grid = TokenGrid(8, 32, 48)

    def found(method: Any) -> Any:
        setting: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "steps": 2}
        return predict(method, shape, grid, always=True, **setting)

    masked, exact = method_of(given | ALONE, "128x64"), method_of(given, "128x64")
    at = site(grid)
    assert masked.computed(at) > 2 * masked.predict(at)
    assert exact.computed(at) == exact.predict(at)
    assert found(masked).density == pytest.approx(masked.predict(at))
    assert found(masked).speedup < found(exact).speedup
    wrapped = ByLayer(method=masked, by_layer="width 0.3 0.5")
    assert wrapped.computed(site(grid)) == wrapped.at(site(grid)).computed(site(grid))
