"""Block attention: the reference against dense attention, fast backends against the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kinora.kernels.attention import block_attention, merge
from kinora.kernels.backends import choose, refuses
from kinora.kernels.plan import BlockPlan, Tail, Tile
from kinora.kernels.problem import Problem

TILE = Tile(16, 8)
TAILS: tuple[Tail, ...] = ("none", "complement")
ANYWHERE = ("cpu", "reference")
"""Backends that need no GPU."""
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _tensors(
    queries: int = 40, keys: int = 40, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensors:
    """q, k, v `[2, 3, L, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64)
        for tokens in (queries, keys, keys)
    )
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _plan(
    queries: int = 40,
    keys: int = 40,
    *,
    shape: tuple[int, int] = (2, 3),
    share: float = 0.4,
    tail: Tail = "none",
    seed: int = 1,
) -> BlockPlan:
    generator = torch.Generator().manual_seed(seed)
    tiles = (-(-queries // TILE.query), -(-keys // TILE.key))
    mask = torch.rand(*shape, *tiles, generator=generator) < share
    return BlockPlan.from_mask(mask, tile=TILE, queries=queries, keys=keys, tail=tail)


def _token_mask(plan: BlockPlan) -> torch.Tensor:
    rows = plan.mask().repeat_interleave(TILE.query, 2)[:, :, : plan.queries]
    return rows.repeat_interleave(TILE.key, 3)[..., : plan.keys]


def _nested(plan: BlockPlan, share: float) -> BlockPlan:
    """`plan` and more tiles."""
    more = torch.rand(plan.mask().shape, generator=torch.Generator().manual_seed(9)) < share
    return BlockPlan.from_mask(
        plan.mask() | more, tile=TILE, queries=plan.queries, keys=plan.keys, tail=plan.tail
    )


# The reference, in float64, against torch's attention and against algebra.


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (48, 64), (33, 7), (1, 1)])
def test_keeping_everything_is_dense_attention(tail: Tail, queries: int, keys: int):
    q, k, v = _tensors(queries, keys)
    plan = dataclasses.replace(BlockPlan.dense(tile=TILE, queries=queries, keys=keys), tail=tail)
    out, lse = block_attention(q, k, v, plan)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT / 8**0.5).logsumexp(-1))


def test_equals_torch_with_a_mask():
    q, k, v = _tensors()
    plan = _plan(share=0.6)
    mask = _token_mask(plan)
    some = mask.any(-1)
    assert some.any()
    out, _ = block_attention(q, k, v, plan)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out[some], dense[some])


def test_a_query_without_keys_gets_nothing():
    q, k, v = _tensors()
    plan = _plan(share=0.0)
    for backend in ANYWHERE:
        out, lse = block_attention(q.float(), k.float(), v.float(), plan, backend=backend)
        assert not out.any() and bool((lse == -torch.inf).all())


def test_the_tail_is_exact_where_keys_are_alike():
    """A tile of equal keys is as well told by their mean."""
    q, _, v = _tensors(keys=40)
    tiles = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    k = tiles.repeat_interleave(TILE.key, dim=2)
    out, lse = block_attention(q, k, v, _plan(tail="complement"))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT / 8**0.5).logsumexp(-1))


def test_the_tail_never_weighs_more_than_the_truth():
    """Jensen: the mean of exponentials is at least the exponential of the mean."""
    q, k, v = _tensors(37, 43)
    _, lse = block_attention(q, k, v, _plan(37, 43, tail="complement"))
    assert bool((lse <= (q @ k.mT / 8**0.5).logsumexp(-1) + 1e-12).all())


@pytest.mark.parametrize("tail", TAILS)
def test_more_tiles_never_weigh_less(tail: Tail):
    q, k, v = _tensors()
    plan = _plan(tail=tail)
    masses = [block_attention(q, k, v, p)[1] for p in (plan, _nested(plan, 0.5), _nested(plan, 1))]
    assert bool((masses[0] <= masses[1] + 1e-12).all() and (masses[1] <= masses[2] + 1e-12).all())


@pytest.mark.parametrize("tail", TAILS)
def test_a_shift_of_all_keys_changes_nothing(tail: Tail):
    q, k, v = _tensors()
    plan = _plan(tail=tail)
    shift = torch.full((8,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(
        block_attention(q, k + shift, v, plan)[0], block_attention(q, k, v, plan)[0]
    )


@pytest.mark.parametrize("tail", TAILS)
def test_linear_in_the_values(tail: Tail):
    q, k, v = _tensors()
    _, _, w = _tensors(seed=5)
    plan = _plan(tail=tail)

    def out(values: torch.Tensor) -> torch.Tensor:
        return block_attention(q, k, values, plan)[0]

    torch.testing.assert_close(out(2 * v - 3 * w), 2 * out(v) - 3 * out(w))


@pytest.mark.parametrize("tail", TAILS)
def test_between_the_least_and_the_greatest_value(tail: Tail):
    q, k, v = _tensors()
    out, lse = block_attention(q, k, v, _plan(tail=tail))
    inside = (out >= v.amin(2, keepdim=True) - 1e-12) & (out <= v.amax(2, keepdim=True) + 1e-12)
    assert bool(inside[lse > -torch.inf].all())


def test_parts_over_disjoint_keys_merge_to_the_whole():
    q, k, v = _tensors(37, 43)
    plan = _plan(37, 43)
    rest = BlockPlan.from_mask(~plan.mask(), tile=TILE, queries=37, keys=43)
    out, lse = merge(block_attention(q, k, v, plan), block_attention(q, k, v, rest))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.mT / 8**0.5).logsumexp(-1))


def test_nothing_merged_with_nothing_is_nothing():
    q, k, v = _tensors()
    nothing = block_attention(q, k, v, _plan(share=0.0))
    out, lse = merge(nothing, nothing)
    assert not out.any() and bool((lse == -torch.inf).all())


def test_gradients_pass_a_merge_of_queries_without_keys():
    """Rows with keys on both sides, on either side and on none."""
    q, k, v = (x[:1, :1, :12, :3].clone().requires_grad_() for x in _tensors())
    left = torch.tensor([[[[True, False], [False, False], [True, False], [False, False]]]])
    right = torch.tensor([[[[False, True], [False, True], [False, False], [False, False]]]])
    plans = [BlockPlan.from_mask(it, tile=Tile(3, 6), queries=12, keys=12) for it in (left, right)]

    def merged(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = merge(*(block_attention(q, k, v, plan) for plan in plans))
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(merged, (q, k, v))


@pytest.mark.parametrize("whose", ["neither", "first", "second"])
def test_gradients_of_a_merge_are_finite(whose: str):
    """Also with respect to the log-sum-exp of a side that has no key."""
    out, lse = torch.randn(2, 1, 1, 4, 3), torch.randn(2, 1, 1, 4)
    for side in {"neither": (0, 1), "first": (1,), "second": (0,)}[whose]:
        out[side], lse[side] = 0, -torch.inf
    given = [x.requires_grad_() for x in (out[0], lse[0], out[1], lse[1])]
    merged, merged_lse = merge((given[0], given[1]), (given[2], given[3]))
    loss = merged.square().sum() + merged.sum() + merged_lse.exp().sum()
    for gradient in torch.autograd.grad(loss, given):
        assert bool(gradient.isfinite().all())
        assert whose != "neither" or not gradient.any()


def test_a_bias_weighs_a_tile():
    """A bias of log 2 counts a tile twice, as if its keys and values stood there twice."""
    q, k, v = _tensors(16, 8)
    plan = BlockPlan.dense(tile=TILE, queries=16, keys=8)
    twice = dataclasses.replace(plan, bias=torch.full((1, 1, 1, 1), 2.0).log())
    _, once_lse = block_attention(q, k, v, plan)
    _, lse = block_attention(q, k, v, twice)
    torch.testing.assert_close(lse, once_lse + torch.tensor(2.0).log().double())


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_through_output_and_log_sum_exp(tail: Tail):
    q, k, v = (x[:1, :1, :10, :3].clone().requires_grad_() for x in _tensors())
    mask = torch.tensor([[[[True, False, True], [False, True, False]]]])
    plan = BlockPlan.from_mask(mask, tile=Tile(6, 4), queries=10, keys=10, tail=tail)

    def both(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return block_attention(q, k, v, plan)

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_gradients_of_queries_without_keys_are_zero():
    q, k, v = (x.clone().requires_grad_() for x in _tensors())
    block_attention(q, k, v, _plan(share=0.0))[0].sum().backward()
    assert q.grad is not None and not q.grad.any()


# The fast backend against the reference.

SHAPES = [(40, 40), (48, 64), (33, 71), (7, 130)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("broadcast", [(2, 3), (1, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_the_fast_backend_equals_the_reference(
    queries: int, keys: int, broadcast: tuple[int, int], share: float, tail: Tail
):
    q, k, v = _tensors(queries, keys, dtype=torch.float32)
    plan = _plan(queries, keys, shape=broadcast, share=share, tail=tail)
    expected = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="cpu"), expected)


@pytest.mark.parametrize("tail", TAILS)
def test_the_fast_backend_weighs_tiles(tail: Tail):
    q, k, v = _tensors(33, 71, dtype=torch.float32)
    plan = _plan(33, 71, tail=tail)
    bias = torch.randn(plan.indices.shape, generator=torch.Generator().manual_seed(4))
    plan = dataclasses.replace(plan, bias=bias)
    expected = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="cpu"), expected)


@pytest.mark.parametrize("tail", TAILS)
def test_the_fast_backend_in_half_precision(tail: Tail):
    q, k, v = _tensors(33, 71, dtype=torch.bfloat16)
    plan = _plan(33, 71, tail=tail)
    out, lse = block_attention(q, k, v, plan, backend="cpu")
    expected, expected_lse = block_attention(
        q.double(), k.double(), v.double(), plan, backend="reference"
    )
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 2**23])
def test_chunks_of_any_size_give_the_same(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch):
    q, k, v = _tensors(130, 130, dtype=torch.float32)
    plan = _plan(130, 130, tail="complement")
    expected = block_attention(q, k, v, plan, backend="reference")
    monkeypatch.setattr("kinora.kernels.cpu.GATHERED_BYTES", chunk_bytes)
    torch.testing.assert_close(block_attention(q, k, v, plan, backend="cpu"), expected)


@pytest.mark.parametrize("backend", ANYWHERE)
def test_any_strides(backend: str):
    """`[B, L, H, D]` in memory, as diffusers has it, a slice of a larger tensor."""
    q, k, v = _tensors(33, 71, dtype=torch.float32)
    plan = _plan(33, 71)
    large = [torch.full((2, x.shape[2], 5, 12), torch.nan) for x in (q, k, v)]
    strided: list[torch.Tensor] = []
    for whole, x in zip(large, (q, k, v), strict=True):
        whole[:, :, 1:4, 2:10] = x.transpose(1, 2)
        strided.append(whole[:, :, 1:4, 2:10].transpose(1, 2))
    expected = block_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(
        block_attention(strided[0], strided[1], strided[2], plan, backend=backend), expected
    )


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("keep", ["some", "all"])
@pytest.mark.parametrize("layout", ["channels apart", "every other channel", "expanded"])
def test_strides_of_any_dimension(backend: str, keep: str, layout: str):
    plan = _plan() if keep == "some" else BlockPlan.dense(tile=TILE, queries=40, keys=40)
    given = _tensors(dtype=torch.float32)
    if layout == "channels apart":
        q, k, v = (x.mT.contiguous().mT for x in given)
    elif layout == "every other channel":
        q, k, v = (torch.stack([x, x * torch.nan], -1).flatten(-2)[..., ::2] for x in given)
    else:
        q, k, v = (x[:, :1].expand(-1, 3, -1, -1) for x in given)
    expected = block_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), plan, backend="reference"
    )
    torch.testing.assert_close(block_attention(q, k, v, plan, backend=backend), expected)


def test_a_bias_may_want_gradients():
    q, k, v = _tensors(dtype=torch.float32)
    plan = _plan()
    bias = torch.zeros(plan.indices.shape, requires_grad=True)
    block_attention(q, k, v, dataclasses.replace(plan, bias=bias))[0].sum().backward()
    assert bias.grad is not None and bool(bias.grad.any())


@pytest.mark.parametrize("backend", ANYWHERE)
@pytest.mark.parametrize("tail", TAILS)
def test_entries_that_do_not_count_change_nothing(backend: str, tail: Tail):
    q, k, v = _tensors(dtype=torch.float32)
    plan = _plan(tail=tail)
    expected = block_attention(q, k, v, plan, backend=backend)
    plan.indices[~plan.kept] = 1_000_000
    got = block_attention(q, k, v, plan, backend=backend)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("backend", ANYWHERE)
def test_inputs_stay_as_they_are(backend: str):
    q, k, v = _tensors(33, 71, dtype=torch.float32)
    before = [x.clone() for x in (q, k, v)]
    block_attention(q, k, v, _plan(33, 71, tail="complement"), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


# Which backend, and why not another one.


def _problem(**changes: object) -> Problem:
    q, k, v = _tensors(dtype=torch.float32)
    return dataclasses.replace(Problem.of(q, k, v, _plan()), **changes)  # pyright: ignore[reportArgumentType]


def test_the_fast_backend_is_chosen_where_it_can():
    assert choose(_problem()) == "cpu"
    for changes in ({"dtype": torch.float64}, {"requires_grad": True}, {"device": "cuda"}):
        assert choose(_problem(**changes)) == "reference"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": torch.float64}, "it takes float32 and bfloat16, not float64"),
        ({"requires_grad": True}, "no backward pass"),
        ({"device": "cuda"}, "the tensors are on cuda"),
    ],
)
def test_a_refusal_has_a_reason(changes: dict[str, object], told: str):
    reason = refuses(_problem(**changes), "cpu")
    assert reason is not None and told in reason
    assert refuses(_problem(**changes), "reference") is None


def test_a_backend_asked_for_by_name_does_not_fall_back():
    q, k, v = _tensors()
    with pytest.raises(ValueError, match="backend cpu cannot do this: it takes float32"):
        block_attention(q, k, v, _plan(), backend="cpu")
    with pytest.raises(
        ValueError, match="backend 'cuda'; there are cpu, hopper, triton, reference"
    ):
        block_attention(q, k, v, _plan(), backend="cuda")


@pytest.mark.parametrize("given", ["int8", "int8.fp8", None])
def test_a_precision_is_no_text(given: Any):
    q, k, v = _tensors()
    with pytest.raises(
        TypeError, match=r"it must be a Precision, such as Precision\('int8', 'fp8'"
    ):
        block_attention(q, k, v, _plan(), precision=given)


def test_no_gradient_is_lost_silently():
    q, k, v = _tensors(dtype=torch.float32)
    q.requires_grad_()
    assert block_attention(q, k, v, _plan())[0].requires_grad
    with torch.no_grad():
        assert choose(Problem.of(q, k, v, _plan())) == "cpu"
