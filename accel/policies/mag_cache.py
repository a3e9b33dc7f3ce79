"""`mag-cache`: diffusers' MagCache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import RecipeError
from ..options import option
from .cache import CachePolicy


class MagCache(CachePolicy):
    """What the blocks add is reused while its magnitude is known to change little.

    How the magnitude changes from step to step is measured once for a model, as a ratio for each
    step: with `calibrate` nothing is reused and the receipt tells the ratios, which go into
    `mag_ratios`; for another number of steps the nearest is taken. Online, ratios are multiplied
    since the last evaluated step, and the sum of their distances from 1 is held below `threshold`.
    diffusers has ratios for Flux, which need not be given.

    Source: diffusers' MagCache, after MagCache (arXiv 2506.09045).
    Differs from the authors' code: one list of ratios serves all guidance branches, where theirs
    has one for each.
    """

    name: ClassVar[str] = "mag-cache"
    paper: ClassVar[str] = "arXiv 2506.09045"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = (
        "one model makes many videos, so that measuring it once pays: what is reused is then known "
        "before a run."
    )
    from_start: ClassVar[bool] = True

    threshold: float = option(
        0.06, "Sum of the errors foretold since the last evaluated step", least=0, most=10
    )
    max_skip_steps: int = option(
        3, "Steps that may be reused one after another", least=0, most=100, unit="steps"
    )
    retention_ratio: float = option(
        0.2, "Share of the steps that are all evaluated at the start", least=0, most=1,
        unit="of the steps",
    )  # fmt: skip
    mag_ratios: str = option(
        "", "Ratio for each step, with blanks or commas between; empty are those of Flux"
    )
    calibrate: bool = option(False, "Whether to measure the ratios, and reuse nothing")

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        chosen = cls(**values)
        chosen.ratios()
        if chosen.calibrate and chosen.mag_ratios:
            raise RecipeError("steps.calibrate measures the ratios: leave steps.mag_ratios out")

    def ratios(self) -> list[float]:
        """As numbers; none where none are given. Raises RecipeError."""
        try:
            found = [float(it) for it in self.mag_ratios.replace(",", " ").split()]
        except ValueError:
            found = [math.nan]
        if not all(math.isfinite(it) and it > 0 for it in found):
            raise RecipeError(
                f"steps.mag_ratios is {self.mag_ratios[:60]!r}; it must be numbers above 0, one "
                f"for each step, as steps.calibrate=true tells them"
            )
        return found

    def misfit(self, denoiser: str, config: Mapping[str, Any]) -> str | None:
        """See `CachePolicy`."""
        if self.calibrate or self.mag_ratios or denoiser == "FluxTransformer2DModel":
            return None
        return (
            f"mag-cache needs ratios that are measured for a model, and diffusers has none for "
            f"{denoiser}: run once with steps.calibrate=true and give steps.mag_ratios"
        )

    def measures(self) -> bool:
        """See `CachePolicy`."""
        return self.calibrate

    def remedy(self) -> str:
        """See `CachePolicy`."""
        return "raise its threshold, or give ratios of this model and number of steps"
