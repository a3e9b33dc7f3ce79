"""What runs took, by their receipts: seconds by stage, evaluations, density, memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..pipelines.sidecar import Record

STAGES = ("text", "denoise", "decode")
"""What a recipe can change. Loading and saving are the disk's."""
WHOLE = "all three"
_LOADING_S = 0.5
"""A run that loaded for longer was the first of its process, which compiles and warms up."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the runs of one recipe.

    `seconds` are medians by stage, and of their sum as `WHOLE`, over `timed` of the `runs`: those
    that came first in their process are left out where there are others. `evaluations` of the
    denoiser of `steps`, and `density`, the share of pairs of tokens computed in those, are means; a
    cache counts by the calls of its modules. `memory_bytes` is the most that a process held.
    """

    runs: int
    timed: int
    seconds: dict[str, float]
    steps: float
    evaluations: float
    density: float
    memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cost(records: Sequence[Record]) -> Cost:
    """Sum up runs; each must have a receipt. Raises `ValueError` where there are none."""
    if not records:
        raise ValueError("0 runs cost nothing: give at least one")
    warm = [it for it in records if it.stages_s.get("load", 0.0) < _LOADING_S] or list(records)
    seconds = {stage: _median(it.stages_s.get(stage, 0.0) for it in warm) for stage in STAGES}
    seconds[WHOLE] = _median(sum(it.stages_s.get(stage, 0.0) for stage in STAGES) for it in warm)
    receipts = (it.receipt for it in records if it.receipt is not None)
    held = [it.peak_memory_bytes for it in receipts if it.peak_memory_bytes is not None]
    return Cost(
        runs=len(records),
        timed=len(warm),
        seconds=seconds,
        steps=statistics.fmean(it.request.steps for it in records),
        evaluations=statistics.fmean(
            it.request.steps * _whole(it.receipt and it.receipt.evaluated) for it in records
        ),
        density=statistics.fmean(_whole(it.receipt and it.receipt.density) for it in records),
        memory_bytes=max(held, default=None),
    )


def gain(fast: Cost, dense: Cost, stage: str = WHOLE) -> float | None:
    """How many times as fast; None where a stage took no measurable time."""
    ours, theirs = fast.seconds[stage], dense.seconds[stage]
    return theirs / ours if min(ours, theirs) > 0 else None


def computed_all(record: Record) -> bool:
    """Whether no step and no pair of tokens was left out."""
    told = record.receipt
    return told is not None and _whole(told.evaluated) == 1 and _whole(told.density) == 1


def _whole(share: float | None) -> float:
    return 1.0 if share is None else share


def _median(values: Any) -> float:
    return float(statistics.median(values))
