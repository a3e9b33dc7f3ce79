"""What the Hopper backend prepares and launches: with kernels that do nothing, on any machine."""

from __future__ import annotations

import functools
import gc
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kinora.kernels
from kinora.kernels import hopper
from kinora.kernels.plan import BlockPlan, Tail, Tile
from kinora.kernels.precision import INPUT, Precision
from kinora.kernels.problem import Problem

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="its pre-passes run in the interpreter"
)
TAILS: tuple[Tail, ...] = ("none", "complement")
INT8, FP8 = Precision("int8"), Precision(pv="fp8")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each launch of the attention kernel is given by keyword, its grid and `again`."""
    told: list[dict[str, Any]] = []

    class Forward:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*given: Any, **named: Any) -> None:
                told.append({"grid": grid[0], "again": given[17], "total": given[31], **named})

            return launch

    def descriptor(x: torch.Tensor, *sizes: int) -> torch.Tensor:
        del sizes
        return x

    modules = {
        "hopper_kernels": SimpleNamespace(forward=Forward()),
        "hopper_pieces_kernels": SimpleNamespace(descriptor=descriptor),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"kinora.kernels.{name}", module)
        monkeypatch.setattr(kinora.kernels, name, module, raising=False)
    monkeypatch.setattr(hopper, "_programs", lambda *_: 132)
    for name in ("pair_means", "left_out"):
        given = functools.partial(vars(hopper)[name], backend="triton")
        monkeypatch.setattr(hopper, name, given)
    return told


def _case(
    tokens: int, tile: Tile, tail: Tail, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockPlan]:
    """q, k, v `[1, 2, L, 64]` and a plan that keeps about half."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 1, 2, tokens, 64, generator=generator).to(dtype)
    shape = (1, 2, -(-tokens // tile.query), -(-tokens // tile.key))
    mask = torch.rand(shape, generator=generator) < 0.5
    plan = BlockPlan.from_mask(mask, tile=tile, queries=tokens, keys=tokens, tail=tail)
    return q, k, v, plan


@pytest.mark.parametrize("tile", [Tile(128, 64), Tile(64, 64)], ids=str)
@pytest.mark.parametrize(
    ("precision", "dtype", "lazy"),
    [
        (INPUT, torch.bfloat16, True),
        (INPUT, torch.float16, False),
        (INT8, torch.bfloat16, True),
        (FP8, torch.bfloat16, False),
    ],
)
def test_a_second_pass_where_weights_have_exponents_enough(
    precision: Precision,
    dtype: torch.dtype,
    lazy: bool,
    tile: Tile,
    launched: list[dict[str, Any]],
):
    """Both read one list, empty at first, with room for each group of each query tile."""
    q, k, v, plan = _case(150, tile, "none", dtype)
    hopper.attend(q, k, v, plan, 0.1, precision)
    assert [it["PASS"] for it in launched] == ([1, 2] if lazy else [0])
    assert {it["total"] for it in launched} == {2 * (3 if tile.query == 64 else 2)}
    if lazy:
        again = launched[0]["again"]
        assert again is launched[1]["again"] and again.dtype == torch.int32
        assert not again.any() and len(again) == 1 + launched[0]["GROUPS"] * launched[0]["total"]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("precision", [INPUT, INT8, FP8], ids=str)
@pytest.mark.parametrize("tile", [Tile(128, 64), Tile(64, 32)], ids=str)
def test_no_more_is_taken_than_the_workspace_says(
    tile: Tile, precision: Precision, tail: Tail, launched: list[dict[str, Any]]
):
    q, k, v, plan = _case(200, tile, tail, torch.bfloat16)
    hopper.attend(q, k, v, plan, 0.1, precision)  # what is imported is no workspace
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out, lse = hopper.attend(q, k, v, plan, 0.1, precision)
    results: Any = profiled.profiler
    events = [it for it in results.kineto_results.events() if it.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda it: it.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    predicted = hopper.workspace(Problem.of(q, k, v, plan, precision))
    assert 0.5 * predicted <= most - out.nbytes - lse.nbytes <= predicted
    assert launched
