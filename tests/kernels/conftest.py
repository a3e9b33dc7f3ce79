"""Fixtures of the kernels' tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def _poisoned(make: Any) -> Any:
    """`make`, and what nobody has written yet is NaN or the largest whole number."""

    def made(*given: Any, **named: Any) -> torch.Tensor:
        x = make(*given, **named)
        if torch.compiler.is_compiling() or x.is_meta or not x.numel():
            return x
        if x.dtype.is_floating_point:
            x.detach().fill_(torch.nan)  # torch itself may have asked for one with a gradient
            return x
        return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

    return made


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated and not written is no luck of zeros: it breaks what reads it."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
