"""Plans with means of everything: ASA_G as its authors compute it, kept tokens counted twice."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile

TILE = Tile(16, 16)
TOKENS = 45


def case(
    means: int,
    order: str = "shared",
    *,
    dtype: torch.dtype = torch.float64,
    share: float = 0.4,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], BlockPlan]:
    """q, k, v `[2, 3, 45, 8]` and a plan of random tiles, perhaps none in a row."""
    generator = torch.Generator().manual_seed(means)
    q, k, v = torch.randn(3, 2, 3, TOKENS, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 3, 3, 3, generator=generator) < share
    places = torch.rand(2, 3, TOKENS, generator=generator).argsort(-1)
    plan = BlockPlan.from_mask(
        mask, tile=TILE, queries=TOKENS, keys=TOKENS,
        order={"none": None, "shared": places[0, 0], "by head": places}[order],
    )  # fmt: skip
    return (q.to(dtype), k.to(dtype), v.to(dtype)), dataclasses.replace(plan, means=means)


def literal(
    tensors: tuple[torch.Tensor, ...], plan: BlockPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the tokens of kept tiles and all means, written down; any gradients."""
    q, k, v = tensors
    order = torch.arange(TOKENS) if plan.order is None else plan.order
    order = order.expand(2, 3, TOKENS)[..., None].expand_as(q)
    q, k, v = (x.gather(2, order) for x in (q, k, v))
    mask = plan.mask().expand(2, 3, -1, -1)
    mask = mask.repeat_interleave(16, 2)[:, :, :TOKENS].repeat_interleave(16, 3)[..., :TOKENS]
    groups = torch.arange(TOKENS).split(plan.means)
    keys, values = (torch.stack([x[:, :, it].mean(2) for it in groups], 2) for x in (k, v))
    sizes = torch.tensor([len(it) for it in groups], dtype=q.dtype)
    near = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    logits = torch.cat([near, q @ keys.mT * scale + sizes.log()], -1)
    out = logits.softmax(-1) @ torch.cat([v, values], 2)
    lse = logits.logsumexp(-1)
    return torch.zeros_like(out).scatter(2, order, out), torch.zeros_like(lse).scatter(
        2, order[..., 0], lse
    )


@pytest.mark.parametrize("means", [1, 4, 15, 45, 100])
@pytest.mark.parametrize("order", ["none", "shared", "by head"])
def test_it_is_one_softmax_over_kept_tokens_and_all_means(means: int, order: str):
    tensors, plan = case(means, order)
    found = block_attention(*tensors, plan, scale=0.4)
    for one, other in zip(found, literal(tensors, plan, 0.4), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("means", [5, 15])
def test_it_is_the_two_attentions_that_the_authors_join(means: int):
    (q, k, v), plan = case(means, "none")
    fine, lse = block_attention(q, k, v, dataclasses.replace(plan, means=0))
    keys, values = (x.unflatten(2, (-1, means)).mean(3) for x in (k, v))
    logits = q @ keys.mT / math.sqrt(8)
    coarse = logits.softmax(-1) @ values
    weight = (lse - logits.logsumexp(-1) - math.log(means)).sigmoid()[..., None]
    found, _ = block_attention(q, k, v, plan)
    torch.testing.assert_close(found, weight * fine + (1 - weight) * coarse)


@pytest.mark.parametrize("order", ["shared", "by head"])
def test_gradients_are_those_of_the_definition(order: str):
    tensors, plan = case(7, order)
    leaves = q, k, v = [x.clone().requires_grad_() for x in tensors]
    others = [x.clone().requires_grad_() for x in tensors]
    results = block_attention(q, k, v, plan, scale=0.4), literal(tuple(others), plan, 0.4)
    for out, lse in results:
        (out.square().sum() + lse.sin().sum()).backward()
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_kernels_agree_with_gradients(backend: str):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1000, 64, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 2, 8, 8, generator=generator) < 0.4
    order = torch.rand(1000, generator=generator).argsort()
    plan = BlockPlan.from_mask(mask, tile=Tile(128, 128), queries=1000, keys=1000, order=order)
    plan = dataclasses.replace(plan, means=30)
    exact = [x.bfloat16().double().requires_grad_() for x in (q, k, v)]
    fast = [x.bfloat16().cuda().requires_grad_() for x in (q, k, v)]
    expected, _ = block_attention(exact[0], exact[1], exact[2], plan)
    found, _ = block_attention(fast[0], fast[1], fast[2], plan.to("cuda"), backend=backend)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0.02, atol=0.02)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (expected * weight).sum().backward()
    (found * weight.to(found)).sum().backward()
    for one, other in zip(fast, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        off = (one.grad.double().cpu() - other.grad).norm() / other.grad.norm()
        assert off < 0.02


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(backend: str, dtype: torch.dtype):
    tensors, plan = case(7, dtype=dtype)
    expected, lse = literal(tuple(x.double() for x in tensors), plan, 8**-0.5)
    found, found_lse = block_attention(*tensors, plan, backend=backend)
    off = 1e-5 if dtype == torch.float32 else 0.02
    assert found.dtype == dtype and found_lse.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=off, atol=off)
    torch.testing.assert_close(found_lse.double(), lse, rtol=off, atol=off)


def test_with_everything_kept_it_is_not_dense_but_nearly_so_of_means_that_say_all():
    (q, k, v), plan = case(9, "none")
    whole = dataclasses.replace(
        BlockPlan.dense(tile=TILE, queries=TOKENS, keys=TOKENS), means=plan.means
    )
    dense = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    assert (block_attention(q, k, v, whole)[0] - dense).norm() > 0.05 * dense.norm()
    # Keys and values that are alike in each mean: counted twice, every share stays what it was.
    k, v = (x.unflatten(2, (-1, 9)).mean(3).repeat_interleave(9, 2) for x in (k, v))
    dense = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    torch.testing.assert_close(block_attention(q, k, v, whole)[0], dense)


@pytest.mark.parametrize("run", [block_attention, torch.compile(block_attention, backend="eager")])
def test_a_row_that_keeps_nothing_has_its_means(run: Any, monkeypatch: pytest.MonkeyPatch):
    """Also where numbers are looked at."""
    torch.compiler.reset()
    monkeypatch.setenv("KINORA_CHECK", "1")
    tensors, plan = case(5, share=0.0)
    plan.check()
    out, lse = run(*tensors, plan, scale=0.4)
    torch.testing.assert_close(out, literal(tensors, plan, 0.4)[0])
    assert lse.isfinite().all()


def test_joining_loses_no_more_than_attention_itself():
    """In bfloat16, against float64: what is kept and the means are added up before rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1024, 64, generator=generator).bfloat16()
    mask = torch.rand(1, 2, 8, 16, generator=generator) < 0.3
    mask[..., 0] = True
    near = BlockPlan.from_mask(mask, tile=Tile(128, 64), queries=1024, keys=1024)
    errors: list[float] = []
    for plan in (near, dataclasses.replace(near, means=64)):
        exact, _ = block_attention(q.double(), k.double(), v.double(), plan)
        out, _ = block_attention(q, k, v, plan)
        errors.append(float((out.double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.25 * errors[0]


def test_compiled_it_is_the_same_without_a_break():
    torch.compiler.reset()
    tensors, plan = case(7)

    def run(q: Any, k: Any, v: Any, plan: BlockPlan) -> Any:
        return block_attention(q * 1, k, v, plan)

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors, plan)
    torch.testing.assert_close(found, block_attention(*tensors, plan))


@pytest.mark.parametrize("order", ["none", "shared"])
def test_compiled_it_is_the_same_in_half_precision(order: str):
    torch.compiler.reset()
    tensors, plan = case(7, order, dtype=torch.bfloat16)
    found = torch.compile(block_attention, fullgraph=True, backend="aot_eager")(*tensors, plan)
    torch.testing.assert_close(found, block_attention(*tensors, plan))


@pytest.mark.parametrize("changes", [{"means": -1}, {"means": 4, "tail": "complement"}])
def test_what_does_not_fit_is_refused(changes: dict[str, Any]):
    _, plan = case(4)
    with pytest.raises(ValueError, match="they need 1 or more and none"):
        dataclasses.replace(plan, **changes)
