"""`pyramid-attention-broadcast`: diffusers' PAB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import RecipeError
from ..options import option
from .cache import SEPARATE_GUIDANCE, CachePolicy


class PyramidAttentionBroadcast(CachePolicy):
    """Attention modules return what they did in earlier steps, in a fixed rhythm.

    Of so many calls one is evaluated, for attention in space, in time and to the text with ranges
    of their own, while the timestep is within bounds; a timestep goes from 1000 to 0. It saves
    attention only, and keeps an output for each module.

    Source: diffusers' PyramidAttentionBroadcast, after PAB (arXiv 2408.12588).
    Differs from the authors' code: feed-forward layers are not reused.
    """

    name: ClassVar[str] = "pyramid-attention-broadcast"
    paper: ClassVar[str] = "arXiv 2408.12588"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = (
        "guidance comes in one batch, as in CogVideoX and Mochi, or is distilled; not for Wan."
    )
    unit: ClassVar[str] = "attention module"
    one_call: ClassVar[bool] = True

    spatial_skip_range: int = option(
        2, "Of so many calls of self-attention one is evaluated; 0 leaves it alone",
        least=0, most=100, unit="calls",
    )  # fmt: skip
    temporal_skip_range: int = option(
        0, "The same of attention in time, in models that have it", least=0, most=100, unit="calls"
    )
    cross_skip_range: int = option(
        0, "The same of attention to the text, where it is apart", least=0, most=100, unit="calls"
    )
    above_timestep: float = option(
        100, "Timestep down to which calls are reused", least=-1, most=1001
    )
    below_timestep: float = option(
        800, "Timestep below which calls are reused", least=-1, most=1001
    )

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        chosen = cls(**values)
        check_between("timestep", chosen.above_timestep, chosen.below_timestep)
        if not any(
            (chosen.spatial_skip_range, chosen.temporal_skip_range, chosen.cross_skip_range)
        ):
            raise RecipeError(
                "steps.spatial_skip_range, temporal_skip_range and cross_skip_range are all 0, "
                "which reuses nothing: give one of them"
            )

    def misfit(self, denoiser: str, config: Mapping[str, Any]) -> str | None:
        """See `CachePolicy`."""
        if denoiser not in SEPARATE_GUIDANCE:
            return None
        return (
            f"{self.name} keeps one past for all calls, and {denoiser} is called once for each "
            f"guidance branch, so that one branch would get the attention of the other: choose "
            f"first-block-cache, or a policy that skips steps"
        )

    def remedy(self) -> str:
        """See `CachePolicy`."""
        return "raise its skip ranges, or widen above_timestep to below_timestep"


def check_between(what: str, above: float, below: float) -> None:
    """Raise `RecipeError` where nothing is between two bounds of `what`."""
    if above >= below:
        raise RecipeError(
            f"steps.above_{what} {above:g} must be less than steps.below_{what} {below:g}, else "
            f"nothing is reused"
        )
