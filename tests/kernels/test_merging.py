"""Attention to merged keys: what it computes, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kinora.kernels.merging import KeyMerge, merged_attention

B, H, L, D = 2, 3, 10, 8
# Cells of 4, 3 (a ragged one) and 1 tokens; tokens 8 and 9 are in none.
CELLS = torch.tensor([[1, 0, 2, 3], [5, 4, 6, 5], [7, 7, 7, 7]])


def merge(**changes: Any) -> KeyMerge:
    """Of each head another one: three joining tokens of five, the others alone."""
    others = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    some = list(itertools.combinations(range(5), 3))
    joins = torch.zeros(B, H, 3, 3, dtype=torch.bool)
    alone = torch.empty(B, H, 4, dtype=torch.int64)
    for b, h in itertools.product(range(B), range(H)):
        chosen = some[b * H + h]
        for i in chosen:
            joins[(b, h, *others[i])] = True
        left = [int(CELLS[c, j + 1]) for i, (c, j) in enumerate(others) if i not in chosen]
        alone[b, h] = torch.tensor([*left, 8, 9])
    given: dict[str, Any] = {"cells": CELLS, "joins": joins, "alone": alone, "keys": L}
    return KeyMerge(**{**given, **changes})


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(B, L, H, D, generator=generator, dtype=torch.float64) for _ in "qkv"]
    return [x.to(dtype).transpose(1, 2) for x in made]


def groups(it: KeyMerge, b: int, h: int) -> list[list[int]]:
    """Tokens of each key, written out."""
    found: list[list[int]] = []
    for cell, joins in zip(it.cells.tolist(), it.joins[b, h].tolist(), strict=True):
        found.append([cell[0], *(x for x, yes in zip(cell[1:], joins, strict=True) if yes)])
    return found + [[x] for x in it.alone[b, h].tolist()]


def literal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, it: KeyMerge) -> torch.Tensor:
    """The definition: a key of the mean, once for each of its tokens."""
    out = torch.empty_like(q)
    for b, h in itertools.product(range(B), range(H)):
        keys, values = k[b, h].clone(), v[b, h].clone()
        for group in groups(it, b, h):
            keys[group], values[group] = k[b, h, group].mean(0), v[b, h, group].mean(0)
        out[b, h] = (q[b, h] @ keys.T * D**-0.5).softmax(-1) @ values
    return out


def test_a_merged_key_is_as_good_as_its_mean_in_the_place_of_each_of_its_tokens():
    q, k, v = tensors()
    it = merge()
    it.check()
    expected = literal(q, k, v, it)
    torch.testing.assert_close(merged_attention(q, k, v, it), expected, rtol=0, atol=1e-12)
    assert (expected - scaled_dot_product_attention(q, k, v)).norm() > 0.1
    scaled = merged_attention(q, k, v, it, scale=0.7)
    torch.testing.assert_close(scaled, literal(q * 0.7 * D**0.5, k, v, it))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_identical_tokens_lose_nothing(dtype: torch.dtype, most: float):
    q, k, v = tensors(dtype=dtype)
    it = merge()
    for b, h in itertools.product(range(B), range(H)):
        for group in groups(it, b, h):
            for x in (k, v):
                x[b, h, group] = x[b, h, group[0]].clone()
    dense = scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = merged_attention(q, k, v, it).double() - dense
    assert error.abs().max() < most


def test_nothing_that_joins_is_dense_to_rounding():
    q, k, v = tensors()
    none = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    it = merge(joins=none, alone=torch.tensor([[[0, 2, 3, 4, 6, 8, 9]]]))
    it.check()
    assert it.left == L and float(it.density()) == 1 and (it.sizes() == 1).all()
    torch.testing.assert_close(merged_attention(q, k, v, it), scaled_dot_product_attention(q, k, v))


def test_sizes_are_those_of_the_keys_and_add_up():
    it = merge()
    for b, h in itertools.product(range(B), range(H)):
        assert it.sizes()[b, h].tolist() == [len(group) for group in groups(it, b, h)]
    assert (it.sizes().sum(-1) == L).all()
    assert float(it.density()) == pytest.approx(it.left / L) and it.left == 7
    q, _, _ = tensors()
    means = it.of(q)
    torch.testing.assert_close((means * it.sizes()[..., None]).sum(2), q.sum(2))


def test_keys_of_one_size_need_no_weights():
    every = torch.ones(1, 1, 5, 1, dtype=torch.bool)
    cells = torch.arange(L).view(5, 2)
    it = KeyMerge(cells, every, torch.empty(1, 1, 0, dtype=torch.int64), L)
    it.check()
    assert it.alike and not merge().alike
    q, k, v = tensors()
    keys, values = (x.unflatten(2, (5, 2)).mean(3) for x in (k, v))
    expected = scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(merged_attention(q, k, v, it), expected)


def test_of_a_cell_that_is_filled_up_nothing_counts_twice():
    """A ragged cell has as many places as a whole one, but another size: it needs weights."""
    cells = torch.tensor([[0, 1], [2, 3], [4, 4]])
    joins = torch.tensor([True, True, False])[None, None, :, None]
    it = KeyMerge(cells, joins, torch.empty(1, 1, 0, dtype=torch.int64), 5)
    it.check()
    assert not it.alike and it.sizes().tolist() == [[[2, 2, 1]]]


def test_what_is_no_number_stays_in_its_own_key():
    q, k, v = tensors()
    it = merge()
    stays = int(it.alone[0, 0, 0])
    v[0, 0, stays] = torch.nan
    means = it.of(v)
    assert means[0, 0].isnan().any(-1).sum() == 1 and means[0, 1:].isfinite().all()
    assert merged_attention(q, k, v, it)[0, 1:].isfinite().all()


def test_gradients_are_those_of_the_definition():
    q, k, v = (x.clone().requires_grad_() for x in tensors())
    it = merge()
    weights = torch.randn(B, H, L, D, generator=torch.Generator().manual_seed(3)).double()
    found = torch.autograd.grad((merged_attention(q, k, v, it) * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((literal(q, k, v, it) * weights).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_merge_for_one_item_serves_a_batch_and_repeats():
    q, k, v = tensors()
    whole = merge()
    one = merge(joins=whole.joins[:1], alone=whole.alone[:1])
    assert one.repeated(2).joins.shape[0] == 1  # which serves any batch
    alone = [merged_attention(q[b, None], k[b, None], v[b, None], one) for b in range(B)]
    torch.testing.assert_close(merged_attention(q, k, v, one), torch.cat(alone))
    twice_q, twice_k, twice_v = (torch.cat([x, x]) for x in (q, k, v))
    out = merged_attention(twice_q, twice_k, twice_v, whole.repeated(2))
    torch.testing.assert_close(out, torch.cat([merged_attention(q, k, v, whole)] * 2))
    shared = merge(joins=whole.joins[:1, :1], alone=whole.alone[:1, :1])
    one_head = merged_attention(q[:1, 1:2], k[:1, 1:2], v[:1, 1:2], shared)
    torch.testing.assert_close(merged_attention(q, k, v, shared)[:1, 1:2], one_head)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cells": CELLS.int()}, "cells (3, 4) of torch.int32; [C, width] of int64 is needed"),
        ({"cells": CELLS[:, 0]}, "cells (3,)"),
        ({"cells": CELLS[:2]}, "for cells (2, 4); [B or 1, H or 1, 2, 3] of bool is needed"),
        ({"joins": torch.zeros(1, 1, 3, 3)}, "of torch.float32 for cells (3, 4)"),
        ({"alone": torch.zeros(4).long()}, "alone (4,) of torch.int64; [B or 1, H or 1, S]"),
        ({"alone": torch.zeros(1, 1, 4)}, "of torch.float32"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], told: str):
    with pytest.raises(ValueError) as caught:
        merge(**changes)
    assert told in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    q, k, v = tensors()
    for given in ((q[:, :, 1:], k, v), (q, k[:, :1], v), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match=r"\[B, H, 10, D\] is needed of each"):
            merged_attention(*given, merge())
    with pytest.raises(ValueError, match="joins has H = 2, the tensors 3; 1 or the same"):
        merged_attention(q, k, v, merge(joins=merge().joins[:, :2]))
    wrong = merge(alone=merge().alone.clone().fill_(9))
    merged_attention(q, k, v, wrong)
    monkeypatch.setenv("KINORA_CHECK", "1")
    with pytest.raises(ValueError, match="is not in one key; each must be in just one"):
        merged_attention(q, k, v, wrong)
