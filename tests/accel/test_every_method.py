"""Each attention method in each family: it runs, sparse, and nothing falls back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate, forward
from kinora.accel.calibration import Tally
from kinora.accel.errors import AccelerationError
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import (
    METHODS,
    Blade,
    Hierarchical,
    KvMerge,
    Neighborhood,
    Paro,
    PermutedBlocks,
    SlidingTile,
    ThresholdBlocks,
    TopBlocks,
    VMoBA,
    XAttention,
)
from kinora.accel.methods.paro import ParoObserver
from kinora.accel.receipt import AttentionReceipt
from kinora.accel.recipe import Recipe
from kinora.kernels.attention import block_attention
from kinora.kernels.plan import BlockPlan, Tile

from .conftest import LOOPS, SIZES

Build = Callable[[str], Any]
SMALL: dict[str, Any] = {"tile": "64x64"}
CHOSEN: list[AttentionMethod] = [
    TopBlocks(keep=0.3, **SMALL),
    ThresholdBlocks(**SMALL),
    ThresholdBlocks(rule="top", keep=0.1, mass=0.3, **SMALL),
    XAttention(threshold=0.4, least=0, **SMALL),
    SlidingTile(frames=0.5, height=0.5, width=0.5, **SMALL),
    Neighborhood(frames=0.6, height=0.6, width=0.6, **SMALL),
    Blade(**SMALL),
    Blade(tail="double", **SMALL),
    Hierarchical(blocks=2, branch=2, **SMALL),
    PermutedBlocks(keep=0.3, **SMALL),
    VMoBA(keep=0.25, **SMALL),
    VMoBA(keep=0.25, shared=False, **SMALL),
    KvMerge(),
]
STEPS = 1
LARGER: dict[str, dict[str, int]] = {
    "cogvideox": {"width": 256},
    "flux": {"width": 128, "height": 128},
}
"""Of pipelines whose text is about as long as their picture, and is attended to by all."""
PICTURES = {"flux", "sdxl", "qwen", "sd3", "unet"}
"""Families of one frame, of which a third of the layers of `vmoba` cut nothing."""
UNLIKE = {"sd3": "9 of text, there 1×16×32 and 0", "unet": "1×32×64 and 0 of text, there 1×16×32"}
"""Families whose layers see different tokens, and what is said of them."""


def made(build: Build, family: str) -> Any:
    model = build(family)
    model.arguments.update(LARGER.get(family, {}))
    if family == "mochi":
        # Items of the same length, as one calibration is of one.
        model.arguments["encoder_attention_mask"][:] = True
    return model


@pytest.fixture(scope="module")
def dense() -> dict[str, torch.Tensor]:
    """What each family makes without a method."""
    return {}


def ran_sparse(
    model: Any, family: str, method: AttentionMethod, dense: dict[str, torch.Tensor]
) -> AttentionReceipt:
    """The receipt of a strict run, which makes nearly what dense attention does."""
    if family not in dense:
        dense[family] = model(steps=STEPS)
    attended: list[int] = []
    given: list[int] = []

    def spied(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, **how: Any
    ) -> Any:
        pairs = plan.token_mask().expand(*q.shape[:2], -1, -1)
        attended.append(int(pairs.sum()))
        given.append(pairs.numel())
        return block_attention(q, k, v, plan, **how)

    with (
        pytest.MonkeyPatch.context() as patch,
        accelerate(model, Recipe(attention=method, when="always"), strict=True) as session,
    ):
        patch.setattr(forward, "block_attention", spied)
        out = model(steps=STEPS)
    ran = session.receipt.attention
    assert ran is not None and ran.asked.startswith(f"{method.name} (") and not ran.fallbacks
    assert 0 < sum(ran.kernels.values()) == ran.calls - sum(ran.dense.values())
    assert 0 < ran.density < 1
    if not ran.dense and method.name != "kv-merge":
        # Told is what ran: the pairs of tokens in the plans that kernels were given.
        assert ran.density == pytest.approx(sum(attended) / sum(given), abs=5.1e-5)
    error = float((out - dense[family]).norm() / dense[family].norm())
    assert 0 < error < 0.5
    return ran


def test_every_method_is_here():
    assert {*METHODS} == {method.name for method in CHOSEN} | {"paro"}


@pytest.mark.long
@pytest.mark.parametrize("method", CHOSEN, ids=lambda it: it.name)
@pytest.mark.parametrize("family", [*SIZES, *LOOPS])
def test_a_strict_run_is_sparse(
    build: Build, family: str, method: AttentionMethod, dense: dict[str, torch.Tensor]
):
    ran = ran_sparse(made(build, family), family, method, dense)
    if method.name == "vmoba" and family in PICTURES:
        assert all("is one block in layers like this one" in reason for reason in ran.dense)
    elif method.name in ("hierarchical", "permuted-blocks") and family == "unet":
        # Its smallest grid is two tiles.
        assert set(ran.density_by_layer) > {1.0} and sum(ran.dense.values()) == STEPS
    else:
        assert not ran.dense and all(it is not None and it < 1 for it in ran.density_by_layer)


@pytest.mark.parametrize("family", [it for it in (*SIZES, *LOOPS) if it not in UNLIKE])
def test_a_strict_run_of_paro_is_sparse(
    build: Build, family: str, dense: dict[str, torch.Tensor], tmp_path: Path
):
    model = made(build, family)
    observer = ParoObserver(tally := Tally(keep=0.3, tile=Tile(64, 64)))
    with accelerate(model, Recipe(attention=observer, when="always")):
        model(steps=STEPS)
    assert observer.last is not None
    path = tmp_path / "paro.npz"
    path.write_bytes(tally.finish(family, observer.last).to_bytes())
    ran = ran_sparse(model, family, Paro(calibration=str(path)), dense)
    assert not ran.dense and all(it is not None and it < 1 for it in ran.density_by_layer)


@pytest.mark.parametrize("family", UNLIKE)
def test_paro_is_refused_where_layers_see_different_tokens(build: Build, family: str):
    model = made(build, family)
    recipe = Recipe(attention=ParoObserver(Tally(keep=0.3)), when="always")
    with (
        pytest.raises(AccelerationError, match=UNLIKE[family]),
        accelerate(model, recipe, strict=True),
    ):
        model(steps=STEPS)
