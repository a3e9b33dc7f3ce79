"""Whether a receipt says that anything ran otherwise than without the recipe."""

from __future__ import annotations

from typing import Any

import pytest

from kinora.accel.receipt import AttentionReceipt, CacheReceipt, Receipt, StepsReceipt


def attention(**ran: Any) -> AttentionReceipt:
    told: dict[str, Any] = {"kernels": {}, "dense": {"because": 4}, **ran}
    return AttentionReceipt(
        asked="a", layers=1, calls=4, fallbacks=[], density=1.0, density_by_layer=[1.0], **told
    )


def steps(pattern: str) -> StepsReceipt:
    return StepsReceipt(
        asked="s", pattern=pattern, evaluations=4, calls=4, mean_error=None, max_error=None
    )


def cache(evaluated: int, halved: int = 0) -> CacheReceipt:
    return CacheReceipt(
        asked="c", unit="block", hooked=1, calls=4, evaluated=evaluated, halved=halved,
        pattern="CCCC",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "stock"),
    [
        ({}, True),
        ({"attention": attention()}, True),
        ({"attention": attention(kernels={"cpu": 1}, dense={"because": 3})}, False),
        ({"attention": attention(dense_kernels={"cudnn": 4})}, False),
        ({"policy": steps("CCCC")}, True),
        ({"policy": steps("CsCC"), "skipped": 1}, False),
        ({"policy": steps("CCpC")}, False),
        ({"attention": attention(), "policy": steps("CsCC"), "skipped": 1}, False),
        ({"cache": cache(4)}, True),
        ({"cache": cache(3)}, False),
        ({"cache": cache(4, halved=1)}, False),
        ({"processes": 2}, False),
    ],
)
def test_a_receipt_says_whether_all_ran_as_without_it(parts: dict[str, Any], stock: bool) -> None:
    told: dict[str, Any] = {"attention": None, **parts}
    receipt = Receipt(recipe={"when": "faster"}, strict=False, steps=4, **told)
    assert receipt.stock is stock
