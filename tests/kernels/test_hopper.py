"""The Hopper kernels: what they refuse, that they compile, and on a GPU that they are right."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinora.kernels import hopper
from kinora.kernels.attention import block_attention
from kinora.kernels.backends import choose, refuses
from kinora.kernels.plan import BlockPlan, Tail, Tile
from kinora.kernels.precision import INPUT, Precision
from kinora.kernels.problem import Problem

INT8, FP8, BOTH = Precision("int8"), Precision(pv="fp8"), Precision("int8", "fp8")
TILE = Tile(128, 64)
PROBLEM = Problem(
    device="cuda",
    dtype=torch.bfloat16,
    batch=1,
    heads=2,
    head_dim=128,
    queries=1000,
    keys=1000,
    tile=TILE,
    tail="none",
    biased=False,
    requires_grad=False,
)


@pytest.fixture
def on_hopper() -> None:
    """Skip where the kernels cannot run."""
    reason = hopper.machine()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": "cpu"}, "the tensors are on cpu"),
        ({"dtype": torch.float32}, "float16, bfloat16, not float32"),
        ({"requires_grad": True, "precision": INT8}, "no backward pass of int8 x input"),
        ({"precision": Precision("int4")}, "not int4 x input"),
        ({"precision": Precision(pv="int8")}, "not input x int8"),
        ({"head_dim": 96}, "head dimensions 64 and 128, not 96"),
        ({"tile": Tile(96, 64)}, "tiles of 64, 128 or 256 queries, not 96"),
        ({"tile": Tile(128, 48)}, "tiles of 32, 64 or 128 keys, not 48"),
        ({"tile": Tile(64, 128)}, "128 keys with 128 or 256 queries only"),
    ],
)
def test_a_refusal_has_a_reason(
    changes: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hopper, "machine", lambda: None)
    assert refuses(PROBLEM, "hopper") is None and choose(PROBLEM) == "hopper"
    problem = dataclasses.replace(PROBLEM, **changes)  # pyright: ignore[reportArgumentType]
    assert told in (refuses(problem, "hopper") or "")
    assert choose(problem) != "hopper"


@pytest.mark.parametrize(("name", "given"), [("qk", "int2"), ("pv", "fp4")])
def test_an_unknown_precision_is_refused(name: str, given: str):
    with pytest.raises(ValueError, match=f"{name} '{given}'; it can be input, int8, int4"):
        Precision(**{name: given})  # pyright: ignore[reportArgumentType]


def test_this_machine_is_told_why_it_cannot(monkeypatch: pytest.MonkeyPatch):
    hopper.machine.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in (refuses(PROBLEM, "hopper") or "")
    hopper.machine.cache_clear()


def test_it_compiles_without_a_gpu():
    """For its compute capability, without spilling registers into memory."""
    triton = pytest.importorskip("triton")
    if triton.__version__.rpartition(".")[0] not in hopper.TRITONS:
        pytest.skip(f"Gluon of triton {triton.__version__} is another language")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_hopper.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def _case(
    queries: int, keys: int, dim: int, tile: Tile, dtype: torch.dtype, share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    """q, k, v `[2, 3, L, dim]` in a slice of a tensor of NaN, and a plan with an empty row."""
    generator = torch.Generator().manual_seed(queries + dim)
    made: list[torch.Tensor] = []
    for tokens in (queries, keys, keys):
        whole = torch.full((2, tokens + 8, 3, dim), torch.nan, dtype=dtype)
        whole[:, :tokens] = torch.randn(2, tokens, 3, dim, generator=generator).to(dtype)
        made.append(whole.cuda()[:, :tokens].transpose(1, 2))
    shape = (2, 3, -(-queries // tile.query), -(-keys // tile.key))
    mask = torch.rand(shape, generator=generator) < share
    mask[0, 0, 0] = False
    plan = BlockPlan.from_mask(mask, tile=tile, queries=queries, keys=keys).to("cuda")
    return made[0], made[1], made[2], plan


def _errors(
    out: torch.Tensor, lse: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Of the output, relative; of the log-sum-exp, the largest. Rows without keys must be exact."""
    expected, expected_lse = exact
    some = expected_lse.isfinite()
    assert (lse[~some] == -torch.inf).all() and not out[~some].any()
    error = (out.double() - expected).norm() / expected.norm()
    return float(error), float((lse.double() - expected_lse)[some].abs().max())


VARIANTS: list[tuple[int, Tile, Tail, bool, Precision]] = [
    *((dim, Tile(128, key), "none", False, INPUT) for dim in (64, 128) for key in (32, 64, 128)),
    *(
        (dim, tile, "none", False, INPUT)
        for dim in (64, 128)
        for tile in (Tile(64, 64), Tile(256, 128))
    ),
    *((dim, Tile(128, 64), "complement", True, INPUT) for dim in (64, 128)),
    (64, Tile(256, 128), "complement", False, INPUT),
    (128, Tile(64, 32), "complement", True, INPUT),
    *((dim, Tile(128, 64), "none", False, it) for dim in (64, 128) for it in (INT8, FP8, BOTH)),
    (128, Tile(128, 64), "complement", True, BOTH),
    (64, Tile(128, 128), "complement", False, BOTH),
    (128, Tile(64, 64), "complement", False, BOTH),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1000, 1000), (700, 777), (128, 64), (1, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_reference(
    variant: tuple[int, Tile, Tail, bool, Precision],
    queries: int,
    keys: int,
    dtype: torch.dtype,
    on_hopper: None,
):
    dim, tile, tail, biased, precision = variant
    q, k, v, plan = _case(queries, keys, dim, tile, dtype, 0.5)
    bias = torch.randn(plan.indices.shape, device="cuda") if biased else None
    plan = dataclasses.replace(plan, tail=tail, bias=bias)
    got = block_attention(q, k, v, plan, precision=precision, backend="hopper")
    q, k, v = q.double(), k.double(), v.double()
    error, lse_error = _errors(*got, block_attention(q, k, v, plan, backend="reference"))
    if precision == INPUT:
        assert error <= 4 * torch.finfo(dtype).eps and lse_error <= 1e-3
        return
    # What 8 bits lose by definition, and on top what the order of operations does.
    own = block_attention(q, k, v, plan, precision=precision, backend="reference")
    allowed, _ = _errors(*own, block_attention(q, k, v, plan, backend="reference"))
    assert error <= 1.3 * allowed + 1e-2 and lse_error <= 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [2.0, 0.0, -0.5])
def test_any_scale(scale: float, on_hopper: None):
    q, k, v, plan = _case(700, 777, 64, Tile(128, 64), torch.bfloat16, 0.5)
    got = block_attention(q, k, v, plan, scale=scale, backend="hopper")
    wide = q.double(), k.double(), v.double()
    exact = block_attention(*wide, plan, scale=scale, backend="reference")
    error, lse_error = _errors(*got, exact)
    assert error <= 4 * torch.finfo(torch.bfloat16).eps and lse_error <= 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [INPUT, INT8], ids=str)
@pytest.mark.parametrize("tile", [Tile(128, 64), Tile(64, 64)])
@pytest.mark.parametrize(("higher", "values"), [(200.0, 1.0), (20.0, 1e34)])
def test_a_later_key_may_be_higher_than_all_before_by_any_amount(
    higher: float, values: float, tile: Tile, precision: Precision, on_hopper: None
):
    """Where weights, or their products with values, would overflow beside the first keys'."""
    q, k, v, plan = _case(700, 777, 128, tile, torch.bfloat16, 0.6)
    q, k = q.nan_to_num().clone(), k.nan_to_num().clone()
    q[..., 0] = 16.0
    # Every third query finds later keys as much lower.
    q[:, :, ::3, 0] = -16.0
    k[:, :, :, 0] = 0.0
    k[:, :, 500:, 0] = higher * 128**0.5 / 16
    v = (v * values).to(v.dtype)
    got = block_attention(q, k, v, plan, precision=precision, backend="hopper")
    exact = block_attention(q.double(), k.double(), v.double(), plan, backend="reference")
    error, lse_error = _errors(*got, exact)
    assert got[0].isfinite().all()
    own = block_attention(
        q.double(), k.double(), v.double(), plan, precision=precision, backend="reference"
    )
    allowed, allowed_lse = _errors(*own, exact)
    assert error <= 1.3 * allowed + 1e-2
    assert lse_error <= 1.3 * allowed_lse + 1e-3 * higher


@pytest.mark.gpu
def test_products_may_overflow_to_both_sides_in_one_channel_alone(on_hopper: None):
    """Infinity less infinity is no number, which a maximum over the channels does not see."""
    q, k, v, plan = _case(700, 777, 128, Tile(128, 64), torch.bfloat16, 0.6)
    q, k, v = (x.nan_to_num().clone() for x in (q, k, v))
    q[..., 0] = 16.0
    k[..., 0] = 0.0
    k[:, :, 500:, 0] = 20 * 128**0.5 / 16
    v[:, :, ::2, 0], v[:, :, 1::2, 0] = 1e34, -1e34
    out, lse = block_attention(q, k, v, plan, backend="hopper")
    exact, exact_lse = block_attention(
        q.double(), k.double(), v.double(), plan, backend="reference"
    )
    assert out.isfinite().all()
    some = exact_lse.isfinite()
    for channels in (slice(0, 1), slice(1, None)):
        error = (out.double() - exact)[..., channels].norm() / exact[..., channels].norm()
        assert error <= 1e-2
    assert float((lse.double() - exact_lse)[some].abs().max()) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [INPUT, INT8, BOTH], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tile", [TILE, Tile(64, 64), Tile(128, 128), Tile(256, 128), Tile(128, 32)]
)
@pytest.mark.parametrize("dim", [64, 128])
def test_masks_of_tokens(
    on_hopper: None, dim: int, tile: Tile, dtype: torch.dtype, precision: Precision
):
    """Whole tiles and masked ones, of which some leave a query nothing; a list of one tile too."""
    generator = torch.Generator("cuda").manual_seed(dim)
    q, k, v = (
        torch.randn(1, 2, 777, dim, generator=generator, device="cuda", dtype=dtype)
        for _ in range(3)
    )
    mask = torch.rand(1, 2, 777, 777, generator=generator, device="cuda") < 0.3
    mask[:, 0, :, 200:600] = True
    mask[:, 1, 300:500] = False
    mask[:, 1, :256, 256:] = False
    mask[:, :, 400] = False
    mask[:, :, :, 70] |= torch.arange(777, device="cuda") != 400
    plan = BlockPlan.from_tokens(mask, tile=tile)
    assert plan.within is not None
    out, lse = block_attention(q, k, v, plan, precision=precision, backend="hopper")
    logits = (q.double() @ k.double().mT * dim**-0.5).masked_fill(~mask, -torch.inf)
    exact, exact_lse = logits.softmax(-1).nan_to_num(0) @ v.double(), logits.logsumexp(-1)
    assert float((out.double() - exact).norm() / exact.norm()) <= (
        5e-3 if precision == INPUT else 0.06
    )
    some = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), some) and not bool(out[~some].any())
    assert float((lse.double() - exact_lse)[some].abs().max()) <= 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [INPUT, INT8], ids=str)
@pytest.mark.parametrize("tile", [TILE, Tile(64, 64), Tile(256, 128)])
def test_keys_that_are_masked_may_be_far_higher(on_hopper: None, tile: Tile, precision: Precision):
    """A first reference of theirs would leave weights of nothing: such queries are done again."""
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (
        torch.randn(1, 2, 777, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    q[..., 0], k[..., 0] = 16.0, 0.0
    k[:, :, :128, 0] = 200 * 128**0.5 / 16
    mask = torch.ones(1, 1, 777, 777, dtype=torch.bool, device="cuda")
    mask[:, :, ::3, :128] = False
    plan = BlockPlan.from_tokens(mask, tile=tile)
    out, lse = block_attention(q, k, v, plan, precision=precision, backend="hopper")
    logits = (q.double() @ k.double().mT * 128**-0.5).masked_fill(~mask, -torch.inf)
    exact, exact_lse = logits.softmax(-1) @ v.double(), logits.logsumexp(-1)
    # In 8 bits the small logits beside 200 are all but lost in the steps of their tile.
    error = float((out.double() - exact).norm() / exact.norm())
    assert error <= (5e-3 if precision == INPUT else 0.5)
    assert lse.isfinite().all()
    if precision == INPUT:
        assert float((lse.double() - exact_lse).abs().max()) <= 0.1


TAILS: tuple[Tail, ...] = ("none", "complement")


@pytest.mark.gpu
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dim", [64, 128, 96])
def test_the_portable_kernels_equal_the_reference_on_a_gpu(dim: int, tail: Tail):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs TRITON_INTERPRET=0")
    q, k, v, plan = _case(300, 333, dim, TILE, torch.bfloat16, 0.4)
    plan = dataclasses.replace(plan, tail=tail)
    out, lse = block_attention(q, k, v, plan, backend="triton")
    expected, expected_lse = block_attention(
        q.double(), k.double(), v.double(), plan, backend="reference"
    )
    assert (out.double() - expected).norm() <= 2e-2 * expected.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-2, atol=1e-2)
