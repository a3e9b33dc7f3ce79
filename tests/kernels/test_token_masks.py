"""Masks of tokens within tiles; `test_any_plan.py` has the numbers of every backend."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from kinora.kernels import bits
from kinora.kernels.attention import block_attention
from kinora.kernels.backends import choose, refuses
from kinora.kernels.plan import BlockPlan, Tile, tiles_of
from kinora.kernels.problem import Problem

TILES = [Tile(16, 16), Tile(16, 32), Tile(32, 64), Tile(4, 40)]


def _tensors(queries: int = 40, keys: int = 53, **given: Any) -> tuple[torch.Tensor, ...]:
    """q, k, v `[2, 3, L, 8]`."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, 3, tokens, 8, generator=generator, **given)
        for tokens in (queries, keys, keys)
    )


def _mask(*shape: int, share: float = 0.3, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_bits_are_packed_and_back(count: int):
    given = _mask(2, 3, count, share=0.5)
    words = bits.pack(given)
    assert words.shape == (2, 3, bits.words_of(count)) and words.dtype == torch.int32
    assert torch.equal(bits.unpack(words, count), given)
    assert torch.equal(bits.ones(words).sum(-1), given.sum(-1))
    for c in range(count):
        one = torch.zeros(count, dtype=torch.bool)
        one[c] = True
        word = [int(it) % 2**32 for it in bits.pack(one)]
        assert word == [2 ** (c % 32) if i == c // 32 else 0 for i in range(len(word))]


def test_the_first_bits_are_set():
    counts = torch.arange(70)
    found = bits.unpack(bits.first(counts, 3), 96)
    assert torch.equal(found, torch.arange(96) < counts[:, None])
    assert torch.equal(bits.ones(bits.first(counts, 3)).sum(-1), counts)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_a_mask_of_tokens_is_softmax_with_that_mask(shape: tuple[int, int], tile: Tile):
    """In float64, written out; a query without a key gets 0 and minus infinity."""
    q, k, v = _tensors(dtype=torch.float64)
    mask = _mask(*shape, 40, 53)
    mask[:, :, 7] = False
    plan = BlockPlan.from_tokens(mask, tile=tile)
    assert torch.equal(plan.token_mask(), mask)
    torch.testing.assert_close(plan.density(), mask.float().mean((2, 3)))
    some = torch.tensor([3, 39, 7])
    assert torch.equal(plan.token_mask(some), mask[:, :, some])
    out, lse = block_attention(q, k, v, plan)
    logits = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, logits.softmax(-1).nan_to_num(0) @ v)
    assert not out[:, :, 7].any() and bool((lse[:, :, 7] == -torch.inf).all())


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_mask_by_tile_needs_no_bits_and_bits_that_are_all_set_change_nothing(tile: Tile):
    q, k, v = _tensors(dtype=torch.float64)
    tiles = _mask(2, 3, tiles_of(40, tile.query), tiles_of(53, tile.key), share=0.5)
    plain = BlockPlan.from_mask(tiles, tile=tile, queries=40, keys=53)
    plan = BlockPlan.from_tokens(plain.token_mask(), tile=tile)
    assert plan.within is None and torch.equal(plan.indices, plain.indices)
    shape = (*plain.indices.shape, tile.query, bits.words_of(tile.key))
    masked = dataclasses.replace(plain, within=torch.full(shape, -1, dtype=torch.int32))
    assert torch.equal(masked.density(), plain.density())
    assert torch.equal(masked.mask(), plain.mask())
    assert torch.equal(masked.token_mask(), plain.token_mask())
    for got, expected in zip(
        block_attention(q, k, v, masked), block_attention(q, k, v, plain), strict=True
    ):
        assert torch.equal(got, expected)


def test_what_does_not_count_is_ignored():
    """Bits of entries behind the count, and of queries and keys behind the last."""
    mask = _mask(2, 3, 40, 53)
    plan = BlockPlan.from_tokens(mask, tile=Tile(16, 64))
    assert plan.within is not None
    density = plan.density()
    plan.within[:, :, -1, :, 8:] = -1
    plan.within[..., 1] |= -1 << (53 - 32)
    assert torch.equal(plan.density(), density) and torch.equal(plan.token_mask(), mask)


def test_density_of_more_pairs_than_a_float_can_count():
    plan = BlockPlan.from_tokens(_mask(1, 1, 4099, 4099, share=0.7), tile=Tile(64, 128))
    exact = int(_mask(1, 1, 4099, 4099, share=0.7).sum()) / 4099**2
    assert float(plan.density()) == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_orders_biases_and_backends(shape: tuple[int, int], backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = _tensors()
    generator = torch.Generator().manual_seed(3)
    orders = torch.randperm(40, generator=generator), torch.randperm(53, generator=generator)
    mask = _mask(*shape, 40, 53, share=0.1)
    plan = BlockPlan.from_tokens(mask, tile=Tile(16, 16), order=orders[0], key_order=orders[1])
    plan = dataclasses.replace(plan, bias=torch.full(plan.indices.shape, 0.5))
    out, lse = block_attention(q, k, v, plan, backend=backend)
    back = mask[:, :, orders[0].argsort()][..., orders[1].argsort()]
    logits = ((q @ k.mT).double() * 8**-0.5 + 0.5).masked_fill(~back, -torch.inf)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-5)
    weights = logits.softmax(-1).nan_to_num(0)
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_tiles_that_are_attended_to_whole_have_no_masks(shape: tuple[int, int], backend: str):
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = _tensors(64, 83)
    tiles = _mask(*shape, 4, 6, share=0.6).repeat_interleave(16, 2).repeat_interleave(16, 3)
    mask = tiles[..., :83]
    mask[..., :20, 5:40] &= _mask(*shape, 20, 35, share=0.5)
    mask[..., 40, :32] = False
    mask[..., 0] = True
    plan = BlockPlan.from_tokens(mask, tile=Tile(16, 16))
    plan.check()
    assert plan.within is not None and plan.within.shape[3] < plan.indices.shape[3]
    assert torch.equal(plan.token_mask(), mask)
    torch.testing.assert_close(plan.density(), mask.float().mean((2, 3)))
    out, lse = block_attention(q, k, v, plan, backend=backend)
    logits = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, logits.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_whole_numbers_elsewhere(precision: Any, backend: Any):
    if backend == "triton":
        pytest.importorskip("triton")
    from kinora.kernels.precision import Precision

    q, k, v = _tensors()
    plan = BlockPlan.from_tokens(_mask(1, 1, 40, 53), tile=Tile(16, 32))
    given = Precision(precision, "input")
    got = block_attention(q, k, v, plan, precision=given, backend=backend)
    expected = block_attention(q, k, v, plan, precision=given, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk_bytes", [1, 50_000, 2**25])
def test_chunks_of_any_size_give_the_same(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch):
    q, k, v = _tensors(130, 130)
    plan = BlockPlan.from_tokens(_mask(2, 1, 130, 130), tile=Tile(16, 16))
    expected = block_attention(q, k, v, plan, backend="reference")
    monkeypatch.setattr("kinora.kernels.cpu.GATHERED_BYTES", chunk_bytes)
    monkeypatch.setattr("kinora.kernels.reference.LOGITS_BYTES", chunk_bytes)
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(block_attention(q, k, v, plan, backend=backend), expected)


def test_gradients_are_those_of_the_written_out_softmax():
    q, k, v = (x.requires_grad_() for x in _tensors(dtype=torch.float64))
    mask = _mask(2, 3, 40, 53)
    mask[:, :, 7] = False
    plan = BlockPlan.from_tokens(mask, tile=Tile(16, 32))
    assert choose(Problem.of(q, k, v, plan)) == "reference"
    out, lse = block_attention(q, k, v, plan)
    made = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
    got = torch.autograd.grad(made, (q, k, v))
    rows = torch.arange(40) != 7
    logits = (q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf)[:, :, rows]
    exact = (logits.softmax(-1) @ v).square().sum() + logits.logsumexp(-1).sin().sum()
    torch.testing.assert_close(got, torch.autograd.grad(exact, (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_whole_with_gradients(dtype: torch.dtype):
    """One graph, and numbers and gradients of what runs uncompiled."""
    torch.compiler.reset()
    run: Any = torch.compile(block_attention, fullgraph=True, backend="aot_eager")
    functions: list[Any] = [run, block_attention]
    for seed in (1, 2):
        plan = BlockPlan.from_tokens(_mask(2, 3, 40, 53, seed=seed), tile=Tile(16, 32))
        tensors = _tensors(dtype=dtype)
        torch.testing.assert_close(*(function(*tensors, plan) for function in functions))
        found: list[tuple[torch.Tensor, ...]] = []
        for function in functions:
            leaves = [x.clone().requires_grad_() for x in tensors]
            out, lse = function(*leaves, plan)
            found.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
        torch.testing.assert_close(found[0], found[1])


def test_what_must_be_refused_has_a_reason():
    q, k, v = _tensors()
    plan = BlockPlan.from_tokens(_mask(2, 3, 40, 53), tile=Tile(64, 64))
    problem = Problem.of(q, k, v, plan)
    assert problem.masked and choose(problem) == "cpu"
    on_gpu = dataclasses.replace(problem, device="cuda", head_dim=64, dtype=torch.bfloat16)
    pytest.importorskip("triton")
    assert refuses(on_gpu, "triton") is None
    for backend in ("triton", "hopper"):
        reason = refuses(dataclasses.replace(on_gpu, requires_grad=True), backend)
        assert reason == (
            "it has no backward pass of masks of tokens within tiles; the reference has"
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"within": torch.zeros(1, 1, 2, 1, 4, 2, dtype=torch.int32)},
            "[1, 1, 2, 1 to 1, 4, 1] of",
        ),
        ({"within": torch.zeros(1, 1, 2, 1, 4, 1)}, "of torch.float32; [1, 1, 2, 1 to 1, 4, 1] of"),
        ({"within": torch.zeros(1, 1, 2, 2, 4, 1, dtype=torch.int32)}, "4 queries by 1 words"),
        ({"within": torch.zeros(1, 1, 2, 0, 4, 1, dtype=torch.int32)}, "4 queries by 1 words"),
        ({"tail": "complement"}, "with tail complement and means of 0"),
        ({"means": 4}, "with tail none and means of 4"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], told: str):
    plan = BlockPlan(
        torch.zeros(1, 1, 2, 1, dtype=torch.int32),
        torch.ones(1, 1, 2, dtype=torch.int32),
        Tile(4, 4),
        8,
        8,
        within=torch.full((1, 1, 2, 1, 4, 1), 15, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        dataclasses.replace(plan, **changes)


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 4, 4), torch.zeros(4, 4, dtype=torch.bool)])
def test_a_mask_of_another_kind_is_refused(mask: torch.Tensor):
    with pytest.raises(ValueError, match=re.escape("[B or 1, H or 1, queries, keys] of torch")):
        BlockPlan.from_tokens(mask, tile=Tile(4, 4))


def test_looked_at_a_query_without_a_key_is_refused():
    mask = _mask(1, 1, 40, 53)
    BlockPlan.from_tokens(mask, tile=Tile(16, 32)).check()
    mask[:, :, [3, 39]] = False
    with pytest.raises(ValueError, match="within leaves 2 queries without a key"):
        BlockPlan.from_tokens(mask, tile=Tile(16, 32)).check()


def test_it_goes_along_where_plans_go():
    plan = BlockPlan.from_tokens(_mask(2, 3, 40, 53), tile=Tile(16, 32))
    assert plan.within is not None
    twice = plan.repeated(2)
    assert torch.equal(twice.token_mask(), plan.token_mask().repeat(2, 1, 1, 1))
    elsewhere = plan.to("meta")
    assert elsewhere.within is not None and elsewhere.within.device.type == "meta"
