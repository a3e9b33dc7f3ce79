"""In how many bits queries, keys, weights and values are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Precision:
    """Operands of the two products of attention; sums are float32 at least.

    Args:
        qk: of queries and keys. `input`: as they come. `int8`: whole numbers of 8 bits, one scale
            for 64 queries, one for a tile of keys and one for 64 or 128 pooled tokens. One vector
            of each head, about the mean of its keys, is taken from all its keys first: the softmax
            does not see it, and the log-sum-exp gets it back.
        pv: of weights and values. `input`: as they come. `fp8`: float8 e4m3, one scale for a
            channel of a head; weights, at most 1, times 2^8.

    Raises:
        ValueError: another precision.

    Source: SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958). Differs from
    them: the fast path takes the mean of a sample of the keys, since any vector is exact.
    """

    qk: Literal["input", "int8"] = "input"
    pv: Literal["input", "fp8"] = "input"

    def __post_init__(self) -> None:
        for name, allowed in (("qk", ("input", "int8")), ("pv", ("input", "fp8"))):
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} {given!r}; it can be {' or '.join(allowed)}")

    def __str__(self) -> str:
        return f"{self.qk} x {self.pv}"


INPUT = Precision()
