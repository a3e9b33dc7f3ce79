"""Means of tiles, lists of the best tiles and their transpose: Triton, interpreted, and torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from kinora.accel.grid import TokenGrid
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import ThresholdBlocks, TopBlocks
from kinora.accel.site import Site
from kinora.kernels import lists
from kinora.kernels import lists_launch as launch
from kinora.kernels.lists import (
    above_tiles,
    mass_tiles,
    pair_means,
    permuted,
    tile_means,
    top_tiles,
    transposed,
)
from kinora.kernels.lists_launch import Backend
from kinora.kernels.plan import BlockPlan, Tile

from .made_lists import BACKENDS, Lists, forced_of, mask_of, means_of, same

pytest.importorskip("triton", reason="the test group has it on Linux")


def tokens_of(tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[2, 3, tokens, dim]`: `[B, L, H, D]` in memory, a slice of a tensor full of NaN."""
    generator = torch.Generator().manual_seed(tokens + dim)
    whole = torch.full((2, tokens + 5, 4, dim + 3), torch.nan, dtype=dtype)
    whole[:, :tokens, :3, :dim] = torch.randn(2, tokens, 3, dim, generator=generator).to(dtype)
    return whole[:, :tokens, :3, :dim].transpose(1, 2)


def order_of(tokens: int) -> torch.Tensor:
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(tokens))


# --- means and permutations ---


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 8), (33, 20), (70, 40)])
def test_means_equal_the_definition(tokens: int, dim: int, ordered: bool):
    q, k = tokens_of(tokens, dim), tokens_of(tokens + 1, dim)[:, :, 1:]
    order = order_of(tokens) if ordered else None
    tile = Tile(32, 24)
    got = pair_means(q, k, tile, order, backend="triton")
    for x, size, mean in ((q, tile.query, got[0]), (k, tile.key, got[1])):
        x = x if order is None else x[:, :, order]
        expected = torch.stack([part.mean(2) for part in x.split(size, 2)], 2)
        torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(got, pair_means(q, k, tile, order, backend="torch"))
    torch.testing.assert_close(tile_means(q, tile.query, order, backend="triton"), got[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_are_float32_of_any_dtype(dtype: torch.dtype):
    x = tokens_of(40, 16, dtype)
    got = tile_means(x, 16, backend="triton")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, tile_means(x.float(), 16, backend="torch"))


@pytest.mark.parametrize("ordered", [False, True])
def test_means_are_the_same_of_some_tiles_at_a_time(ordered: bool, monkeypatch: pytest.MonkeyPatch):
    x, order = tokens_of(333, 20), order_of(333) if ordered else None
    whole = tile_means(x, 32, order, backend="torch")
    expected = x if order is None else x[:, :, order]
    expected = torch.stack([part.mean(2) for part in expected.split(32, 2)], dim=2)
    torch.testing.assert_close(whole, expected)
    for size in (1, 4 * 32 * 3 * x[:, :, 0].numel()):
        monkeypatch.setattr(lists, "MEANS_BYTES", size)
        torch.testing.assert_close(tile_means(x, 32, order, backend="torch"), whole)


def test_a_tile_longer_than_all_tokens_and_one_read_in_chunks():
    x = tokens_of(70, 300)[:1, :2]  # 300 channels: 16 tokens at a time
    for size in (64, 128, 70):
        got = tile_means(x, size, order_of(70), backend="triton")
        torch.testing.assert_close(got, tile_means(x, size, order_of(70), backend="torch"))


def test_tensors_expanded_over_batch_and_heads():
    x = tokens_of(40, 16)[:1, :1].expand(2, 3, -1, -1)
    got = tile_means(x, 16, backend="triton")
    torch.testing.assert_close(got, tile_means(x.contiguous(), 16, backend="torch"))
    assert torch.equal(permuted(x, order_of(40), backend="triton"), x[:, :, order_of(40)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permutations_are_copies_that_can_be_undone(dtype: torch.dtype, backend: Backend):
    x, order = tokens_of(70, 20, dtype), order_of(70)
    there = permuted(x, order, backend=backend)
    assert there.is_contiguous() and torch.equal(there, x[:, :, order])
    assert torch.equal(permuted(there, order, inverse=True, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_heads_may_have_orders_of_their_own(shape: tuple[int, int], backend: Backend):
    x = tokens_of(70, 20)
    order = torch.stack([order_of(70).roll(i) for i in range(shape[0] * shape[1])]).view(*shape, 70)
    there = permuted(x, order, backend=backend)
    for b, h in itertools.product(range(2), range(3)):
        own = order[b % shape[0], h % shape[1]]
        assert torch.equal(there[b, h], x[b, h, own])
    assert torch.equal(permuted(there, order, inverse=True, backend=backend), x)
    torch.testing.assert_close(tile_means(x, 16, order, backend=backend), tile_means(there, 16))
    found = pair_means(x, x, Tile(24, 16), order, backend=backend)
    torch.testing.assert_close(found, pair_means(there, there, Tile(24, 16)))


# --- the best tiles ---


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "counts"),
    [(1, 1, (1,)), (5, 10, (1, 4, 10)), (17, 33, (7,)), (3, 70, (9,))],
)
def test_the_best_tiles_are_those_of_a_stable_sort(
    rows: int, columns: int, counts: tuple[int, ...], given: bool
):
    means = means_of(rows, columns)
    forced = forced_of(rows, columns) if given else torch.zeros(rows, columns, dtype=torch.bool)
    scores = means[0] @ means[1].mT
    for count in counts:
        got = top_tiles(*means, count, forced if given else None, backend="triton")
        same(got, top_tiles(*means, count, forced if given else None, backend="torch"))
        for head, row in itertools.product(range(2), range(rows)):
            best = sorted(
                range(columns), key=lambda i: (not forced[row, i], -scores[0, head, row, i], i)
            )
            kept = best[: max(count, int(forced[row].sum()))]
            assert got[1][0, head, row] == len(kept)
            expected = sorted(kept) + [0] * (got[0].shape[-1] - len(kept))
            assert got[0][0, head, row].tolist() == expected


def test_scores_of_any_sign_and_size():
    means = means_of(9, 40, whole=False)
    # Scores far apart, which rounding does not swap.
    means = means[0] * torch.logspace(-20, 15, 9)[:, None], means[1]
    same(top_tiles(*means, 6, backend="triton"), top_tiles(*means, 6, backend="torch"))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_zeros_infinities_and_what_is_no_number(backend: Backend):
    inf, nan = math.inf, math.nan
    rows: dict[int, tuple[list[float], list[int]]] = {
        0: ([0.0, -0.0, 0.0, -1, -0.0], [0, 1]),
        1: ([-3, -2, -3, -2, -2], [1, 3]),
        2: ([-inf, -inf, -inf, -inf, -inf], [0, 1]),
        3: ([1, inf, 2, inf, inf], [1, 3]),
        4: ([inf, 1, 2, nan, 3], [0, 3]),
        5: ([nan, nan, nan, nan, nan], [0, 1]),
    }
    # One channel: no infinity is multiplied with zero.
    scores = torch.tensor([it[0] for it in rows.values()])[:, None, :, None]
    chosen, counts = top_tiles(torch.ones(6, 1, 1, 1), scores, 2, backend=backend)
    assert (counts == 2).all()
    assert chosen[:, 0, 0].tolist() == [it[1] for it in rows.values()]


@pytest.mark.parametrize("rule", ["top", "mass", "above"])
def test_many_tiles_go_by_scores_in_parts(rule: str, monkeypatch: pytest.MonkeyPatch):
    q, k = (x.repeat(2, 1, 1, 1) for x in means_of(3, 40))
    forced = forced_of(3, 40)

    def made() -> Lists:
        if rule == "mass":
            return mass_tiles(q, k, 0.5, 0.2, forced, backend="triton")
        if rule == "above":
            return above_tiles(q, k, 0.7, forced, backend="triton")
        return top_tiles(q, k, 7, forced, backend="triton")

    expected = made()
    monkeypatch.setattr(launch, "FUSED_COLUMNS", 32)
    monkeypatch.setattr(launch, "SCORES_BYTES", 3 * 4 * 3 * 40)
    same(made(), expected)


def test_a_given_width_is_kept():
    means, forced = means_of(5, 10), forced_of(5, 10)
    narrow = top_tiles(*means, 3, forced, backend="torch")
    for backend in BACKENDS:
        same(top_tiles(*means, 3, forced, backend=backend), narrow)
        indices, counts = top_tiles(
            *means, 3, forced[1:].repeat(2, 1)[:5], width=9, backend=backend
        )
        assert indices.shape[-1] == 9 and not indices[..., 8:].any() and counts.max() < 9
    with pytest.raises(ValueError, match="width 3; a list has 10 tiles"):
        top_tiles(*means, 3, forced, width=3, backend="torch")
    # The kernel does not write behind a list that is too short.
    assert top_tiles(*means, 3, forced, width=3, backend="triton")[1].max() == 3


# --- turning lists over ---


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 10), (70, 3)])
def test_turned_over_twice_a_list_is_itself(rows: int, columns: int):
    generator = torch.Generator().manual_seed(rows)
    mask = torch.rand(2, 1, rows, columns, generator=generator) < 0.4
    mask[0, 0, 0] = False
    plan = BlockPlan.from_mask(mask, tile=Tile(1, 1), queries=rows, keys=columns)
    plan.indices[~plan.kept] = 1_000_000
    # In any order.
    shuffled = plan.indices.clone()
    for at in itertools.product(range(2), range(rows)):
        count = int(plan.counts[at[0], 0, at[1]])
        places = torch.randperm(count, generator=generator)
        shuffled[at[0], 0, at[1], :count] = shuffled[at[0], 0, at[1], :count][places]
    there = transposed(shuffled, plan.counts, columns, backend="triton")
    same(there, transposed(shuffled, plan.counts, columns, backend="torch"))
    assert torch.equal(mask_of(there, rows), mask.mT)
    back = transposed(*there, rows, width=plan.indices.shape[-1], backend="triton")
    assert torch.equal(back[1], plan.counts)
    assert torch.equal(back[0], plan.indices.masked_fill(~plan.kept, 0))


# --- who does it ---


@pytest.mark.parametrize(
    "method",
    [TopBlocks(keep=0.4, tile="64x64"), ThresholdBlocks(tile="64x64")],
    ids=lambda it: it.name,
)
def test_a_method_makes_the_same_plan_with_the_kernels(
    method: AttentionMethod, monkeypatch: pytest.MonkeyPatch
):
    site = Site(TokenGrid(3, 7, 11), layer=0, layers=1, step=0, steps=1, text=9)
    q, k = tokens_of(site.tokens, 16), tokens_of(site.tokens + 1, 16)[:, :, 1:]
    expected = method.plan(q, k, site)
    made: list[bool] = []
    monkeypatch.setattr(launch, "takes", lambda *_, **__: made.append(True) or True)  # pyright: ignore
    got = method.plan(q, k, site)
    assert isinstance(got, BlockPlan) and isinstance(expected, BlockPlan) and len(made) == 2
    same((got.indices, got.counts), (expected.indices, expected.counts))


def test_torch_is_chosen_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    x = tokens_of(40, 16)
    for name in ("means", "choose", "permuted", "transposed"):
        monkeypatch.setattr(launch, name, None)
    indices, counts = top_tiles(tile_means(x, 16), tile_means(x, 16), 2)
    assert transposed(indices, counts, 3)[1].sum() == counts.sum()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="CUDA devices, the tensors are on cpu"):
        tile_means(x, 16, backend="triton")


def test_gradients_are_left_to_torch():
    x = tokens_of(20, 8).contiguous().requires_grad_()
    tile_means(x, 16).sum().backward()
    assert x.grad is not None
    shares = torch.tensor([1 / 16] * 16 + [1 / 4] * 4)
    torch.testing.assert_close(x.grad, shares[:, None].expand_as(x))
    with pytest.raises(ValueError, match="no backward pass"):
        tile_means(x, 16, backend="triton")


Q, K = means_of(3, 5)
X, LISTS = tokens_of(20, 8), torch.zeros(1, 1, 3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: tile_means(X, 0), "size 0"),
        (lambda: tile_means(X[0], 4), "x (3, 20, 8)"),
        (lambda: tile_means(X.long(), 4), "x torch.int64"),
        (lambda: tile_means(X, 4, torch.arange(19)), "order (19,)"),
        (lambda: tile_means(X, 4, torch.arange(20).int()), "order (20,) torch.int32"),
        (lambda: tile_means(X.double(), 4, backend="triton"), "not torch.float64"),
        (lambda: tile_means(X, 4, backend="cuda"), "backend 'cuda'; there are torch, triton"),  # pyright: ignore
        (lambda: pair_means(X, X[:, :1], Tile(4, 4)), "k (2, 1, 20, 8)"),
        (lambda: permuted(X, torch.arange(21)), "order (21,)"),
        (lambda: top_tiles(Q, K, 0), "count 0; it must be 1 to 5"),
        (lambda: top_tiles(Q, K, 6), "count 6"),
        (lambda: top_tiles(Q, K, 2, width=1), "width 1; it must be 2 to 5"),
        (lambda: top_tiles(Q.double(), K, 2), "means_q torch.float64"),
        (lambda: top_tiles(Q[:, :1], K, 2), "means_q (1, 1, 3, 20)"),
        (lambda: top_tiles(Q, K, 2, torch.ones(3, 4, dtype=torch.bool)), "forced (3, 4)"),
        (lambda: top_tiles(Q, K, 2, torch.ones(3, 5)), "forced (3, 5) torch.float32"),
        (lambda: mass_tiles(Q, K, 0.0, 1.0), "mass 0.0"),
        (lambda: mass_tiles(Q, K, 1.1, 1.0), "mass 1.1"),
        (lambda: mass_tiles(Q, K, 0.5, math.inf), "scale inf"),
        (lambda: mass_tiles(Q, K, 0.5, 1.0, most=0), "most 0"),
        (lambda: mass_tiles(Q, K, 0.5, 1.0, last=0), "last 0"),
        (lambda: above_tiles(Q, K, math.inf), "beta inf"),
        (lambda: above_tiles(Q, K[..., :5], 0.0), "means_k (1, 2, 5, 5)"),
        (lambda: transposed(LISTS, LISTS, 5), "counts (1, 1, 3, 2)"),
        (lambda: transposed(LISTS.long(), LISTS[..., 0], 5), "indices torch.int64"),
        (lambda: transposed(LISTS, LISTS[..., 0], 0), "columns 0"),
        (lambda: transposed(LISTS, LISTS[..., 0], 5, width=4), "width 4"),
        (lambda: transposed(LISTS, LISTS[..., 0], 2**15, backend="triton"), "not 32768"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], object], told: str):
    with pytest.raises(ValueError) as caught:
        call()
    assert told in str(caught.value)
