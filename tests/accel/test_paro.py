"""`paro`: orders of axes, what a calibration finds, and that plans are what it says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from kinora.accel.calibration import (
    STARTS,
    Calibration,
    Tally,
    always,
    best,
    observed_steps,
    places,
    tile_mass,
    window,
)
from kinora.accel.grid import TokenGrid
from kinora.accel.methods import Paro
from kinora.accel.order import AXES, axes, raster
from kinora.accel.site import Site
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile, tiles_of

from .calibrating import GRID, SITE, TILES, calibrated, saved, tensors

# --- orders of axes ---


@pytest.mark.parametrize("grid", [GRID, TokenGrid(1, 5, 3), TokenGrid(3, 1, 1)])
def test_orders_of_axes(grid: TokenGrid):
    assert torch.equal(axes(grid, "FHW").places, raster(grid).places)
    for order in AXES:
        here = axes(grid, order)
        sizes = [{"F": grid.frames, "H": grid.height, "W": grid.width}[axis] for axis in order]
        steps = {"F": grid.height * grid.width, "H": grid.width, "W": 1}
        cells = itertools.product(*(range(size) for size in sizes))
        expected = [sum(at * steps[a] for at, a in zip(cell, order, strict=True)) for cell in cells]
        assert here.places.tolist() == expected


def test_two_orders_undo_each_other():
    """HWF of a grid is read back by WFH of the turned one."""
    turned = TokenGrid(GRID.height, GRID.width, GRID.frames)
    both = axes(GRID, "HWF").places[axes(turned, "WFH").places]
    assert torch.equal(both, torch.arange(GRID.tokens))


# --- what is observed ---


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("order", AXES)
def test_tile_mass_is_that_of_the_attention(order: str, tile: Tile):
    site = dataclasses.replace(SITE, text=10)
    q, k, _ = tensors(site)
    every = places(site, order).expand(3, -1)
    mass, peak = tile_mass(q, k, every, torch.arange(site.tokens), tile)
    weights = (q @ k.mT / math.sqrt(8)).softmax(-1)[:, :, places(site, order)]
    weights = weights[..., places(site, order)]
    rows, columns = tiles_of(site.tokens, tile.query), tiles_of(site.tokens, tile.key)
    assert mass.shape == peak.shape == (2, 3, rows, columns)
    for i, j in itertools.product(range(rows), range(columns)):
        block = weights.split(tile.query, 2)[i].split(tile.key, 3)[j]
        torch.testing.assert_close(mass[..., i, j], block.mean((2, 3)))
        torch.testing.assert_close(peak[..., i, j], block.amax((2, 3)))
    assert (peak >= mass).all()


def test_a_sample_of_the_queries_tells_about_the_same():
    site = dataclasses.replace(SITE, grid=TokenGrid(4, 16, 16))
    q, k, _ = tensors(site)
    every = places(site, "WHF").expand(3, -1)
    whole, _ = tile_mass(q, k, every, torch.arange(site.tokens), TILES[0])
    queries = torch.randperm(site.tokens, generator=torch.Generator().manual_seed(0))[:256]
    part, _ = tile_mass(q, k, every, queries, TILES[0])
    assert (part - whole).norm() / whole.norm() < 0.2


def attending(where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k `[1, 1, L, groups]` where tokens attend to those of the same group."""
    one_hot = torch.nn.functional.one_hot(where).float()[None, None]
    return 12 * one_hot, one_hot * math.sqrt(one_hot.shape[-1])


@pytest.mark.parametrize(
    ("axis", "fastest", "tiles"),
    [("place", {"F"}, 1), ("frame", {"H", "W"}, 4), ("column", {"F", "H"}, 4)],
)
def test_the_order_that_makes_a_heads_tiles_dense_is_found(
    axis: str, fastest: set[str], tiles: int
):
    """Heads of stripes take the striped axis fastest; heads of frames keep frames together."""
    grid = TokenGrid(16, 16, 16)
    site = Site(grid, layer=0, layers=1, step=0, steps=8)
    token = torch.arange(grid.tokens)
    where = {"place": token % 256, "frame": token // 256, "column": token % 16}[axis]
    keep = tiles / 64  # as few as the best order needs
    tally = Tally(keep=keep, tile=TILES[0], balance=1, sample=0.5)
    tally.observe(*attending(where), site)
    order = AXES[int(tally.orders[0][0])]
    slowest = {"place": {"H", "W"}, "frame": {"F"}, "column": {"W"}}[axis]
    assert order[2] in fastest and order[0] in slowest


def test_incoherence_is_1_for_even_attention_and_falls_by_reordering():
    site = dataclasses.replace(SITE, grid=TokenGrid(16, 16, 16))
    tally = Tally(keep=0.2, tile=TILES[0], balance=0, sample=0.5)
    even = torch.zeros(1, 1, site.tokens, 4)
    tally.observe(even, even, site)
    torch.testing.assert_close(tally.incoherence[0], torch.ones(1, 2), rtol=1e-4, atol=1e-4)
    striped = attending(torch.arange(site.tokens) % 256)
    tally = Tally(keep=0.2, tile=TILES[0], balance=0, sample=0.5)
    tally.observe(*striped, site)
    before, after = tally.incoherence[0][0].tolist()
    assert after < 0.5 * before


# --- masks and windows ---


def test_the_best_tiles_are_kept_and_the_forced_ones():
    mass = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    forced = torch.eye(9, dtype=torch.bool)
    kept = best(mass, 0.3, forced)
    assert (kept.sum((1, 2)) == round(0.3 * 81)).all() and kept[:, forced].all()
    free = mass.masked_fill(forced, -1)
    for head in range(2):
        assert free[head][kept[head] & ~forced].min() >= free[head][~kept[head]].max()
    assert (best(mass, 0.2, forced) <= kept).all()
    assert best(mass, 1, forced).all() and best(mass, 0.01, forced).sum() == 18


@pytest.mark.parametrize("first", [True, False])
def test_text_the_diagonal_and_ragged_tiles_are_always_kept(first: bool):
    kept = always(300, 70, first, Tile(64, 64))
    assert kept.shape == (5, 5) and kept.diagonal().all()
    ends = (0, 1, 4) if first else (3, 4)
    for at in ends:
        assert kept[at].all() and kept[:, at].all()
    assert not kept[2, 1] if not first else not kept[2, 3]


@pytest.mark.parametrize("first", [True, False])
def test_what_is_always_kept_of_larger_tiles_covers_that_of_small_ones(first: bool):
    small = always(1000, 70, first, Tile(64, 64))
    kept = always(1000, 70, first, Tile(128, 64))
    assert kept.shape == (8, 16)
    assert torch.equal(kept, small.unflatten(0, (8, 2)).any(1))
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30, 50])
def test_windows_are_in_order_and_are_observed(steps: int):
    found = [window(dataclasses.replace(SITE, step=i, steps=steps)) for i in range(steps)]
    assert found == sorted(found) and found[0] == 0 and max(found) < len(STARTS)
    assert all(found[i] == len(STARTS) - 1 for i in range(math.ceil(steps / 2), steps))
    seen = observed_steps(steps)
    assert len(seen) == len(STARTS) and all(0 <= step < steps for step in seen)
    if steps >= 8:
        assert [found[step] for step in seen] == list(range(len(STARTS)))


# --- plans ---


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("text", [0, 30])
@pytest.mark.parametrize("tail", ["none", "complement"])
def test_a_plan_is_attention_with_the_mask_pulled_back(
    text: int, tail: str, tile: Tile, tmp_path: Path
):
    site = dataclasses.replace(SITE, grid=TokenGrid(4, 10, 11), text=text, layers=2, layer=1)
    made = calibrated(site, 0.5, tile=tile)
    path = saved(made, tmp_path)
    q, k, v = tensors(site)
    plan = Paro(calibration=path).plan(q, k, site)
    assert plan is not None
    plan.check()
    assert plan.tile == tile == Paro(calibration=path).tiling()[0]
    mask = torch.zeros(3, site.tokens, site.tokens, dtype=torch.bool)
    for head in range(3):
        place = places(site, AXES[int(made.orders[1, head])]).argsort()
        row, column = place // tile.query, place // tile.key
        mask[head] = made.mask(0, 1)[head][row[:, None], column[None]]
    assert 0 < mask.sum() < mask.numel()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    torch.testing.assert_close(block_attention(q, k, v, plan)[0], dense, rtol=1e-4, atol=1e-5)
    assert Paro(calibration=path).predict(site) == float(plan.density().mean())
    other = Paro(calibration=path, tail=tail).plan(q, k, site)  # pyright: ignore[reportArgumentType]
    assert other is not None and other.tail == tail


def test_keep_1_is_dense(tmp_path: Path):
    made = calibrated(SITE, 1.0)
    method = Paro(calibration=saved(made, tmp_path))
    assert method.predict(SITE) == 1 and made.recall == pytest.approx(1)
    q, k, v = tensors(SITE)
    plan = method.plan(q, k, SITE)
    assert plan is not None
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block_attention(q, k, v, plan)[0], dense, rtol=1e-4, atol=1e-5)


def test_windows_have_masks_of_their_own(tmp_path: Path):
    site = dataclasses.replace(SITE, grid=TokenGrid(4, 16, 16))
    made = calibrated(site, 0.3)
    method = Paro(calibration=saved(made, tmp_path))
    q, k, _ = tensors(site)
    plans = [method.plan(q, k, dataclasses.replace(site, step=step)) for step in range(8)]
    assert plans[4] is plans[5] is plans[7] and plans[0] is not plans[1]
    assert plans[0] is not None and torch.equal(plans[0].mask()[0], made.mask(0, 0))
    masks = torch.stack([made.mask(at, 0) for at in range(len(STARTS))])
    assert made.density() == pytest.approx(float(masks.float().mean()))


@pytest.mark.parametrize("tile", TILES)
def test_a_file_holds_all_of_it(tile: Tile, tmp_path: Path):
    site = dataclasses.replace(SITE, text=9, text_first=True, layers=2)
    made = calibrated(site, 0.4, tile=tile)
    found = Calibration.read(Path(saved(made, tmp_path)))
    for field in dataclasses.fields(Calibration):
        one, other = getattr(made, field.name), getattr(found, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("layers", "tail"), [(40, "complement"), (70, "none")])
def test_a_layers_plan_is_made_once_in_a_window(
    layers: int,
    tail: Literal["none", "complement"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    one, site = calibrated(SITE, 0.5), dataclasses.replace(SITE, layers=layers)
    made = dataclasses.replace(
        one,
        orders=one.orders.expand(layers, -1),
        packed=one.packed.expand(-1, layers, -1, -1, -1),
        incoherence=one.incoherence.expand(layers, -1, -1),
    )
    method = Paro(calibration=saved(made, tmp_path), tail=tail)
    count, check = 0, BlockPlan.__post_init__

    def counted(plan: BlockPlan) -> None:
        nonlocal count
        count += 1
        check(plan)

    monkeypatch.setattr(BlockPlan, "__post_init__", counted)
    q, k, _ = tensors(site)
    for step, layer in itertools.product((4, 5), range(layers)):
        at = dataclasses.replace(site, step=step, layer=layer)
        assert method.predict(at) < 1 and method.plan(q, k, at) is not None
    assert count == layers
