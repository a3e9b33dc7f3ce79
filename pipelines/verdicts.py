"""What each part of a recipe would do on a model and a device, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from . import cards, memory
from .chatter import relayed
from .errors import AccelerationError, ModelError, RecipeError
from .folder import ModelFolder, WeightFile, fingerprint
from .request import Resolved

if TYPE_CHECKING:
    from ..accel.attach.family import Family
    from ..accel.cost import Prediction, Shape
    from ..accel.method import AttentionMethod
    from ..accel.policies import CachePolicy

Verdict = Literal["ok", "idle", "adjusted", "refused"]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a recipe, or the weights where they are absent.

    `speedup` is that of the denoising, or None where nothing is known. `refused`: the run would be
    refused; `adjusted`: it would run, but not as asked, `why` says how; `idle`: as asked, but here
    that means that nothing is accelerated. `workspace_bytes` are needed during a denoising step.
    """

    part: str
    asked: str
    verdict: Verdict
    why: str
    density: float
    speedup: float | None
    workspace_bytes: int = 0

    @property
    def dense(self) -> bool:
        """Whether it would accelerate no attention that it was to."""
        return self.part == "attention" and self.density >= 1


def parts(resolved: Resolved, folder: ModelFolder, files: Sequence[WeightFile]) -> list[Part]:
    """What the parts of the recipe would do; without `files` it is not known of which weights."""
    found = (
        attention(resolved, folder, files),
        dense_kernel(resolved, folder),
        steps(resolved, folder),
        parallel(resolved, folder),
    )
    return [it for it in found if it]


def attention(resolved: Resolved, folder: ModelFolder, files: Sequence[WeightFile]) -> Part | None:
    """What the attention part would do."""
    from ..accel.recipe import from_table

    chosen = from_table(resolved.recipe)
    if chosen.attention is None:
        return None
    asked = chosen.attention.words()
    try:
        shape = shape_of(folder)
    except RecipeError as error:
        return Part("attention", asked, "refused", str(error), 1.0, None)
    why = unfit(chosen.attention, files)
    if why is not None:
        return Part("attention", asked, "refused", why, 1.0, None)
    found = predicted(resolved, shape)
    if found.density >= 1:
        why = f"all calls run dense {found.dense or found.why_dense}"
        verdict: Verdict = "adjusted" if found.dense else "idle"
        return Part("attention", asked, verdict, why, 1.0, 1.0)
    why = (
        f"{found.density:.0%} of all pairs of tokens by the {found.kernel} kernel"
        + (f" in {found.precision}; " if found.precision else "; ")
        + f"dense, attention would take {found.share:.0%} of a step"
    )
    if found.dense:
        why += f"; some calls run dense {found.dense}"
    if found.speedup < 1:
        why += "; it loses, and runs because the recipe says always"
    return Part(
        "attention",
        asked,
        "adjusted" if found.dense else "ok",
        why,
        found.density,
        found.speedup,
        found.workspace,
    )


def unfit(method: AttentionMethod, files: Sequence[WeightFile]) -> str | None:
    """Why the method cannot serve the model of these weights, or None; unknown without them."""
    return method.refuses(lambda: fingerprint(files)) if files else None


def predicted(resolved: Resolved, shape: Shape) -> Prediction:
    """What the recipe's sparse attention is expected to do on a denoiser of `shape`."""
    import torch

    from ..accel.cost import predict
    from ..accel.recipe import from_table

    chosen, card = from_table(resolved.recipe), cards.find(resolved.model)
    assert chosen.attention is not None
    return predict(
        chosen.attention,
        shape,
        card.grid(resolved.width, resolved.height, resolved.frames),
        device=resolved.device,
        dtype=getattr(torch, resolved.dtype),
        steps=resolved.steps,
        always=chosen.when == "always",
    )


def dense_kernel(resolved: Resolved, folder: ModelFolder) -> Part | None:
    """What the kernel of dense calls would do."""
    import torch

    from ..accel.recipe import from_table
    from ..kernels.dense import expected_fastest, explain

    recipe = from_table(resolved.recipe)
    name, dtype = recipe.dense_kernel, getattr(torch, resolved.dtype)
    if name == "stock":
        return None
    try:
        _family(folder, _denoiser(folder))
    except RecipeError as error:
        return Part("dense kernel", name, "refused", str(error), 1.0, None)
    if name == "fastest":
        why = "self-attention that stays dense runs by cuDNN's kernel on GPUs from Hopper on, in "
        why += "16 bits, and by the stock one elsewhere"
        if expected_fastest(device=resolved.device, dtype=dtype):
            return Part("dense kernel", name, "ok", why, 1.0, None)
        return Part("dense kernel", name, "idle", why, 1.0, None) if recipe.only_kernel else None
    refusal = explain(name, device=resolved.device, dtype=dtype)
    why = refusal or "self-attention that stays dense runs by it"
    return Part("dense kernel", name, "refused" if refusal else "ok", why, 1.0, None)


def steps(resolved: Resolved, folder: ModelFolder) -> Part | None:
    """What the step policy would do."""
    from ..accel.attach import schedulers
    from ..accel.policies import CachePolicy
    from ..accel.recipe import from_table

    chosen = from_table(resolved.recipe)
    policy = chosen.steps
    if policy is None:
        return None
    if isinstance(policy, CachePolicy):
        return _cache(policy, folder, sparse=chosen.attention is not None)
    asked, refusal, raw, beside = policy.words(), None, "", ""
    scheduler, steps = _scheduler(folder), resolved.steps
    if scheduler is not None:
        refusal = schedulers.refusal(scheduler, policy)
        raw = schedulers.why_raw(scheduler)
        steps = schedulers.timesteps_of(scheduler, resolved.steps)
        if steps != resolved.steps:
            name = type(scheduler).__name__
            beside = f"; {name} makes {steps} timesteps of {resolved.steps} steps"
    if not refusal:
        short = policy.refuses(steps)
        refusal = short and short + beside
    kept = 0
    if policy.prunes() and not refusal:
        kept, refusal = _kept_tokens(resolved, folder)
    if refusal:
        return Part("steps", asked, "refused", refusal, 1.0, None, kept)
    least, most = policy.computed(steps, experts(folder))
    why = f"{least} of {steps} steps evaluated"
    if least < most:
        why = f"{least} to {most} of {steps} steps evaluated, as the run goes"
    if kept:
        why += f", unstable ones on some tokens alone; {memory.amount(kept)} kept for the others"
    why += beside
    if raw:
        why += f"; outputs are extrapolated as they come, since {raw}"
    speedup = steps / least if least == most else None
    return Part("steps", asked, "adjusted" if raw else "ok", why, 1.0, speedup, kept)


def parallel(resolved: Resolved, folder: ModelFolder) -> Part | None:
    """What several processes would do."""
    from ..accel.attach import parallel
    from ..accel.recipe import from_table

    chosen = from_table(resolved.recipe)
    if chosen.parallel is None:
        return None
    part = _denoiser(folder)
    try:
        refusal = parallel.refusal(chosen, folder.parts.get(part, "none"), folder.config(part))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder.path} has a config of the wrong form: {error}") from error
    count = chosen.parallel.processes
    why = refusal or f"{count} processes make a video; predictions are of one alone"
    return Part("parallel", chosen.parallel.words(), "refused" if refusal else "ok", why, 1.0, None)


def _kept_tokens(resolved: Resolved, folder: ModelFolder) -> tuple[int, str | None]:
    """Bytes of tokens that pruning keeps, and why there can be no pruning, or None."""
    from ..accel.attach import blocks, pruning

    part, card = _denoiser(folder), cards.find(resolved.model)
    name, config = folder.parts.get(part, "none"), folder.config(part)
    try:
        refusal = blocks.refusal(name, config)
        if refusal:
            return 0, refusal
        grid = card.grid(resolved.width, resolved.height, resolved.frames)
        # Where guidance is distilled into the model it is one; counted all the same, as a margin.
        items = 2 if resolved.guidance > 1 else 1
        size = memory.bytes_of(resolved.dtype)
        kept = pruning.cache_bytes(name, config, grid, size, items=items)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder.path} has a config of the wrong form: {error}") from error
    free = memory.free_bytes(resolved.device)
    if kept <= free:
        return kept, None
    return kept, (
        f"pruning keeps {memory.amount(kept)} of tokens, which is above the {memory.amount(free)} "
        f"free for {resolved.device}: choose a smaller size, or leave steps.prune out"
    )


def experts(folder: ModelFolder) -> int:
    """How many denoisers share the steps of the model in `folder`."""
    return 1 + ("transformer_2" in folder.parts)


def _cache(policy: CachePolicy, folder: ModelFolder, *, sparse: bool) -> Part:
    """What a cache would do."""
    from ..accel.attach import caching

    part, asked = _denoiser(folder), policy.words()
    name, config = folder.parts.get(part, "none"), folder.config(part)
    refusal = caching.refusal(policy, name, config, experts=experts(folder), sparse=sparse)
    idle = None
    if refusal is None:
        try:
            with relayed(lambda _: None):  # the run tells
                idle = caching.inert(policy, name, config)
        except AccelerationError as error:
            refusal = str(error)
    if refusal:
        return Part("steps", asked, "refused", refusal, 1.0, None)
    if idle:
        return Part("steps", asked, "idle", idle, 1.0, 1.0)
    why = f"all steps run, {policy.unit}s in them are reused as the run goes"
    return Part("steps", asked, "ok", why, 1.0, None)


def timesteps(resolved: Resolved, folder: ModelFolder) -> int:
    """How many the scheduler makes of the steps that are asked for."""
    from ..accel.attach import schedulers

    made = _scheduler(folder)
    return resolved.steps if made is None else schedulers.timesteps_of(made, resolved.steps)


def _scheduler(folder: ModelFolder) -> Any:
    """The scheduler in `folder`, or None where diffusers has none of that name."""
    import diffusers

    made = getattr(diffusers, folder.parts.get("scheduler", ""), None)
    if made is None:
        return None
    try:
        return made.from_config(dict(folder.config("scheduler")))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{folder.path} has a scheduler of the wrong form: {error}") from error


def shape_of(folder: ModelFolder) -> Shape:
    """The denoiser in `folder`, by its config.

    Raises:
        RecipeError: one that cannot be accelerated.
        ModelError: a config of the wrong form.
    """
    part = _denoiser(folder)
    family = _family(folder, part)
    try:
        shape = family.shape(folder.config(part))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder.path} has a config of the wrong form: {error}") from error
    if not shape.layers:
        raise RecipeError(f"{folder.parts[part]} of {folder.path} has no self-attention")
    return shape


def _denoiser(folder: ModelFolder) -> str:
    """The part of the pipeline that is one."""
    return "transformer" if "transformer" in folder.parts else "unet"


def _family(folder: ModelFolder, part: str) -> Family:
    """What is known of the denoiser in `folder`. Raises `RecipeError` where nothing is."""
    from ..accel.attach.families import FAMILIES

    name = folder.parts.get(part, "none")
    if name not in FAMILIES:
        raise RecipeError(
            f"attention of {name} cannot be accelerated yet, only that of {', '.join(FAMILIES)}: "
            f"choose --recipe dense"
        )
    return FAMILIES[name]
