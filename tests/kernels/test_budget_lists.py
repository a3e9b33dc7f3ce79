"""Lists of as many tiles as a row needs: those of a mass, and those above a threshold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kinora.kernels.lists import above_tiles, mass_tiles, top_tiles
from kinora.kernels.lists_launch import FUSED_COLUMNS, Backend
from kinora.kernels.plan import tile_lengths

from .made_lists import BACKENDS, Lists, forced_of, mask_of, means_of, same

pytest.importorskip("triton", reason="the test group has it on Linux")


# --- enough tiles for a mass ---


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 10), (3, 70)])
def test_the_tiles_of_a_mass_equal_the_definition(rows: int, columns: int, given: bool):
    means = means_of(rows, columns, whole=False)
    forced = forced_of(rows, columns) if given else None
    for mass, most in ((0.3, None), (0.9, max(1, columns // 3)), (1.0, None)):
        arguments = (*means, mass, 0.3, forced, most)
        expected = mass_tiles(*arguments, last=0.25, backend="torch")
        same(mass_tiles(*arguments, last=0.25, backend="triton"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mass_is_reached_with_the_fewest_tiles_and_grows(backend: Backend):
    rows, columns, size, keys = 6, 21, 16, 16 * 20 + 5
    q, k = means_of(rows, columns, whole=False)
    forced = forced_of(rows, columns)
    logits = (q @ k.mT).double() * 0.4 + tile_lengths(keys, size).double().log()
    shares = logits.softmax(-1)
    before = torch.zeros(1, 2, rows, columns, dtype=torch.bool)
    for mass in (0.05, 0.3, 0.6, 0.95):
        made = mass_tiles(q, k, mass, 0.4, forced, last=5 / size, backend=backend)
        mask = mask_of(made, columns)
        assert (before <= mask).all() and mask[..., forced].all()
        kept = (shares * mask).sum(-1)
        assert (kept >= mass - 1e-6).all()
        # Without the least of those that are not forced it would not be enough.
        least = shares.masked_fill(~mask | forced, torch.inf).amin(-1)
        assert ((kept - least < mass) | (least == torch.inf)).all()
        most = mask_of(mass_tiles(q, k, mass, 0.4, forced, 4, backend=backend), columns)
        assert (most.sum(-1) <= forced.sum(-1).clamp(min=4)).all() and most[..., forced].all()
        few = mask_of(mass_tiles(q, k, mass, 0.4, forced, least=9, backend=backend), columns)
        assert (few.sum(-1) >= 9).all() and (few[..., forced]).all()
        at_least = mask_of(mass_tiles(q, k, mass, 0.4, forced, backend=backend), columns)
        assert (at_least <= few).all() and ((few == at_least).all(-1) | (few.sum(-1) == 9)).all()
        before = mask
    alone = mass_tiles(q, k, 0, 0.4, least=9, backend=backend)
    assert (mask_of(alone, columns) == mask_of(top_tiles(q, k, 9, backend=backend), columns)).all()
    everything = mass_tiles(q * 50, k, 1.0, 0.4, backend=backend)
    assert (everything[1] == columns).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_masses_keep_the_first_tiles(backend: Backend):
    q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 8, 8)
    forced = torch.zeros(2, 8, dtype=torch.bool)
    forced[1, 6] = True
    indices, counts = mass_tiles(q, k, 0.5, 1.0, forced, backend=backend)
    assert counts.tolist() == [[[4, 4]]]
    assert indices[0, 0, :, :4].tolist() == [[0, 1, 2, 3], [0, 1, 2, 6]]
    # More forced than the mass needs, and rows without a number: no list is empty.
    forced[0] = True
    counts = mass_tiles(q, k, 0.1, 1.0, forced, 2, backend=backend)[1]
    assert counts.tolist() == [[[8, 1]]]
    assert mass_tiles(q * torch.nan, k, 0.1, 1.0, backend=backend)[1].tolist() == [[[8, 8]]]


# --- tiles above a threshold of their row ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 10), (17, 33), (3, 70)])
def test_tiles_above_a_threshold_equal_the_definition(
    rows: int, columns: int, given: bool, backend: Backend
):
    q, k = means_of(rows, columns, whole=False)
    forced = forced_of(rows, columns) if given else torch.zeros(rows, columns, dtype=torch.bool)
    scores = q.double() @ k.double().mT
    mean, deviation = scores.mean(-1, keepdim=True), scores.std(-1, correction=0, keepdim=True)
    for beta in (-0.5, 0.0, 0.3, 1.5):
        # Far from 0, keys say as much.
        made = above_tiles(q, k + 30, beta, forced if given else None, backend=backend)
        mask = mask_of(made, columns)
        if columns > 1:  # of one tile all scores are the mean, up to rounding
            assert torch.equal(mask, (scores > mean + beta * deviation) | forced)
        assert torch.equal(made[1], mask.sum(-1)) and made[0].shape[-1] == columns
        for head, row in itertools.product(range(2), range(rows)):
            count = int(made[1][0, head, row])
            kept = made[0][0, head, row]
            assert (kept[:count].diff() > 0).all() and not kept[count:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_are_not_above_and_what_is_no_number_is(backend: Backend):
    k = torch.eye(4)[None, None]
    q = torch.tensor([[2.0, 2, 2, 2], [0, 0, 0, 0], [1, 0, 0, 0], [math.nan, 0, 0, 0]])[None, None]
    counts = above_tiles(q, k, 0.0, backend=backend)[1]
    assert counts.tolist() == [[[0, 0, 1, 4]]]
    assert above_tiles(q, k * math.inf, 0.0, backend=backend)[1].tolist() == [[[4, 4, 4, 4]]]
    # Of four, one is 1.73 deviations above the mean at the most.
    assert above_tiles(q, k, 1.74, backend=backend)[1].tolist() == [[[0, 0, 0, 4]]]
    assert above_tiles(q, k, -4.0, backend=backend)[1][0, 0, 2] == 4


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["top", "mass", "above"])
@pytest.mark.parametrize("columns", [70, FUSED_COLUMNS, FUSED_COLUMNS + 1])
def test_kernels_make_the_lists_of_the_definition(rule: str, columns: int):
    rows, dim = 37, 64
    generator = torch.Generator().manual_seed(columns)
    # Whole numbers, of which sums are exact: kernels and definition cannot differ in last bits.
    q, k = (
        torch.randint(-4, 5, (1, 2, tiles, dim), generator=generator).float().cuda()
        for tiles in (rows, columns)
    )
    forced = forced_of(rows, columns).cuda()

    def made(backend: Backend) -> Lists:
        if rule == "top":
            return top_tiles(q, k, columns // 5, forced, backend=backend)
        if rule == "mass":
            return mass_tiles(q, k, 0.7, 0.01, forced, backend=backend)
        return above_tiles(q, k, 0.7, forced, backend=backend)

    found, expected = (mask_of(made(it), columns) for it in ("triton", "torch"))
    if rule == "top":
        assert torch.equal(found, expected)
    else:  # sums and means are rounded, so that one tile in thousands may lie on the other side
        assert (found != expected).float().mean() < 1e-3
    assert (found | ~forced).all() and found.float().mean() < 0.9
