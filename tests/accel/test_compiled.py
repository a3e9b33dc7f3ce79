"""Accelerated denoisers under `torch.compile`: one compilation, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kinora.accel.attach import accelerate
from kinora.accel.methods import KvMerge, TopBlocks
from kinora.accel.recipe import Recipe
from kinora.accel.wrappers import Within

Build = Callable[[str], Any]
SPARSE = Recipe(attention=TopBlocks(keep=0.3, tile="64x64"), when="always")


@pytest.mark.parametrize("family", ["wan", "cogvideox", "sdxl"])
def test_a_denoiser_wrapped_by_torch_compile_is_accelerated_too(build: Build, family: str):
    model = build(family)
    with accelerate(model, SPARSE):
        expected = model()
    torch.compiler.reset()
    part = "unet" if family == "sdxl" else "transformer"
    compiled = torch.compile(model.denoiser, backend="aot_eager", fullgraph=True)
    setattr(model.pipe, part, compiled)
    with accelerate(model.pipe, SPARSE) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.kernels == {"cpu": ran.calls} and ran.calls
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_keys_are_merged_in_a_compiled_denoiser_too(build: Build, family: str):
    model, recipe = build(family), Recipe(attention=KvMerge(), when="always")
    with accelerate(model, recipe):
        expected = model()
    torch.compiler.reset()
    model.denoiser.compile(backend="aot_eager", fullgraph=True)
    with accelerate(model, recipe) as session:
        out = model()
    ran = session.receipt.attention
    assert ran is not None and ran.kernels == {"sdpa": ran.calls} and ran.calls
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        *("wan", "cogvideox", "sd3"),
        *(
            pytest.param(it, marks=pytest.mark.long)
            for it in ("sdxl", "ltx", "hunyuan", "mochi", "flux", "qwen")
        ),
    ],
)
def test_one_compilation_serves_all_layers_and_steps(build: Build, family: str):
    from torch._dynamo.testing import (  # pyright: ignore[reportPrivateUsage]
        CompileCounterWithBackend,
    )

    eager, compiled = build(family), build(family)
    recipe = Recipe(
        attention=Within(method=TopBlocks(keep=0.3, tile="64x64"), from_step=0.3), when="always"
    )
    with accelerate(eager, recipe):
        expected = eager()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    blocks = getattr(compiled.denoiser, "blocks", None)
    if blocks is None:
        compiled.denoiser.compile(fullgraph=True, backend=counter)
    else:
        for block in blocks:
            block.compile(fullgraph=True, backend=counter)
    with accelerate(compiled, recipe) as session:
        out = compiled()
    ran = session.receipt.attention
    assert ran is not None and ran.kernels and ran.dense
    assert counter.frame_count == 1
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
