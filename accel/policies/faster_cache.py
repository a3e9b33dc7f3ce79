"""`faster-cache`: diffusers' FasterCache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..options import option
from .cache import SEPARATE_GUIDANCE, CachePolicy
from .pyramid_attention_broadcast import check_between

FORMATS = {"CogVideoXTransformer3DModel": "BFCHW", "MochiTransformer3DModel": "BCFHW"}
"""How latents lie, by denoisers whose guidance is one batch, the unconditional half first."""
DISTILLED = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel")
"""Denoisers without an unconditional half."""


class FasterCache(CachePolicy):
    """The unconditional half is told from the other one, and attention from its last two outputs.

    Of so many calls one evaluates both halves of the batch; in the others the unconditional one is
    the other's plus their last difference, which low and high frequencies scale up on their own.
    In those calls, and in all of models whose guidance is distilled, attention is evaluated once
    in so many calls and extrapolated between. All of it while the timestep, which goes from 1000
    to 0, is within bounds.

    Source: diffusers' FasterCache, after FasterCache (arXiv 2410.19355).
    Differs from the paper: attention is extrapolated with one weight, which there grows from 0 to 1
    in a run; the scales are applied again in each call, so that they grow until both halves are
    evaluated.
    """

    name: ClassVar[str] = "faster-cache"
    paper: ClassVar[str] = "arXiv 2410.19355"
    licence: ClassVar[str] = "Apache-2.0"
    use_when: ClassVar[str] = (
        "guidance comes in one batch, as in CogVideoX and Mochi, half of whose cost it saves."
    )
    unit: ClassVar[str] = "attention module"
    one_call: ClassVar[bool] = True
    why_dense: ClassVar[str] = "it halves batches in the middle of a run, which plans do not follow"

    spatial_skip_range: int = option(
        2, "Of so many calls of self-attention one is evaluated", least=1, most=100, unit="calls"
    )
    above_timestep: float = option(
        -1, "Timestep down to which attention is reused", least=-1, most=1001
    )
    below_timestep: float = option(
        681, "Timestep below which attention is reused", least=-1, most=1001
    )
    attention_weight: float = option(
        0.5, "How far attention is extrapolated beyond its last output", least=0, most=1
    )
    unconditional_skip_range: int = option(
        5, "Of so many calls one evaluates the unconditional half", least=1, most=100, unit="calls"
    )
    above_unconditional: float = option(
        -1, "Timestep down to which that half is left out", least=-1, most=1001
    )
    below_unconditional: float = option(
        641, "Timestep below which that half is left out", least=-1, most=1001
    )
    alpha_low_frequency: float = option(
        1.1, "Scale of low frequencies of the difference, at timesteps above 99", least=0, most=10
    )
    alpha_high_frequency: float = option(
        1.1, "Scale of high frequencies of it, at timesteps below 301", least=0, most=10
    )

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        chosen = cls(**values)
        check_between("timestep", chosen.above_timestep, chosen.below_timestep)
        check_between("unconditional", chosen.above_unconditional, chosen.below_unconditional)

    def misfit(self, denoiser: str, config: Mapping[str, Any]) -> str | None:
        """See `CachePolicy`."""
        if denoiser in FORMATS or denoiser in DISTILLED:
            return None
        if denoiser in SEPARATE_GUIDANCE:
            return (
                f"{self.name} leaves the unconditional half out of a batch, and {denoiser} is "
                f"called once for each guidance branch, in whose batches there is no such half: "
                f"choose first-block-cache, or a policy that skips steps"
            )
        return (
            f"{self.name} must know how latents and guidance lie in a batch, which it does of "
            f"{', '.join((*FORMATS, *DISTILLED))}, not of {denoiser}: choose first-block-cache"
        )

    def misbegun(self, denoiser: str, timestep: float, batch: int) -> str | None:
        """See `CachePolicy`."""
        if denoiser in FORMATS:
            return self.misguided(denoiser, 2 - batch % 2)
        if self.above_timestep < timestep < self.below_timestep:
            return (
                f"{self.name} would extrapolate attention before it was evaluated, since the run "
                f"begins at timestep {timestep:g}: set steps.below_timestep to that or less"
            )
        return None

    def misguided(self, denoiser: str, branches: int) -> str | None:
        """See `CachePolicy`."""
        if denoiser not in FORMATS or branches == 2:
            return None
        return f"{self.name} needs guidance, and this run has none: raise the guidance scale"

    def remedy(self) -> str:
        """See `CachePolicy`."""
        return "raise its skip ranges, or widen the bounds of timesteps"
