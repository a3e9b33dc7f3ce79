"""What was asked for and what ran."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionReceipt(_Part):
    """What happened to the self-attention of the denoiser.

    Densities are shares of the pairs of tokens, measured on the plans that ran; a dense call
    counts as 1. `dense` gives the number of dense calls by reason, `kernels` that of the others by
    kernel, `fallbacks` the reasons among those of `dense` that the recipe did not ask for.
    """

    asked: str
    layers: int
    calls: int
    kernels: dict[str, int]
    dense: dict[str, int]
    fallbacks: list[str]
    density: float
    density_by_layer: list[float]


class Receipt(_Part):
    """Requested against ran, for one run of one pipeline."""

    recipe: dict[str, Any]
    strict: bool
    steps: int
    attention: AttentionReceipt | None
    peak_memory_bytes: int | None = None

    def words(self) -> list[str]:
        """The same in plain sentences."""
        if self.attention is None:
            return ["nothing accelerated: the stock pipeline ran"]
        told = self.attention
        sparse = sum(told.kernels.values())
        lines = [f"asked: attention by {told.asked}"]
        if sparse:
            by = ", ".join(f"the {name} kernel" for name in told.kernels)
            low, high = min(told.density_by_layer), max(told.density_by_layer)
            spread = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
            lines.append(
                f"ran: {sparse} of {told.calls} attention calls by {by}; "
                f"{told.density:.0%} of all pairs of tokens computed ({spread} by layer)"
            )
        else:
            lines.append(f"ran: all {told.calls} attention calls dense")
        for reason, count in told.dense.items():
            mark = "fell back: " if reason in told.fallbacks else ""
            lines.append(f"{mark}{count} calls dense {reason}")
        return lines
