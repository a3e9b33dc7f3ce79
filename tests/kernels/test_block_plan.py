"""Plans: what they keep, how dense they are, what they refuse."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile, tile_lengths, tiles_of


class Ops(TorchDispatchMode):
    """Names of the operators that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _mask(*shape: int, share: float = 0.4, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_tiles_cover_all_tokens_once(tokens: int):
    lengths = tile_lengths(tokens, 16)
    assert len(lengths) == tiles_of(tokens, 16)
    assert int(lengths.sum()) == tokens and int(lengths.min()) >= 1


def test_mask_and_plan_are_inverse():
    mask = _mask(2, 3, 4, 7)
    plan = BlockPlan.from_mask(mask, tile=Tile(8, 4), queries=30, keys=27)
    assert torch.equal(plan.mask(), mask)
    assert torch.equal(plan.counts, mask.sum(-1, dtype=torch.int32))
    assert plan.indices.shape[-1] == int(mask.sum(-1).max())


def test_kept_tiles_stand_in_rising_order():
    plan = BlockPlan.from_mask(_mask(1, 2, 5, 9), tile=Tile(4, 4), queries=20, keys=36)
    for row, count in zip(plan.indices.flatten(0, 2), plan.counts.flatten(), strict=True):
        kept = row[:count].tolist()
        assert kept == sorted(set(kept))


def test_a_list_is_made_of_a_mask_without_a_sort_and_waits_for_the_device_once():
    with Ops() as ops:
        BlockPlan.from_mask(_mask(2, 3, 4, 7), tile=Tile(8, 4), queries=32, keys=28)
    assert not [name for name in ops.names if "sort" in name]
    assert ops.names.count("aten::_local_scalar_dense") == 1


def test_what_does_not_count_is_ignored():
    plan = BlockPlan.from_mask(_mask(1, 1, 4, 7), tile=Tile(8, 4), queries=32, keys=28)
    mask, density = plan.mask(), plan.density()
    plan.indices[~plan.kept] = 1_000_000
    assert torch.equal(plan.mask(), mask) and torch.equal(plan.density(), density)


@pytest.mark.parametrize(("queries", "keys"), [(32, 28), (30, 27), (25, 26)])
def test_density_counts_pairs_of_valid_tokens(queries: int, keys: int):
    mask = _mask(2, 3, 4, 7)
    plan = BlockPlan.from_mask(mask, tile=Tile(8, 4), queries=queries, keys=keys)
    by_token = mask.repeat_interleave(8, 2)[:, :, :queries].repeat_interleave(4, 3)[..., :keys]
    torch.testing.assert_close(plan.density(), by_token.float().mean(dim=(2, 3)))


def test_dense_is_dense():
    plan = BlockPlan.dense(tile=Tile(8, 4), queries=30, keys=27)
    assert plan.density().tolist() == [[1.0]] and bool(plan.mask().all())


def test_a_row_may_keep_nothing():
    plan = BlockPlan.from_mask(
        torch.zeros(1, 1, 2, 3, dtype=torch.bool), tile=Tile(4, 4), queries=8, keys=12
    )
    assert plan.counts.tolist() == [[[0, 0]]] and float(plan.density()) == 0


def _plan(**changes: object) -> BlockPlan:
    fields: dict[str, object] = {
        "indices": torch.zeros(1, 1, 2, 1, dtype=torch.int32),
        "counts": torch.ones(1, 1, 2, dtype=torch.int32),
        "tile": Tile(4, 4),
        "queries": 8,
        "keys": 8,
    }
    return BlockPlan(**(fields | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"queries": 9}, "[B or 1, H or 1, 3, width] is needed"),
        ({"indices": torch.zeros(1, 1, 2, 1)}, "must be int32"),
        ({"counts": torch.ones(1, 2, 2, dtype=torch.int32)}, "do not fit indices"),
        ({"bias": torch.zeros(1, 1, 2, 3)}, "bias (1, 1, 2, 3) does not fit"),
        ({"bias": torch.zeros(1, 1, 2, 1, dtype=torch.int64)}, "bias torch.int64; a floating"),
        ({"tail": "pooled"}, "none or complement"),
        ({"order": torch.arange(8, dtype=torch.int32)}, "int64, not torch.int32"),
        ({"key_order": torch.arange(8.0)}, "int64, not torch.float32"),
        ({"order": torch.arange(7)}, "one permutation of both"),
        (
            {"order": torch.arange(7), "key_order": torch.arange(8)},
            "one permutation of the queries",
        ),
        ({"key_order": torch.arange(7)}, "a key_order of (7,) tokens for 8 keys"),
        ({"key_order": torch.zeros(1, 8)}, "a key_order of (1, 8) tokens for 8 keys"),
        ({"keys": 12, "order": torch.arange(8)}, "one permutation of both"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], told: str):
    _plan()
    with pytest.raises(ValueError, match=re.escape(told)):
        _plan(**changes)


def test_a_mask_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=re.escape("[B or 1, H or 1, 4, 7] of torch.bool")):
        BlockPlan.from_mask(_mask(1, 1, 4, 6), tile=Tile(8, 4), queries=32, keys=28)


def test_a_tile_needs_tokens():
    with pytest.raises(ValueError, match="at least one"):
        Tile(0, 4)


def _row(entries: list[int], count: int, order: list[int] | None = None) -> BlockPlan:
    """One row of queries over 4 tiles of 8 keys, the last of them ragged."""
    return BlockPlan(
        indices=torch.tensor(entries, dtype=torch.int32)[None, None, None],
        counts=torch.full((1, 1, 1), count, dtype=torch.int32),
        tile=Tile(32, 8),
        queries=30,
        keys=30,
        order=None if order is None else torch.tensor(order),
    )


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (_row([0, 4], 2), "indices hold 4; 30 keys in tiles of 8 are tiles 0 to 3"),
        (_row([-1, 2], 2), "indices hold -1"),
        (_row([2, 2], 2), "indices hold a tile twice in one row"),
        (_row([0, 1], 3), "counts 3 to 3; lists of 2 have 0 to 2 entries"),
        (_row([0, 1], -1), "counts -1 to -1"),
        (_row([0, 1], 0), "counts 0 in 1 rows; their queries would attend to nothing"),
        (_row([0, 1], 2, [0] * 30), "order is no permutation of 0 to 29"),
        (
            dataclasses.replace(_row([0, 1], 2), key_order=torch.ones(1, 1, 30, dtype=torch.int64)),
            "key_order is no permutation of 0 to 29",
        ),
    ],
)
def test_numbers_that_are_refused_when_looked_at(
    plan: BlockPlan, told: str, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match=re.escape(told)):
        plan.check()
    monkeypatch.setenv("KINORA_CHECK", "1")
    q = torch.zeros(1, 1, 30, 8)
    with pytest.raises(ValueError, match=re.escape(told)):
        block_attention(q, q, q, plan)


def test_numbers_that_are_right():
    _row([3, 1, 77], 2, list(reversed(range(30)))).check()  # what does not count is not looked at
    dataclasses.replace(_row([0], 0), tail="complement").check()
