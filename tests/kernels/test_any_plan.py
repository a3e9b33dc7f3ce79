"""Any plan, drawn by hypothesis: every backend against a softmax with a mask, in float64."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinora.kernels.attention import block_attention
from kinora.kernels.bits import words_of
from kinora.kernels.plan import BlockPlan, Tail, Tile, tile_lengths

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DRAWN = settings(max_examples=60, deadline=None, derandomize=True)
BACKENDS = ("reference", "cpu", *(["triton"] if INTERPRETED else []))

Ordered = Literal["no", "one", "by head"]
ORDERED: tuple[Ordered, ...] = ("no", "one", "by head")


@dataclass(frozen=True)
class Case:
    """Shapes of a call and the seed of its numbers; lists are shared over batch or heads or not."""

    tile: Tile
    queries: int
    keys: int
    batch: int
    heads: int
    dim: int
    shared: tuple[bool, bool]
    share: float
    tail: Tail
    biased: bool
    ordered: Ordered
    keys_ordered: Ordered
    heads_first: bool
    masked: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ragged and single tiles come up on their own; lengths are at most some tiles."""
    ordered, keys_ordered = draw(st.sampled_from(ORDERED)), draw(st.sampled_from(ORDERED))
    shared = ordered != "no" and keys_ordered == "no"
    masked = draw(st.booleans())
    queries = draw(st.integers(1, 90))
    return Case(
        tile=Tile(draw(st.sampled_from((16, 32))), draw(st.sampled_from((16, 32, 64)))),
        queries=queries,
        keys=queries if shared else draw(st.integers(1, 200)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from((8, 16, 24))),
        shared=(draw(st.booleans()), draw(st.booleans())),
        share=draw(st.sampled_from((0.0, 0.2, 0.6, 1.0))),
        tail="none" if masked else draw(st.sampled_from(("none", "complement"))),
        biased=draw(st.booleans()),
        ordered=ordered,
        keys_ordered=keys_ordered,
        heads_first=draw(st.booleans()),
        masked=masked,
        seed=draw(st.integers(0, 2**16)),
    )


def drawn(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    """Tensors in float32 with NaN in the memory beside them, and the plan."""
    generator = torch.Generator().manual_seed(case.seed)

    def tensor(tokens: int) -> torch.Tensor:
        """`[B, H, L, D]` whose memory is `[B, H, L, D]` or `[B, L, H, D]`."""
        shape = [case.batch, case.heads, tokens, case.dim]
        if not case.heads_first:
            shape[1], shape[2] = shape[2], shape[1]
        whole = torch.full((*shape[:3], case.dim + 3), torch.nan)
        whole[..., : case.dim] = torch.randn(shape, generator=generator)
        part = whole[..., : case.dim]
        return part if case.heads_first else part.transpose(1, 2)

    q, k, v = tensor(case.queries), tensor(case.keys), tensor(case.keys)
    plan = BlockPlan.dense(tile=case.tile, queries=case.queries, keys=case.keys)
    lists = [1 if one else n for one, n in zip(case.shared, (case.batch, case.heads), strict=True)]
    shape = (*lists, plan.rows, plan.columns)
    indices = torch.rand(shape, generator=generator).argsort(-1).to(torch.int32)
    kept = torch.rand(shape, generator=generator) < case.share

    def order(ordered: Ordered, tokens: int) -> torch.Tensor | None:
        if ordered == "no":
            return None
        own = lists if ordered == "by head" else []
        return torch.rand(*own, tokens, generator=generator).argsort(-1)

    bias = torch.randn(shape, generator=generator) if case.biased else None
    counts = kept.sum(-1, dtype=torch.int32)
    plan = dataclasses.replace(
        plan,
        indices=indices,
        counts=counts,
        order=order(case.ordered, case.queries),
        key_order=order(case.keys_ordered, case.keys),
        bias=bias,
        tail=case.tail,
        within=drawn_mask(shape, case, generator) if case.masked else None,
    )
    return q, k, v, plan


def drawn_mask(shape: tuple[int, ...], case: Case, generator: torch.Generator) -> torch.Tensor:
    """Words of any bits, those behind the last token and of entries that do not count too."""
    size = (*shape, case.tile.query, words_of(case.tile.key))
    words = torch.randint(-(2**31), 2**31, size, generator=generator)
    few = torch.rand(*shape, case.tile.query, 1, generator=generator) < 0.3  # queries lose tiles
    return words.masked_fill(few, 0).to(torch.int32)


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, as the definition reads, without a line of the reference."""
    q, k, v = q.double(), k.double(), v.double()
    order = torch.arange(plan.queries) if plan.order is None else plan.order
    order = order.expand(*q.shape[:2], -1)
    of_keys = plan.order if plan.key_order is None else plan.key_order
    if of_keys is not None:
        of_keys = of_keys.expand(*k.shape[:2], -1)[..., None]
        k, v = (x.gather(2, of_keys.expand_as(x)) for x in (k, v))
    tile, lengths = plan.tile, tile_lengths(plan.keys, plan.tile.key)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    lists = plan.indices.expand(*q.shape[:2], -1, -1)
    counts = plan.counts.expand(*q.shape[:2], -1)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        row = i // tile.query
        logits: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        tiles = lists[b, h, row, : counts[b, h, row]].tolist()
        for place, j in enumerate(tiles):
            part = torch.arange(j * tile.key, j * tile.key + int(lengths[j]))
            if plan.within is not None:
                words = plan.within.expand(*q.shape[:2], -1, -1, -1, -1)[b, h, row, place]
                words = words[i % tile.query].tolist()
                bits = [words[c // 32] >> c % 32 & 1 for c in range(len(part))]
                part = part[torch.tensor(bits, dtype=torch.bool)]
            told = k[b, h, part] @ q[b, h, order[b, h, i]] / q.shape[-1] ** 0.5
            if plan.bias is not None:
                told = told + plan.bias.expand(*q.shape[:2], -1, -1)[b, h, row, place]
            logits.append(told)
            values.append(v[b, h, part])
        for j in sorted(set(range(plan.columns)) - set(tiles)) if plan.tail == "complement" else ():
            part = slice(j * tile.key, j * tile.key + int(lengths[j]))
            told = k[b, h, part].mean(0) @ q[b, h, order[b, h, i]] / q.shape[-1] ** 0.5
            logits.append((told + lengths[j].double().log())[None])
            values.append(v[b, h, part].mean(0, keepdim=True))
        if sum(map(len, logits)):
            every = torch.cat(logits)
            lse[b, h, order[b, h, i]] = every.logsumexp(0)
            out[b, h, order[b, h, i]] = every.softmax(0) @ torch.cat(values)
    return out, lse


@pytest.mark.parametrize("backend", BACKENDS)
@DRAWN
@given(case=cases())
def test_any_plan(backend: str, case: Case):
    q, k, v, plan = drawn(case)
    got = block_attention(q, k, v, plan, backend=backend)
    out, lse = expected(q, k, v, plan)
    torch.testing.assert_close(got[0].double(), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU test_triton_backward.py has cases of its own")
@DRAWN
@given(case=cases())
def test_any_gradients(case: Case):
    """Of the kernels, against autograd of the definition in float64."""
    case = dataclasses.replace(case, masked=False)  # which kernels refuse
    q, k, v, plan = drawn(case)
    found: list[tuple[torch.Tensor, ...]] = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        one, two, three = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
        bias = None if plan.bias is None else plan.bias.detach().requires_grad_()
        leaves = [x for x in (one, two, three, bias) if x is not None]
        mine = dataclasses.replace(plan, bias=bias)
        out, lse = block_attention(one, two, three, mine, backend=backend)
        total = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()
        found.append(torch.autograd.grad(total, leaves))
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-3, atol=2e-5)
