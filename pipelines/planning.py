"""What would run: a recipe on a model, a size and a device, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import cards, memory, models, verdicts
from .errors import AccelerationError, KinoraError, RecipeError
from .folder import ModelFolder
from .request import Request, Resolved, resolve
from .verdicts import Part, predicted, shape_of

if TYPE_CHECKING:
    from ..accel.recipe import Recipe

__all__ = ["Part", "Plan", "plan", "predicted", "recipe", "refusal", "shape_of"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run as predicted.

    `speedup`: how many times as fast denoising is, at least and at most, with sparse attention in
    the steps that are not skipped; None where that is not known, as of caches and other kernels of
    dense attention. `together` is the same where the recipe has both, else None.
    """

    request: Resolved
    tokens: int
    memory: memory.Estimate
    free_bytes: int
    parts: tuple[Part, ...]
    together: tuple[float, float] | None = None
    speedup: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "request": self.request.model_dump(),
            "tokens": self.tokens,
            "memory_bytes": {**asdict(self.memory), "peak": self.memory.peak},
            "free_bytes": self.free_bytes,
            "parts": [asdict(part) for part in self.parts],
            "together": self.together,
            "speedup": self.speedup,
        }


def plan(request: Request) -> Plan:
    """Predict the run that `request` asks for; loads nothing.

    Raises `KinoraError` for what no run could do, as `generate` would; a recipe that the model
    refuses is part of the answer, and so are weights that are absent, where the model is known
    without them.
    """
    card = cards.find(request.model)
    resolved = resolve(request, card, read_image=False)
    outline = models.outline(card)
    place = models.place(card, resolved.device, resolved.dtype)
    resolved = resolved.model_copy(update={"device": place.device, "dtype": place.dtype})
    grid = card.grid(resolved.width, resolved.height, resolved.frames)
    parts: list[Part] = []
    if outline.absent is not None:
        asked = card.repo or card.name
        parts.append(Part("weights", asked, "refused", outline.absent, 1.0, None))
    parts += verdicts.parts(resolved, outline.folder, outline.files)
    estimate = memory.estimate(
        outline.folder,
        outline.numel,
        grid,
        pixels=(resolved.frames, resolved.height, resolved.width),
        dtype=place.dtype,
        vae_dtype=place.vae_dtype,
        resident=False,
        **_needs(parts),
    )
    free = memory.free_bytes(place.device)
    run = {it.part for it in parts if it.verdict in ("ok", "adjusted")}
    found = _speedup(resolved, outline.folder, run)
    both = found if {"attention", "steps"} <= run else None
    return Plan(resolved, grid.tokens, estimate, free, tuple(parts), both, found)


def _needs(parts: Sequence[Part]) -> dict[str, int]:
    """What `memory.estimate` is told of the bytes that a recipe needs."""
    steps = sum(it.workspace_bytes for it in parts if it.part == "steps")
    return {"workspace": sum(it.workspace_bytes for it in parts) - steps, "pruning": steps}


def recipe(
    resolved: Resolved, weights: models.Weights, notice: Callable[[str], None]
) -> tuple[Recipe, dict[str, int]]:
    """The recipe of a run, and what `memory.estimate` is told of the bytes that it needs.

    `notice` is told where it would accelerate nothing.

    Raises:
        RecipeError: the model refuses it.
        AccelerationError: it would not run as asked, and the request is strict.
    """
    from ..accel.recipe import from_table

    parts = verdicts.parts(resolved, weights.folder, weights.files)
    for part in parts:
        error = refusal(part, strict=resolved.strict)
        if error is not None:
            raise error
        if part.dense:
            notice(f"the recipe accelerates nothing here: {part.why}")
    return from_table(resolved.recipe), _needs(parts)


def refusal(part: Part, *, strict: bool) -> KinoraError | None:
    """What a run would raise because of a part of its recipe, or None."""
    if part.verdict == "refused":
        return RecipeError(part.why)
    idle = part.part == "steps" and part.verdict == "idle"
    if not strict or not (part.dense or idle or part.verdict == "adjusted"):
        return None
    slower = part.part == "attention" and part.verdict == "adjusted"
    remedy = "run it anyway (when=always)" if slower else "change the recipe"
    return AccelerationError(
        f"strict: {part.part} would not run as asked, {part.why}; "
        f"{remedy}, or allow fallbacks (strict=False, --no-strict)"
    )


def _speedup(resolved: Resolved, folder: ModelFolder, run: set[str]) -> tuple[float, float] | None:
    """See `Plan`; of the parts that `run`."""
    from ..accel.cost import together
    from ..accel.recipe import from_table

    policy = from_table(resolved.recipe).steps
    if policy is not None:
        steps = verdicts.timesteps(resolved, folder)
        resolved = resolved.model_copy(update={"steps": steps})
    steps = resolved.steps
    by_step = (1.0,) * steps
    if "attention" in run:
        by_step = predicted(resolved, shape_of(folder)).by_step
    if policy is None or "steps" not in run:
        if run == {"dense kernel"}:
            return None
        alone = steps / sum(by_step)
        return alone, alone
    window = policy.window(steps)
    if not window:
        return None
    counts = policy.computed(steps, verdicts.experts(folder))
    fewest, most = (together(by_step, it, window) for it in counts)
    return most, fewest
