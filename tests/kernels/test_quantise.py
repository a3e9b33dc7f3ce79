"""Operands in 8 bits: kernels against their definitions, and what attention loses by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinora.kernels import quantise
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile
from kinora.kernels.precision import INPUT, Precision
from kinora.kernels.reference import as_whole

pytest.importorskip("triton")


def _tensor(tokens: int, dim: int = 32, seed: int = 0) -> torch.Tensor:
    """`[2, 3, tokens, dim]`, strided, with NaN behind the last token."""
    generator = torch.Generator().manual_seed(seed + tokens)
    whole = torch.full((2, tokens + 9, 3, dim), torch.nan)
    whole[:, :tokens] = torch.randn(2, tokens, 3, dim, generator=generator) * 3 + 1
    return whole[:, :tokens].transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 64, 70, 200])
@pytest.mark.parametrize("tile", [32, 64])
def test_whole_numbers_are_the_nearest_steps(tokens: int, tile: int):
    x = _tensor(tokens)
    whole, scale, _ = quantise.whole_numbers(x, tile)
    assert whole.dtype == torch.int8 and int(whole.abs().max()) == 127
    step = scale.repeat_interleave(tile, -1)[..., :tokens, None]
    assert ((whole * step - x).abs() <= step * 0.5001).all()
    torch.testing.assert_close(whole * step, as_whole(x, 127, tile), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dim", [21, 32])
@pytest.mark.parametrize("shared", ["tile", "token", "channel"])
def test_numbers_of_4_bits_lie_two_to_a_byte(tokens: int, dim: int, shared: quantise.Shared):
    x = _tensor(tokens, dim)
    packed, scale, _ = quantise.whole_numbers(x, 32, bits=4, shared=shared)
    assert packed.shape == (2, 3, tokens, (dim + 1) // 2)
    low, high = packed << 4 >> 4, packed >> 4
    whole = torch.stack([low, high], -1).flatten(-2)[..., :dim]
    assert int(whole.abs().max()) == 7
    size, by_channel = (1 if shared == "token" else 32), shared == "channel"
    step = scale if by_channel else scale[..., None]
    step = step.repeat_interleave(size, 2)[:, :, :tokens]
    expected = as_whole(x, 7, size, by_channel=by_channel)
    torch.testing.assert_close(whole * step, expected, rtol=0, atol=1e-5)


def test_a_mean_is_taken_away_and_given_back():
    x, parts = _tensor(70), torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(3))
    mean = parts.sum(2)
    whole, scale, _ = quantise.whole_numbers(x, 64, mean=parts)
    expected = as_whole(x - mean[:, :, None], 127, 64)
    step = scale.repeat_interleave(64, -1)[..., :70, None]
    torch.testing.assert_close(whole * step, expected, rtol=0, atol=1e-5)
    _, _, shift = quantise.whole_numbers(x, 64, shift=(parts, 0.25))
    assert shift is not None
    torch.testing.assert_close(shift, (x * mean[:, :, None]).sum(-1) * 0.25, rtol=1e-4, atol=1e-4)


def test_zeros_stay_zeros():
    x = torch.zeros(1, 1, 70, 32)
    whole, scale, _ = quantise.whole_numbers(x, 64)
    assert not whole.any() and not scale.any()
    assert not quantise.eighths(x, torch.zeros(1, 1, 32)).float().any()


@pytest.mark.parametrize("tokens", [1, 70, 1100, 9000])
def test_ranges(tokens: int):
    k, v = _tensor(tokens, 16), _tensor(tokens, 16, seed=5)
    found = quantise.ranges(k, v)
    torch.testing.assert_close(found.scale, v.abs().amax(2) / 448)
    sample = torch.arange(tokens) // quantise.BLOCK % quantise.EVERY == 0
    torch.testing.assert_close(found.mean.sum(2), k[:, :, sample].mean(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [5, 128, 200])
def test_eighths_are_turned_and_put_in_order(tokens: int):
    # Numbers that float8 has: the interpreter rounds others wrongly.
    x = _tensor(tokens).round().clamp(-8, 8) * 2
    got = quantise.eighths(x, torch.full((2, 3, 32), 2.0))
    place = torch.arange(-(-tokens // 128) * 128)
    token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    assert torch.equal(token.sort().values, place)
    padded = torch.nn.functional.pad(x, (0, 0, 0, len(place) - tokens))
    assert torch.equal(got.float() * 2, padded[:, :, token].mT)


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        (Precision("int8"), 0.01),
        (Precision(pv="fp8"), 0.05),
        (Precision("int8", "fp8"), 0.05),
        (Precision(pv="int8"), 0.01),
        (Precision("int4"), 0.15),
        (Precision(pv="int4"), 0.15),
        (Precision("int4", "int4"), 0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("tail", ["none", "complement"])
def test_what_attention_loses(precision: Precision, bound: float, tail: str):
    """Against exact attention; the log-sum-exp has the mean of the keys back."""
    q, k, v = (_tensor(200, 32, seed).double() for seed in range(3))
    mask = torch.rand(2, 3, 2, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    plan = BlockPlan.from_mask(mask, tile=Tile(128, 32), queries=200, keys=200, tail=tail)  # pyright: ignore[reportArgumentType]
    exact, exact_lse = block_attention(q, k, v, plan, scale=0.03)
    out, lse = block_attention(q, k, v, plan, scale=0.03, precision=precision)
    error = float((out - exact).norm() / exact.norm())
    assert 0 < error < bound
    some = exact_lse.isfinite()
    torch.testing.assert_close(
        lse[some], exact_lse[some], rtol=0, atol=0.4 if precision.qk == "int4" else 0.1
    )
    if precision.qk != "input":
        far = block_attention(q, k + 50, v, plan, scale=0.03, precision=precision)
        torch.testing.assert_close(far[0], out, rtol=1e-6, atol=1e-6)
    assert precision != INPUT


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("tail", ["none", "complement"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_cpu_multiplies_the_same_whole_numbers(
    bits: Any, tail: Any, dtype: torch.dtype, most: float
):
    q, k, v = (_tensor(777, 32, seed).to(dtype) for seed in range(3))
    mask = torch.rand(2, 3, 7, 13, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0, 0, 2] = False  # a row without keys, but for the tail
    plan = BlockPlan.from_mask(mask, tile=Tile(128, 64), queries=777, keys=777, tail=tail)
    given = k + 3, v, plan
    out, lse = block_attention(q, *given, precision=Precision(bits), backend="cpu")
    expected, expected_lse = block_attention(
        q, *given, precision=Precision(bits), backend="reference"
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=most, atol=most)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-5)
    plain, _ = block_attention(q, *given, backend="cpu")
    assert float((out - plain).norm() / plain.norm()) > 1e-3


@pytest.mark.parametrize("precision", [Precision("int8"), Precision(pv="fp8")])
def test_gradients_pass_as_if_nothing_were_rounded(precision: Precision):
    """A rounding has no slope: without this, queries, keys and values would learn nothing."""
    found: list[tuple[torch.Tensor, ...]] = []
    for given in (INPUT, precision):
        leaves = [_tensor(70, 16, seed).double().requires_grad_() for seed in range(3)]
        plan = BlockPlan.dense(tile=Tile(64, 32), queries=70, keys=70)
        q, k, v = leaves
        out, lse = block_attention(q, k, v, plan, scale=0.03, precision=given)
        found.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (exact - rounded).norm() / exact.norm() < 0.1
