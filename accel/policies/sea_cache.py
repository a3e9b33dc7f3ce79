"""`sea-cache`: diffusers' SeaCache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..options import option
from .cache import CachePolicy


class SeaCache(CachePolicy):
    """What the blocks add is reused while the latents change little where the signal is.

    Latents are filtered by the Wiener gain for their noise level and a power spectrum f^-p; the
    relative change from step to step is added up, and what the blocks added is foretold until the
    sum reaches `threshold`.

    Source: diffusers' SeaCache, after SeaCache (arXiv 2602.18993).
    Differs from the authors' code: not compared; diffusers' is run as it is, which knows Wan's
    text-to-video denoiser, and Cosmos 3, whose blocks are not followed here.
    """

    name: ClassVar[str] = "sea-cache"
    paper: ClassVar[str] = "arXiv 2602.18993"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = "Wan makes videos from text: it measures nothing inside of the model."
    shards: ClassVar[bool] = False

    threshold: float = option(
        0.25, "Change of the filtered latents, added up, from which a step is evaluated",
        least=0, most=100,
    )  # fmt: skip
    residual_order: int = option(
        1, "Whether the last residual is held (0) or a line goes through two", least=0, most=1
    )
    retention_steps: int = option(
        1, "Steps that are all evaluated at the start", least=0, most=1000, unit="steps"
    )
    cache_end_steps: int = option(
        1, "Steps that are all evaluated at the end", least=0, most=1000, unit="steps"
    )
    max_consecutive_cached: int = option(
        2, "Steps that may be reused one after another; 0 is any number", least=0, most=1000,
        unit="steps",
    )  # fmt: skip
    power_exp: float = option(
        3.0, "Exponent of the power spectrum of clean latents", above=0, most=10
    )

    def misfit(self, denoiser: str, config: Mapping[str, Any]) -> str | None:
        """See `CachePolicy`."""
        if denoiser != "WanTransformer3DModel":
            return (
                f"sea-cache finds the latents in Wan's text-to-video denoiser alone, not in "
                f"{denoiser}: choose first-block-cache"
            )
        if config.get("in_channels") != config.get("out_channels"):
            return (
                "sea-cache takes all channels for latents, and this WanTransformer3DModel gets a "
                "picture beside them: choose first-block-cache"
            )
        return None
