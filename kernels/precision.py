"""In how many bits queries, keys, weights and values are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_ALLOWED = {"qk": ("input", "int8", "int4"), "pv": ("input", "int8", "int4", "fp8")}


@dataclass(frozen=True, slots=True)
class Precision:
    """Operands of the two products of attention; sums are float32 at least.

    Args:
        qk: of queries and keys. `input`: as they come. `int8`: whole numbers up to 127, one scale
            for 64 queries, one for a tile of keys and one for 64 or 128 pooled tokens. `int4`:
            whole numbers up to 7, a scale for each token. One vector of each head, about the mean
            of its keys, is taken from all its keys first: the softmax does not see it, and the
            log-sum-exp gets it back.
        pv: of weights and values. `input`: as they come. `fp8`: float8 e4m3, one scale for a
            channel of a head; weights, at most 1, times 2^8. `int8`: values up to 127, one scale
            for a channel of a tile (or of 64 pooled tokens), weights up to 127, one scale for a
            query and a tile. `int4`: the same with 7 and, since no weight is below 0, with 15.

    Numbers of 4 bits lie two to a byte in memory. No GPU since Hopper multiplies them as such: they
    are multiplied as int8, with the same result, so on those they save memory, not time.

    Raises:
        ValueError: another precision.

    Source: SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958); pv in whole
    numbers: PAROAttention (arXiv 2506.16054). Differs from them: the fast path takes the mean of a
    sample of the keys, since any vector is exact; scales of int4 and of weights are finer.
    """

    qk: Literal["input", "int8", "int4"] = "input"
    pv: Literal["input", "int8", "int4", "fp8"] = "input"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} {given!r}; it can be {', '.join(allowed)}")

    def __str__(self) -> str:
        return f"{self.qk} x {self.pv}"

    def bits(self, product: Literal["qk", "pv"]) -> Literal[4, 8] | None:
        """Of whole numbers; None where they are none."""
        kinds: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
        return kinds.get(getattr(self, product))


INPUT = Precision()
