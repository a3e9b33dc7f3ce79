"""Orders of queries and of keys in a plan: permutations before attention and back after."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile, tiles_of

TILE = Tile(16, 8)


def _tensors(keys: int = 40) -> tuple[torch.Tensor, ...]:
    """q, k, v `[2, 3, L, 8]`; of 40 queries."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64)
        for tokens in (40, keys, keys)
    )


def _plan(keys: int = 40) -> BlockPlan:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 3, tiles_of(40, 16), tiles_of(keys, 8), generator=generator) < 0.4
    return BlockPlan.from_mask(mask, tile=TILE, queries=40, keys=keys, tail="complement")


def test_an_order_is_a_permutation_before_and_back_after():
    q, k, v = _tensors()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    plan = _plan()
    out, lse = block_attention(q, k, v, dataclasses.replace(plan, order=order))
    moved, moved_lse = block_attention(q[:, :, order], k[:, :, order], v[:, :, order], plan)
    torch.testing.assert_close(out[:, :, order], moved)
    torch.testing.assert_close(lse[:, :, order], moved_lse)


@pytest.mark.parametrize("shape", [(), (1, 3), (2, 1), (2, 3)])
def test_keys_may_have_an_order_of_their_own(shape: tuple[int, ...]):
    """Of any number, beside one of the queries or none; which tiles are kept refers to both."""
    keys = 53
    q, k, v = _tensors(keys)
    generator = torch.Generator().manual_seed(3)
    by_key = torch.rand(*shape, keys, generator=generator).argsort(-1)
    at = by_key.expand(*k.shape[:2], -1)[..., None].expand_as(k)
    plan = _plan(keys)
    for order in (None, torch.randperm(40, generator=generator)):
        ordered = dataclasses.replace(plan, order=order, key_order=by_key)
        ordered.check()
        got = block_attention(q, k, v, ordered)
        places = torch.arange(40) if order is None else order
        moved = block_attention(q[:, :, places], k.gather(2, at), v.gather(2, at), plan)
        for one, other in zip(got, moved, strict=True):
            torch.testing.assert_close(one[:, :, places], other)
    with pytest.raises(ValueError, match="the plan's key_order has B = 3, the tensors 2"):
        wrong = by_key.expand(3, 1, -1) if not shape else by_key[:1, :1].expand(3, 1, -1)
        block_attention(q, k, v, dataclasses.replace(plan, key_order=wrong))


@pytest.mark.parametrize("order", ["one", "by head", "none"])
def test_everything_kept_is_dense_attention_in_any_order_of_keys(order: str):
    q, k, v = _tensors()
    generator = torch.Generator().manual_seed(4)
    plan = dataclasses.replace(
        BlockPlan.dense(tile=TILE, queries=40, keys=40),
        order=None if order == "none" else torch.randperm(40, generator=generator),
        key_order=torch.rand(*(2, 3) if order == "by head" else (), 40, generator=generator)
        .argsort(-1),
    )  # fmt: skip
    out, lse = block_attention(q, k, v, plan)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
