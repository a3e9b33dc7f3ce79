"""`calibrate`: one dense run of a model, looked at, for methods that learn beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..accel.calibration import Calibration
from ..accel.errors import hint
from ..accel.tiles import TileName, tile_of
from . import cards, files, models, verdicts
from .errors import GenerationError, RequestError
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
    tile: str = "128x64",
    report: Callable[[str], None],
) -> Calibrated:
    """Run `request` dense, choose orders and masks for `paro`, and write them to `output`.

    Args:
        request: model, prompt, size, length, steps, seed, device and dtype are read.
        output: a file that is not there yet; written whole or not at all.
        keep: share of the tiles that the masks keep.
        tile: queries by keys in a tile, a `TileName`.
        report: is told what is going on, in lines.

    Raises `KinoraError`: as `generate` does; one line each.
    """
    if not 0 < keep <= 1:
        raise RequestError(f"keep must be above 0 and at most 1, not {keep:g}")
    if tile not in (tiles := get_args(TileName)):
        known = ", ".join(tiles)
        raise RequestError(f"tile must be one of {known}, not {tile!r}{hint(tile, tiles)}")
    files.check_new(output)
    card = cards.find(request.model)
    resolved = resolve(request, card)
    _can_be_calibrated(card)
    weights = models.locate(card)
    place = models.place(card, resolved.device, resolved.dtype)

    from ..accel.attach import accelerate
    from ..accel.calibration import Tally, observed_steps
    from ..accel.methods.paro import ParoObserver
    from ..accel.recipe import Recipe
    from .chatter import relayed
    from .denoise import denoise

    report(f"loading {card.name}")
    with relayed(report):
        loaded = models.load(weights, place)
    tally = Tally(keep=keep, tile=tile_of(tile))
    observer = ParoObserver(tally)
    last = max(observed_steps(resolved.steps))

    def after_step(pipe: Any, step: int) -> None:
        report(f"step {step + 1}/{last + 1}")
        pipe._interrupt = step >= last  # what comes after it is not looked at

    recipe = Recipe(attention=observer, when="always")
    with accelerate(loaded.pipe, recipe, seed=resolved.seed):
        denoise(loaded.pipe, card, resolved, after_step)
    if observer.last is None:
        raise GenerationError(f"{card.pipeline} showed no attention that could be calibrated")
    made = tally.finish(card.name, observer.last, weights=loaded.fingerprint)
    stem, suffix = output.stem, output.suffix
    (path,) = files.publish(output.absolute().parent, stem, {suffix: made.to_bytes()}).values()
    return Calibrated(path, made)


def _can_be_calibrated(card: cards.Card) -> None:
    """Raises `RequestError` for models that cannot be, before any weights are asked for."""
    layers = verdicts.shape_of(models.outline(card).folder).layers
    if len({(it.text, it.halvings) for it in layers}) > 1:
        raise RequestError(
            f"{card.name} cannot be calibrated: its layers see different tokens, which paro does "
            f"not serve yet; choose another attention.method"
        )
