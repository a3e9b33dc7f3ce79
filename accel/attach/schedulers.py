"""What diffusers' schedulers make of an output: noise levels, and which policies must refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..codec import PREDICTIONS, Codec, Level, Prediction
from ..steps import Schedule, StepPolicy

_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Samples of constant variance or of flow matching, whose `sigmas` are sigma / alpha or sigma."""
_DDIM = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "PNDMScheduler",
)
"""Samples of constant variance, whose level is told by the timestep."""
_STOCHASTIC = (
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DPMSolverSDEScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "RFD4ProteinaScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
    "VQDiffusionScheduler",
)
_FEW_STEPS = (
    "CMStochasticIterativeScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "LCMScheduler",
    "PiflowScheduler",
    "SCMScheduler",
    "TCDScheduler",
)
_REMEDY = "choose another scheduler, or leave the step policy out"


def refusal(scheduler: Any, policy: StepPolicy) -> str | None:
    """Why `policy` cannot skip steps of `scheduler`, or None."""
    name, config = type(scheduler).__name__, scheduler.config
    draws = (
        name in _STOCHASTIC
        or str(config.get("algorithm_type", "")).startswith("sde-")
        or config.get("stochastic_sampling", False)
    )
    if draws:
        return (
            f"{name} draws new noise in each step, of which past steps tell nothing: choose a "
            f"deterministic scheduler, or leave the step policy out"
        )
    if name in _FEW_STEPS:
        return f"{name} is for models of few steps, none of which can be skipped: {_REMEDY}"
    several = (
        getattr(scheduler, "order", 1) > 1
        or name == "DPMSolverSinglestepScheduler"
        or (name == "PNDMScheduler" and not config.get("skip_prk_steps", False))
    )
    if several:
        return f"{name} takes several evaluations for a step, which belong together: {_REMEDY}"
    if policy.needs_x0():
        _, why = _codec(name, config)
        if why:
            return f"{policy.name} must know x0, but {why}: {_REMEDY}"
    return None


def timesteps_of(scheduler: Any, steps: int) -> int:
    """How many timesteps `scheduler` makes of so many steps; `steps` where it makes none of them.

    PNDM has one more, since it evaluates the second twice.
    """
    shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        scheduler.set_timesteps(steps, **shifted)
    except (TypeError, ValueError):  # what no run could do, or does in its own way
        return steps
    return len(scheduler.timesteps)


def refused_arguments(given: Mapping[str, Any]) -> str | None:
    """Why a call of `scheduler.step` with these arguments cannot be foretold, or None."""
    for name in ("eta", "s_churn"):
        if (given.get(name) or 0) > 0:
            return (
                f"{name} is {given[name]:g}, which draws new noise in each step: set it to 0, or "
                f"leave the step policy out"
            )
    if given.get("per_token_timesteps") is not None:
        return "the pipeline gives each token a timestep of its own: leave the step policy out"
    return None


def why_raw(scheduler: Any) -> str:
    """Why outputs of `scheduler` would be extrapolated as they come; empty where x0 is known."""
    return _codec(type(scheduler).__name__, scheduler.config)[1]


def schedule_of(scheduler: Any) -> Schedule:
    """The schedule that `set_timesteps` has left in `scheduler`."""
    name, config = type(scheduler).__name__, scheduler.config
    codec, why = _codec(name, config)
    steps = len(scheduler.timesteps)
    timesteps: list[float] = scheduler.timesteps.tolist()
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = None if sigmas is None or len(sigmas) < steps else sigmas[:steps].tolist()
    if codec is None:
        return Schedule(_unknown(timesteps, sigmas), None, why)
    if name in _DDIM:
        products = [float(scheduler.alphas_cumprod[int(it)]) for it in timesteps]
        levels = [(it**0.5, (1 - it) ** 0.5) for it in products]
    else:
        assert sigmas is not None
        levels = [_level(name, config, it) for it in sigmas]
    if codec.prediction in ("flow_prediction", "reverse_flow") or config.get("use_flow_sigmas"):
        return Schedule(tuple(Level(a, s, time=s) for a, s in levels), codec)
    return Schedule(tuple(_timed(scheduler, levels)), codec)


def _level(name: str, config: Mapping[str, Any], sigma: float) -> tuple[float, float]:
    """Alpha and sigma from what the scheduler calls sigma."""
    if name == "EulerDiscreteScheduler":
        return 1.0, sigma
    if name == "FlowMatchEulerDiscreteScheduler":
        return (sigma, 1 - sigma) if config.get("invert_sigmas") else (1 - sigma, sigma)
    if config.get("use_flow_sigmas"):
        return 1 - sigma, sigma
    alpha = (sigma**2 + 1) ** -0.5
    return alpha, sigma * alpha


def _timed(scheduler: Any, levels: list[tuple[float, float]]) -> list[Level]:
    """Levels with their time in training, from 0 to 1, and beta there in the same unit.

    By their ratio, since timesteps are rounded, or mean something else, in some schedulers.
    """
    products = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
    count = len(products)
    trained = 0.5 * (np.log1p(-products) - np.log(np.maximum(products, 1e-12)))
    betas = np.asarray(scheduler.betas, dtype=np.float64)
    found: list[Level] = []
    for alpha, sigma in levels:
        ratio = math.log(max(sigma, 1e-12)) - math.log(max(alpha, 1e-12))
        place = float(np.interp(ratio, trained, np.arange(count)))
        rate = count * float(np.interp(place, np.arange(count), betas))
        found.append(Level(alpha, sigma, time=(place + 1) / count, rate=rate))
    return found


def _unknown(timesteps: list[float], sigmas: list[float] | None) -> tuple[Level, ...]:
    """Levels that serve as an axis only: by `sigmas`, or by the timesteps."""
    if sigmas is not None and all(it > 0 for it in sigmas):
        return tuple(Level(1.0, it, time=it / (1 + it)) for it in sigmas)
    most = max(map(abs, timesteps)) or 1.0
    return tuple(Level(1 - it / most, it / most, time=it / most) for it in timesteps)


def _codec(name: str, config: Mapping[str, Any]) -> tuple[Codec | None, str]:
    """What an output means, or None and why that is not known."""
    if name == "FlowMatchEulerDiscreteScheduler":
        return Codec("reverse_flow" if config.get("invert_sigmas") else "flow_prediction"), ""
    if name not in (*_MULTISTEP, *_DDIM, "EulerDiscreteScheduler"):
        return None, f"what {name} makes of an output is not known"
    told = str(config.get("prediction_type", "epsilon"))
    told = "sample" if told == "original_sample" else told
    flow = bool(config.get("use_flow_sigmas", False))
    known: dict[str, Prediction] = {it: it for it in PREDICTIONS}
    odd = (told == "flow_prediction") != flow and told in ("flow_prediction", "v_prediction")
    if told not in known or odd:
        return None, f"what {name} makes of {told} is not known" + (" for these sigmas" * odd)
    if told == "epsilon" and config.get("rescale_betas_zero_snr"):
        return None, "at pure noise, where this schedule begins, epsilon tells nothing of x0"
    return Codec(known[told]), ""
