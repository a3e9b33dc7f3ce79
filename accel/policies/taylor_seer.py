"""`taylorseer`: diffusers' TaylorSeer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..errors import RecipeError
from ..options import option
from .cache import CachePolicy


class TaylorSeer(CachePolicy):
    """Outputs of modules are foretold by a Taylor series in the step's number, in a fixed rhythm.

    The first steps are evaluated, then one of `cache_interval`; in the others each cached module
    returns the series of its last evaluated outputs. Cached are the attention modules, or those
    that `cache_identifiers` matches whole; in the lite mode the blocks are left out and the last
    projection alone is foretold, which takes little memory. diffusers looks for modules called
    `attn` and finds none in Wan and CogVideoX, whose are called `attn1`: there it is inert unless
    told otherwise.

    Source: diffusers' TaylorSeerCache, after TaylorSeer (arXiv 2503.06923).
    Differs from the paper: the abscissa is the number of the step, not the timestep.
    """

    name: ClassVar[str] = "taylorseer"
    paper: ClassVar[str] = "arXiv 2503.06923"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = (
        "a fixed rhythm and long skips are wanted; the lite mode is the one for video models."
    )
    unit: ClassVar[str] = "module"

    cache_interval: int = option(
        5, "Of so many steps one is evaluated", least=1, most=100, unit="steps"
    )
    disable_cache_before_step: int = option(
        3, "Steps that are all evaluated at the start", least=1, most=1000, unit="steps"
    )
    disable_cache_after_step: int = option(
        0, "Step from which all are evaluated again; 0 is none", least=0, most=1000, unit="steps"
    )
    max_order: int = option(1, "Order of the series", least=0, most=4)
    taylor_factors_dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "Type in which the terms of the series are kept"
    )
    use_lite_mode: bool = option(False, "Whether to leave out blocks, and foretell proj_out alone")
    cache_identifiers: str = option(
        "",
        "Pattern of the names of cached modules, such as blocks[.].*attn1; empty as in diffusers",
    )
    skip_predict_identifiers: str = option(
        "", "Pattern of the names of modules that return zeros instead"
    )

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        chosen = cls(**values)
        for name in ("cache_identifiers", "skip_predict_identifiers"):
            pattern = getattr(chosen, name)
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(
                    f"steps.{name} is {pattern[:60]!r}; it must be a regular expression: {error}"
                ) from error
            if chosen.use_lite_mode and pattern:
                raise RecipeError(
                    f"steps.use_lite_mode has modules of its own: leave steps.{name} out"
                )

    def elsewhere(self) -> str:
        """See `CachePolicy`."""
        return "set steps.use_lite_mode=true, or steps.cache_identifiers such as blocks[.].*attn1"

    def remedy(self) -> str:
        """See `CachePolicy`."""
        return "raise cache_interval, or the number of steps above disable_cache_before_step"
