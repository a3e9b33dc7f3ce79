"""What was asked for and what ran."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, StrictInt

from ..kernels.precision import INPUT
from .table import effective


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionReceipt(_Part):
    """What happened to the self-attention of the denoiser.

    Densities are shares of the pairs of tokens, measured on the plans that ran; a dense call
    counts as 1. `dense` gives the number of dense calls by reason, `kernels` that of the others by
    kernel, `fallbacks` the reasons among those of `dense` that the recipe did not ask for,
    `dense_kernels` the number of dense calls by the kernel that the recipe names for them.
    `precision` is of the operands of both products in the others, as `Precision` is spelled; dense
    calls are the model's own.
    """

    asked: str
    layers: StrictInt
    calls: StrictInt
    kernels: dict[str, StrictInt]
    precision: str = str(INPUT)
    dense: dict[str, StrictInt]
    fallbacks: list[str]
    density: float
    density_by_layer: list[float | None]
    """Of the layers of all denoisers in a row; None where a layer never ran."""
    layer_names: list[str] = []
    """Their modules; empty in records from before these were told."""
    dense_kernels: dict[str, StrictInt] = {}


class StepsReceipt(_Part):
    """What happened to the evaluations of the denoiser.

    `pattern` has a letter for each step: C evaluated, p evaluated on some tokens alone, s skipped;
    `evaluations` counts the former two, `calls` the denoiser's calls in them, one or more for each
    guidance branch. Errors are estimates of |what stood for the output - output| / |output| in
    skipped steps, None where there was none: measured at the next evaluated step, and brought to
    the distance of the skipped one. `raw` says why outputs were extrapolated as they come, where it
    is not known what they say of x0. `kept` is the share of its tokens that a block ran on in the
    steps p, None where there was none, `cache_bytes` what was kept of others for them, `inert` why
    nothing was pruned where that was asked for.
    """

    asked: str
    pattern: str
    evaluations: StrictInt
    calls: StrictInt
    mean_error: FiniteFloat | None
    max_error: FiniteFloat | None
    raw: str = ""
    kept: FiniteFloat | None = None
    cache_bytes: StrictInt = 0
    inert: str = ""

    def words(self) -> list[str]:
        """The same in plain sentences."""
        lines = [f"asked: steps by {self.asked}"]
        if not self.pattern:
            return [*lines, "nothing has run yet"]
        skipped = self.pattern.count("s")
        lines.append(
            f"ran: {self.evaluations} of {len(self.pattern)} steps evaluated in {self.calls} calls "
            f"of the denoiser, {skipped} skipped: {self.pattern}"
        )
        if self.kept is not None:
            lines.append(
                f"pruned: {self.pattern.count('p')} of these steps ran on {self.kept:.0%} of the "
                f"tokens; {self.cache_bytes / 1e6:.1f} MB kept for the others"
            )
        if self.inert:
            lines.append(f"inert: {self.inert}")
        if self.mean_error is not None and self.max_error is not None:
            lines.append(
                f"estimated error of what stood for a skipped step: {self.mean_error:.2%} on "
                f"average, {self.max_error:.2%} at most"
            )
        if self.raw:
            lines.append(f"fell back: outputs are extrapolated as they come, since {self.raw}")
        return lines


class CacheReceipt(_Part):
    """What a cache did inside of the denoiser.

    It stands on `hooked` modules, each of which is a `unit`; of `calls` to them the modules
    answered `evaluated` themselves. `halved` counts calls of the denoiser without the unconditional
    half of their batch. `pattern` has a letter for each step: C evaluated whole, r something
    reused. `inert` says why nothing was, where that is so; `ratios` are those of a calibration.
    """

    asked: str
    unit: str
    hooked: StrictInt
    calls: StrictInt
    evaluated: StrictInt
    halved: StrictInt = 0
    pattern: str
    inert: str = ""
    ratios: list[FiniteFloat] = []

    def words(self) -> list[str]:
        """The same in plain sentences."""
        lines = [f"asked: steps by {self.asked}"]
        if self.pattern and self.hooked:
            lines.append(
                f"ran: {self.calls - self.evaluated} of {self.calls} calls of {self.hooked} "
                f"{self.unit}s reused, in {self.pattern.count('r')} of {len(self.pattern)} steps: "
                f"{self.pattern}"
            )
        if self.halved:
            lines.append(f"the unconditional half was left out of {self.halved} batches")
        if self.ratios:
            lines.append(f"measured: mag_ratios = {' '.join(f'{it:g}' for it in self.ratios)}")
        if self.inert:
            lines.append(f"inert: {self.inert}")
        return lines if len(lines) > 1 else [*lines, "nothing has run yet"]


class Receipt(_Part):
    """Requested against ran, for one run of one pipeline.

    `words` leaves the times out: those who print a receipt draw them as a table beside it.
    """

    recipe: dict[str, Any]
    strict: bool
    steps: StrictInt | None
    """Followed; None where nothing was attached."""
    skipped: StrictInt = 0
    """Steps for which the denoiser was not evaluated."""
    attention: AttentionReceipt | None
    policy: StepsReceipt | None = None
    """Of the step policy; None where there is none that skips steps."""
    cache: CacheReceipt | None = None
    """Of the step policy, where it is a cache."""
    processes: StrictInt = 1
    """That made it together."""
    peak_memory_bytes: StrictInt | None = None
    """The most that the process has held so far, on the accelerator if there is one."""
    stages_s: dict[str, FiniteFloat] = {}
    """Seconds by stage; empty where only a session, which sees no stages, has written it."""

    @property
    def evaluated(self) -> float | None:
        """The share of steps, or of a cache's calls, that was computed; None without a policy."""
        if self.policy is not None and self.policy.pattern:
            return self.policy.evaluations / len(self.policy.pattern)
        if self.cache is not None and self.cache.calls:
            return self.cache.evaluated / self.cache.calls
        return None

    @property
    def density(self) -> float | None:
        """The share of pairs of tokens that was computed; None where nothing attended."""
        return (
            None if self.attention is None or not self.attention.calls else self.attention.density
        )

    @property
    def stock(self) -> bool:
        """Whether nothing ran otherwise than without the recipe, whatever that asked for."""
        attention, policy, cache = self.attention, self.policy, self.cache
        return not (
            self.processes > 1
            or self.skipped
            or (attention is not None and (attention.kernels or attention.dense_kernels))
            or (policy is not None and policy.pattern.strip("C"))
            or (cache is not None and (cache.evaluated < cache.calls or cache.halved))
        )

    def words(self) -> list[str]:
        """The same in plain sentences."""
        if not effective(self.recipe):
            return ["nothing accelerated: the stock pipeline ran"]
        steps = self.policy or self.cache
        lines = [*(steps.words() if steps else ()), *self._attention()]
        if self.processes > 1:
            lines.append(f"made by {self.processes} processes together")
        if self.peak_memory_bytes is not None:
            lines.append(f"peak memory of the process so far {self.peak_memory_bytes / 1e9:.1f} GB")
        return lines

    def _attention(self) -> list[str]:
        told = self.attention
        if told is None:
            return []
        sparse = sum(told.kernels.values())
        lines = [f"asked: attention by {told.asked}"]
        if not told.calls:
            return [*lines, "nothing has run yet"]
        if sparse:
            by = ", ".join(f"the {name} kernel" for name in told.kernels)
            by += "" if told.precision == str(INPUT) else f" in {told.precision}"
            by_layer = [it for it in told.density_by_layer if it is not None]
            low, high = min(by_layer), max(by_layer)
            alike = f"{low:.0%}" == f"{high:.0%}"
            spread = "in every layer" if alike else f"({low:.0%} to {high:.0%} by layer)"
            lines.append(
                f"ran: {sparse} of {told.calls} attention calls by {by}; "
                f"{told.density:.0%} of all pairs of tokens computed {spread}"
            )
        else:
            lines.append(f"ran: all {told.calls} attention calls dense")
        for reason, count in told.dense.items():
            mark = "fell back: " if reason in told.fallbacks else ""
            lines.append(f"{mark}{count} calls dense {reason}")
        lines += [
            f"{count} dense calls by the {name} kernel"
            for name, count in told.dense_kernels.items()
        ]
        return lines
