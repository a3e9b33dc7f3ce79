"""diffusers' caches on a denoiser: put on, counted from inside of their hooks, and taken off."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.hooks import _common as common
from diffusers.hooks import mag_cache
from diffusers.hooks.hooks import CacheContext, StateManager

from ..errors import AccelerationError
from ..policies import (
    CachePolicy,
    FasterCache,
    FirstBlockCache,
    MagCache,
    PyramidAttentionBroadcast,
    SeaCache,
    TaylorSeer,
)
from ..policies.faster_cache import DISTILLED, FORMATS


@dataclass
class Tally:
    """What was counted in a run."""

    calls: int = 0
    """Of the modules that a cache stands on."""
    evaluated: int = 0
    """Those among them that the module itself answered."""
    halved: int = 0
    """Calls of the denoiser that went on with less than the batch that was given."""
    pattern: str = ""
    """A letter for each step that is done: C evaluated whole, r something reused."""
    ratios: list[float] = field(default_factory=list[float])
    """That a calibration has measured."""


@dataclass
class Stood:
    """A cache on one denoiser."""

    hooked: int = 0
    """Modules that it stands on."""
    managers: list[Any] = field(default_factory=list[Any])
    """diffusers' `StateManager`s, each with a past for each name of a context."""
    calls_a_step: int = 0
    """That it counts on; 0 is any number."""


Timestep = Callable[[], float]


def config_of(policy: CachePolicy, denoiser: str, steps: int, timestep: Timestep) -> Any:
    """diffusers' own options for a cache.

    Args:
        denoiser: its class.
        steps: of the run.
        timestep: tells that of the step that runs.
    """
    match policy:
        case FirstBlockCache():
            return diffusers.FirstBlockCacheConfig(threshold=policy.threshold)
        case TaylorSeer():
            return diffusers.TaylorSeerCacheConfig(
                cache_interval=policy.cache_interval,
                disable_cache_before_step=policy.disable_cache_before_step,
                disable_cache_after_step=policy.disable_cache_after_step or None,
                max_order=policy.max_order,
                taylor_factors_dtype=getattr(torch, policy.taylor_factors_dtype),
                cache_identifiers=[policy.cache_identifiers] if policy.cache_identifiers else None,
                skip_predict_identifiers=[policy.skip_predict_identifiers]
                if policy.skip_predict_identifiers
                else None,
                use_lite_mode=policy.use_lite_mode,
            )
        case MagCache():
            ratios = policy.ratios() or mag_cache.FLUX_MAG_RATIOS
            return diffusers.MagCacheConfig(
                threshold=policy.threshold,
                max_skip_steps=policy.max_skip_steps,
                retention_ratio=policy.retention_ratio,
                # After its last step it prints the ratios and forgets them: that is not to come.
                num_inference_steps=steps + policy.calibrate,
                mag_ratios=None if policy.calibrate else ratios,
                calibrate=policy.calibrate,
            )
        case SeaCache():
            return diffusers.SeaCacheConfig(
                threshold=policy.threshold,
                residual_order=policy.residual_order,
                retention_steps=policy.retention_steps,
                cache_end_steps=policy.cache_end_steps,
                max_consecutive_cached=policy.max_consecutive_cached,
                power_exp=policy.power_exp,
            )
        case PyramidAttentionBroadcast():
            bounds: Any = (policy.above_timestep, policy.below_timestep)
            return diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=policy.spatial_skip_range or None,
                temporal_attention_block_skip_range=policy.temporal_skip_range or None,
                cross_attention_block_skip_range=policy.cross_skip_range or None,
                spatial_attention_timestep_skip_range=bounds,
                temporal_attention_timestep_skip_range=bounds,
                cross_attention_timestep_skip_range=bounds,
                current_timestep_callback=timestep,  # pyright: ignore[reportArgumentType]
            )
        case FasterCache():
            attention: Any = (policy.above_timestep, policy.below_timestep)
            half: Any = (policy.above_unconditional, policy.below_unconditional)
            return diffusers.FasterCacheConfig(
                spatial_attention_block_skip_range=policy.spatial_skip_range,
                spatial_attention_timestep_skip_range=attention,
                unconditional_batch_skip_range=policy.unconditional_skip_range,
                unconditional_batch_timestep_skip_range=half,
                attention_weight_callback=lambda _: policy.attention_weight,
                alpha_low_frequency=policy.alpha_low_frequency,
                alpha_high_frequency=policy.alpha_high_frequency,
                tensor_format=FORMATS.get(denoiser, "BCFHW"),
                is_guidance_distilled=denoiser in DISTILLED,
                current_timestep_callback=timestep,  # pyright: ignore[reportArgumentType]
            )
        case _:
            raise TypeError(f"{policy.name} is none of diffusers' caches")


def blocks_in(inner: Any) -> list[Any]:
    """The blocks that diffusers' caches find in a denoiser."""
    names = common._ALL_TRANSFORMER_BLOCK_IDENTIFIERS  # pyright: ignore[reportPrivateUsage]
    return [
        block
        for name, it in inner.named_children()
        if name in names and isinstance(it, torch.nn.ModuleList)
        for block in it
    ]


@contextmanager
def on(
    policy: CachePolicy, inner: Any, steps: int, timestep: Timestep, tally: Tally
) -> Generator[Stood, None, None]:
    """A cache on a denoiser, which is as before afterwards.

    Calls are counted in its hooks, around what each makes of a call and around the module's own.

    Raises:
        AccelerationError: diffusers refuses.
    """
    modules = list(inner.modules())
    owned = [_OURS & vars(it).keys() for it in modules]
    hooks_before = [list(_hooks(it)) for it in modules]
    config = config_of(policy, type(inner).__name__, steps, timestep)
    with ExitStack() as stack:
        stack.callback(_clean, modules, owned, hooks_before)
        try:
            inner.enable_cache(config)
        except (ValueError, IndexError, AttributeError) as error:
            raise AccelerationError(
                f"{policy.name} cannot be put on {type(inner).__name__}: {error}"
            ) from error
        stack.callback(inner.disable_cache)
        stood = Stood()
        for module, earlier in zip(modules, hooks_before, strict=True):
            hooks = [it for name, it in _hooks(module).items() if name not in earlier]
            kept = [it for hook in hooks for it in vars(hook).values()]
            stood.managers += [it for it in kept if isinstance(it, StateManager)]
            # Those without it leave the call to the module.
            answering = [it.fn_ref for it in hooks if hasattr(it, "new_forward")]
            if not answering:
                continue
            asked, own = _halves(tally) if module is inner else _calls(tally)
            stood.hooked += module is not inner
            stack.enter_context(_noted(answering[-1], "forward", asked))
            stack.enter_context(_noted(answering[0], "original_forward", own))
        yield stood


@contextmanager
def placed(
    managers: list[Any], name: str, step: int, steps: int, sigma: float | None
) -> Generator[None, None, None]:
    """Tell a cache which call of a run it is, as far as the pipeline does not."""
    given = [it._context for it in managers]
    for manager, earlier in zip(managers, given, strict=True):
        if earlier is None or earlier.step_index is None:
            of = name if earlier is None else earlier.name
            manager.set_context(
                CacheContext(of, step_index=step, num_inference_steps=steps, sigma=sigma)
            )
    try:
        yield
    finally:
        for manager, earlier in zip(managers, given, strict=True):
            manager.set_context(earlier)


def measured_ratios(managers: list[Any]) -> list[float]:
    """What a calibration of MagCache has measured, of the branch that was called first."""
    states = [state for it in managers for state in it._state_cache.values()]
    return list(states[0].calibration_ratios) if states else []


Note = Callable[[tuple[Any, ...], Mapping[str, Any]], None]
_OURS = {"forward", "_diffusers_hook", "_cache_config"}
"""What caches leave behind on a module."""


def _hooks(module: Any) -> dict[str, Any]:
    """The hooks of diffusers on a module, by name, the innermost first."""
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def _calls(tally: Tally) -> tuple[Note, Note]:
    """Notes of calls to a module, and of those that it answers itself."""

    def asked(*_: Any) -> None:
        tally.calls += 1

    def own(*_: Any) -> None:
        tally.evaluated += 1

    return asked, own


def _halves(tally: Tally) -> tuple[Note, Note]:
    """Notes of the batch that the denoiser is given, and of that with which it goes on."""
    batch = 0

    def size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        return next(len(it) for it in (*args, *kwargs.values()) if isinstance(it, torch.Tensor))

    def asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal batch
        batch = size(args, kwargs)

    def own(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tally.halved += size(args, kwargs) < batch

    return asked, own


@contextmanager
def _noted(reference: Any, name: str, note: Note) -> Generator[None, None, None]:
    """Note the calls of a function that a hook refers to."""
    earlier = getattr(reference, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note(args, kwargs)
        return earlier(*args, **kwargs)

    setattr(reference, name, noted)
    try:
        yield
    finally:
        setattr(reference, name, earlier)


def _clean(modules: list[Any], owned: list[set[str]], hooks: list[list[str]]) -> None:
    """Take off what was put on half, and what diffusers leaves on modules."""
    for module, had, earlier in zip(modules, owned, hooks, strict=True):
        for name in reversed([it for it in _hooks(module) if it not in earlier]):
            vars(module)["_diffusers_hook"].remove_hook(name, recurse=False)
        if not _hooks(module):
            for name in _OURS - had:
                vars(module).pop(name, None)
