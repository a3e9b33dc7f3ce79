"""What a worker learns of its accelerator from a row that failed."""

from __future__ import annotations

import pytest
import torch

from kinora.pipelines.batch.making import Studio, breaks
from kinora.pipelines.errors import GenerationError


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as it:
        return it


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCom"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("HIP error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("shapes differ; no CUDA error: none"), False),
        (ValueError("CUDA error: as told by a prompt"), False),
    ],
)
def test_errors_that_break_an_accelerator(error: Exception, broken: bool) -> None:
    assert breaks(error) is broken
    told = f"tiny failed while denoising: {type(error).__name__}: {error}"
    assert breaks(raised(GenerationError(told), error)) is broken
    assert not breaks(GenerationError(told)), "words may quote anything"


def test_a_worker_asks_the_gpu_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def synchronize(device: str | None = None) -> None:
        asked.append(device)
        if device == "cuda:1":
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    studio = Studio()
    studio._devices.add("cuda:0")  # pyright: ignore[reportPrivateUsage]
    assert studio.recovers()
    studio._devices.add("cuda:1")  # pyright: ignore[reportPrivateUsage]
    assert not studio.recovers() and set(asked) == {"cuda:0", "cuda:1"}
