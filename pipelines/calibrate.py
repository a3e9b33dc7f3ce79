"""`calibrate`: one dense run of a model, looked at, for methods that learn beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accel.calibration import Calibration
from . import cards, files, models
from .errors import GenerationError, OutputError, RequestError
from .request import Request, resolve


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Where the calibration is, and what it holds."""

    path: Path
    calibration: Calibration


def calibrate(
    request: Request,
    output: Path,
    *,
    keep: float,
    report: Callable[[str], None],
) -> Calibrated:
    """Run `request` dense, choose orders and masks for `paro`, and write them to `output`.

    Args:
        request: model, prompt, size, length, steps, seed, device and dtype are read.
        output: a file that is not there yet; written whole or not at all.
        keep: share of the tiles that the masks keep.
        report: is told what is going on, in lines.

    Raises `KinoraError`: as `generate` does; one line each.
    """
    if not 0 < keep <= 1:
        raise RequestError(f"keep must be above 0 and at most 1, not {keep:g}")
    if output.exists():
        raise OutputError(f"{output} is there already: name another file, or remove it")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {output.absolute().parent}: make it first")
    card = cards.find(request.model)
    resolved = resolve(request, card)
    weights = models.locate(card)
    place = models.place(card, resolved.device, resolved.dtype)

    from ..accel.attach import accelerate
    from ..accel.calibration import Tally, observed_steps
    from ..accel.methods.paro import ParoObserver
    from ..accel.recipe import Recipe
    from .chatter import relayed
    from .taps import without_progress_bar

    report(f"loading {card.name}")
    with relayed(report):
        pipe: Any = models.load(weights, place).pipe
    tally = Tally(keep=keep)
    observer = ParoObserver(tally)
    last = max(observed_steps(resolved.steps))

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        report(f"step {step + 1}/{last + 1}")
        pipe._interrupt = step >= last  # what comes after it is not looked at
        return tensors

    import torch

    wanted: dict[str, Any] = {
        "prompt": resolved.prompt,
        "height": resolved.height,
        "width": resolved.width,
        "num_frames": resolved.frames,
        "num_inference_steps": resolved.steps,
        "guidance_scale": resolved.guidance,
        "generator": torch.Generator("cpu").manual_seed(resolved.seed),
        "output_type": "latent",
        "callback_on_step_end": on_step,
        **card.call,
    }
    accepted = models.call_parameters(type(pipe))
    recipe = Recipe(attention=observer, when="always")
    with without_progress_bar(pipe), accelerate(pipe, recipe, seed=resolved.seed):
        pipe(**{name: value for name, value in wanted.items() if name in accepted})
    if observer.last is None:
        raise GenerationError(f"{card.pipeline} showed no attention that could be calibrated")
    made = tally.finish(card.name, observer.last)
    stem, suffix = output.stem, output.suffix
    (path,) = files.publish(output.absolute().parent, stem, {suffix: made.to_bytes()}).values()
    return Calibrated(path, made)
