"""Block attention at its edges: what is refused, weighs nothing or is broken."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch

from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tail, Tile

TILE = Tile(16, 8)
TAILS: tuple[Tail, ...] = ("none", "complement")
ANYWHERE = ("cpu", "reference")
"""Backends that need no GPU. `test_triton.py` has the same of Triton's."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(tokens: int = 40, *, dtype: torch.dtype = torch.float64) -> Tensors:
    """q, k, v `[2, 3, L, 8]`."""
    q, k, v = torch.randn(
        3, 2, 3, tokens, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    return q, k, v


def plan_of(mask: torch.Tensor, tokens: int = 40) -> BlockPlan:
    """The plan that keeps the tiles that are true in `mask`."""
    return BlockPlan.from_mask(mask, tile=TILE, queries=tokens, keys=tokens)


def some() -> torch.Tensor:
    """A mask of about half of the tiles of 40 tokens, in 2 x 3 heads."""
    return torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tokens", [40, 1200])
def test_a_bias_of_minus_infinity_leaves_a_tile_out(tokens: int, tail: Tail, backend: str):
    """The first query tile loses all of its tiles, the second all but one."""
    q, k, v = tensors(tokens, dtype=torch.float32)
    plan = BlockPlan.dense(tile=TILE, queries=tokens, keys=tokens)
    bias = torch.zeros(plan.indices.shape)
    bias[:, :, 0] = bias[:, :, 1, :-1] = -torch.inf
    plan = dataclasses.replace(plan, tail=tail, bias=bias)
    out, lse = block_attention(q, k, v, plan, backend=backend)
    left = plan_of(bias == 0, tokens)
    expected = block_attention(q.double(), k.double(), v.double(), left, backend="reference")
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-4, atol=1e-5)
    assert not out[:, :, : TILE.query].any()
    assert bool((lse[:, :, : TILE.query] == -torch.inf).all())


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["keys", "values"])
def test_what_is_left_out_may_be_broken(whose: str, broken: float, backend: str):
    """0 x NaN is NaN: left-out tokens must neither be multiplied by 0 nor fill up short rows."""
    q, k, v = tensors(dtype=torch.float32)
    mask = some()
    mask[..., :2] = False
    mask[0, 0, 1, 0] = True
    plan = plan_of(mask)
    expected, expected_lse = block_attention(q, k, v, plan, backend=backend)
    (k if whose == "keys" else v)[:, :, : 2 * TILE.key] = broken
    out, lse = block_attention(q, k, v, plan, backend=backend)
    sound = torch.ones(2, 3, 40, dtype=torch.bool)
    sound[0, 0, TILE.query : 2 * TILE.query] = False  # they keep a broken tile
    torch.testing.assert_close(out[sound], expected[sound])
    torch.testing.assert_close(lse[sound], expected_lse[sound])
    assert not bool(out[~sound].isfinite().all())


def test_gradients_of_what_keeps_no_broken_value_are_sound():
    plan = plan_of(torch.tensor([False, True, True, False, True]).expand(1, 1, 3, 5))

    def gradients(first_values: float | None) -> tuple[torch.Tensor, ...]:
        q, k, v = tensors()
        if first_values is not None:
            v[:, :, : TILE.key] = first_values
        given = [x.requires_grad_() for x in (q, k, v)]
        out, lse = block_attention(given[0], given[1], given[2], plan)
        return torch.autograd.grad(out.square().sum() + lse.sum(), given)

    torch.testing.assert_close(gradients(torch.nan), gradients(None))


@pytest.mark.parametrize("backend", [None, *ANYWHERE])
@pytest.mark.parametrize("shape", [(0, 3, 40, 8), (2, 0, 40, 8), (2, 3, 0, 8), (2, 3, 40, 0)])
def test_nothing_to_attend_is_refused_with_its_shapes(shape: tuple[int, ...], backend: str | None):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(f"q {shape}, k {shape}, v {shape}; there is")):
        block_attention(x, x, x, plan_of(some()[:1, :1]), backend=backend)


def test_no_key_at_all_is_refused():
    """torch's kernel would end the process."""
    q, k = torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 0, 8)
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    plan = BlockPlan(nothing, nothing[..., 0], tile=TILE, queries=16, keys=0)
    with pytest.raises(ValueError, match="nothing to attend"):
        block_attention(q, k, k, plan)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda q, k, v: (q[0], k, v), "[B, H, L, D] is needed"),
        (lambda q, k, v: (q[0, 0, :, 0], k, v), "[B, H, L, D] is needed"),
        (lambda q, k, v: (q, k[:, :2], v[:, :2]), "B, H and D of all alike"),
        (lambda q, k, v: (q[:, :, :39], k, v), "the plan is for 40 queries and 40 keys"),
        (lambda q, k, v: (q, k.float(), v), "one floating dtype is needed"),
        (lambda q, k, v: (q[:1, :2], k[:1, :2], v[:1, :2]), "the plan has B = 2, the tensors 1"),
        (lambda q, k, v: (q.to("meta"), k, v), "all must be on one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[..., Tensors], told: str):
    q, k, v = change(*tensors())
    with pytest.raises(ValueError, match=re.escape(told)):
        block_attention(q, k, v, plan_of(some()))


@pytest.mark.parametrize("name", ["counts", "order", "key_order", "bias"])
def test_a_plan_of_two_devices_is_refused_by_the_name_of_what_is_elsewhere(name: str):
    plan = plan_of(some())
    parts = {
        "counts": plan.counts,
        "order": torch.arange(40),
        "key_order": torch.arange(40),
        "bias": torch.zeros(plan.indices.shape),
    }
    elsewhere = {name: parts[name].to("meta")}
    plan = dataclasses.replace(plan, **elsewhere)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"the plan's {name}: on meta, q on cpu; all must be on"):
        block_attention(*tensors(), plan)
