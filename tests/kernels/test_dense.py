"""Dense kernels: each computes attention or says beforehand why not."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from kinora.kernels.dense import (
    DENSE_KERNELS,
    DenseKernel,
    available,
    dense_attention,
    expected_fastest,
    refuses,
)

HERE: Any = {"device": "cpu", "dtype": torch.float32}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(tokens: int = 70, head_dim: int = 12, seed: int = 0) -> Tensors:
    """As models that lay tokens out before heads pass them."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, tokens, 3, head_dim, generator=generator).transpose(2, 3)
    return q, k, v


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.mT * scale).softmax(-1) @ v


def check(kernel: DenseKernel) -> None:
    for tokens, scale in ((70, None), (33, 0.5)):
        q, k, v = tensors(tokens)
        out = dense_attention(q, k, v, kernel=kernel, scale=scale)
        assert out.shape == q.shape and out.dtype == q.dtype
        expected = exact(q, k, v, 12**-0.5 if scale is None else scale)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_a_kernel_computes_attention(kernel: DenseKernel) -> None:
    check(kernel)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's compiler, of itself
def test_flex_computes_attention_with_one_compilation_for_all_lengths() -> None:
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]  # pyright: ignore[reportPrivateUsage]
    check("flex")
    before = graphs["unique_graphs"]
    for tokens in (40, 90, 500):
        dense_attention(*tensors(tokens), kernel="flex")
    assert graphs["unique_graphs"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DENSE_KERNELS)
def test_a_kernel_computes_attention_on_a_gpu(kernel: DenseKernel) -> None:
    reason = refuses(kernel, device="cuda", dtype=torch.bfloat16, head_dim=64)
    if reason:
        pytest.skip(reason)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(500, 64))
    out = dense_attention(q, k, v, kernel=kernel)
    expected = exact(q, k, v, 64**-0.5)
    assert (out.double() - expected).norm() < (0.05 if kernel == "sage" else 0.01) * expected.norm()


def test_a_mask_is_for_sdpa_alone() -> None:
    q, k, v = tensors()
    mask = torch.arange(70) < 50
    masked = dense_attention(q, k, v, kernel="sdpa", mask=mask[None, None, None])
    cut = dense_attention(q, k[:, :, :50], v[:, :, :50], kernel="sdpa")
    torch.testing.assert_close(masked, cut)
    with pytest.raises(ValueError, match="flash takes no mask, only sdpa does"):
        dense_attention(q, k, v, kernel="flash", mask=mask)


def test_what_is_available_is_what_is_not_refused() -> None:
    assert available(**HERE) == ("sdpa", "flash", "flex")
    for kernel in ("cudnn", "efficient", "xformers", "sage"):
        assert refuses(kernel, **HERE) == "it is for CUDA devices"
    assert available(device="mps", dtype=torch.float32) == ("sdpa",)
    assert "cudnn" not in available(device="cuda", dtype=torch.float32)
    half: Any = {"device": "cuda", "dtype": torch.bfloat16}
    assert refuses("cudnn", **half) is None and refuses("flash", **half, head_dim=256) is None
    told = "it takes heads of at most 256, not 320"
    assert refuses("flash", **half, head_dim=320) == told
    assert refuses("flash", device="cuda", dtype=torch.float32) == (
        "it takes float16 and bfloat16, not float32"
    )


@pytest.mark.parametrize(
    ("kernel", "package"), [("xformers", "xformers"), ("sage", "sageattention")]
)
def test_a_library_is_needed_where_it_is(
    kernel: DenseKernel, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: Any = {"device": "cuda", "dtype": torch.float16, "head_dim": 64}
    if importlib.util.find_spec(package) is None:
        assert refuses(kernel, **given) == f"{package} is not installed"
    module = ModuleType(package)
    module.__spec__ = importlib.util.spec_from_loader(package, None)
    monkeypatch.setitem(sys.modules, package, module)
    assert refuses(kernel, **given) is None


def test_libraries_are_called_as_they_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with their signatures, for machines that have neither."""

    def memory_efficient_attention(query: Any, key: Any, value: Any, *, scale: float) -> Any:
        """Tokens before heads."""
        assert query.shape[1] in (70, 33)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return exact(q, k, v, scale).float().transpose(1, 2)

    def sageattn(q: Any, k: Any, v: Any, tensor_layout: str, is_causal: bool, sm_scale: float):
        """Heads before tokens, as said."""
        assert tensor_layout == "HND" and is_causal is False
        return exact(q, k, v, sm_scale).float()

    ops, sage = ModuleType("xformers.ops"), ModuleType("sageattention")
    ops.__dict__["memory_efficient_attention"] = memory_efficient_attention
    sage.__dict__["sageattn"] = sageattn
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "sageattention", sage)
    check("xformers")
    check("sage")


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "kernel"),
    [
        ("cuda:1", torch.bfloat16, 9, "cudnn"),
        ("cuda", torch.float16, 10, "cudnn"),
        ("cuda", torch.float32, 9, None),
        ("cuda", torch.bfloat16, 8, None),
        ("cpu", torch.bfloat16, 9, None),
    ],
)
def test_the_fastest_kernel_is_known_before_a_call(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    capability: int,
    kernel: str | None,
):
    def told(of: object = None) -> tuple[int, int]:
        return capability, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", told)
    assert expected_fastest(device=device, dtype=dtype) == kernel
