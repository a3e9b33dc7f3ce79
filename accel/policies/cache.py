"""What the caches have in common: a library's own, put on the blocks of the denoiser for a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..steps import Schedule, StepPolicy, StepRun

SEPARATE_GUIDANCE = frozenset(
    {
        "CogView4Transformer2DModel",
        "HeliosTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "WanAnimateTransformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    }
)
"""Denoisers whose pipelines call them once for each guidance branch."""


class CachePolicy(StepPolicy):
    """Every step calls the denoiser; what its modules returned in earlier steps is used again."""

    library: ClassVar[str] = "diffusers"
    unit: ClassVar[str] = "block"
    """What is reused whole, in words that take an s."""
    one_call: ClassVar[bool] = False
    """Whether it keeps one past for all calls, so that a step may make only one."""
    from_start: ClassVar[bool] = False
    """Whether it counts steps from the first one of the schedule, for one denoiser."""
    shards: ClassVar[bool] = True
    """Whether several processes that share a run decide alike."""
    why_dense: ClassVar[str] = ""
    """Why its calls cannot go with sparse attention; empty where they can."""

    def misfit(self, denoiser: str, config: Mapping[str, Any]) -> str | None:
        """Why it is wrong for a class of denoisers of this config, or None."""
        del denoiser, config
        return None

    def misbegun(self, denoiser: str, timestep: float, batch: int) -> str | None:
        """Why it is wrong for a run whose first call is of this timestep and batch, or None."""
        del denoiser, timestep, batch
        return None

    def misguided(self, denoiser: str, branches: int) -> str | None:
        """Why it is wrong where so many guidance branches come in one batch, or None."""
        del denoiser, branches
        return None

    def measures(self) -> bool:
        """Whether it is to measure, and to reuse nothing."""
        return False

    def elsewhere(self) -> str:
        """What to do where it found nothing to stand on, in words that follow a colon."""
        return "choose first-block-cache, or a policy that skips steps"

    def remedy(self) -> str:
        """What to do where it reused nothing, in words that follow a colon."""
        return "raise its threshold"

    def start(self, schedule: Schedule) -> StepRun:
        """No step is left out, so that there is no run of it. Raises TypeError."""
        raise TypeError(f"{self.name} skips no steps: it is put on denoisers")

    def computed(self, steps: int, experts: int = 1) -> tuple[int, int]:
        """See `StepPolicy`: it is blocks that are left out."""
        del experts
        return steps, steps
