"""How near the latents of a video are to those of a reference: no decoder, no codec between them.

Latents are kept by `kinora generate --keep-latents`. Everything is computed in float64 over all
tensors of a video together.
"""

from __future__ import annotations

from pathlib import Path

from ..pipelines.errors import SidecarError
from ..pipelines.latents import read
from .clips import Clip
from .result import Result, failed, ok, skipped

LATENT_METRICS = ("latent_relative_l1", "latent_cosine")


def compare(made: Clip, reference: Clip, metrics: tuple[str, ...]) -> dict[str, Result]:
    """Relative L1 (sum of absolute differences over the reference's) and cosine of latents.

    Skipped where either clip's latents were not kept, failed where they have other shapes.
    """
    mine, other = made.latents, reference.latents
    if mine is None or other is None:
        whose = "its latents" if mine is None else "its reference's latents"
        why = f"{whose} were not kept: generate with --keep-latents"
        return dict.fromkeys(metrics, skipped(why))
    try:
        found = _both(mine, other)
    except SidecarError as error:
        return dict.fromkeys(metrics, failed(str(error)))
    if isinstance(found, str):
        return dict.fromkeys(metrics, failed(found))
    return {name: found[name] for name in metrics}


def _both(made: Path, reference: Path) -> dict[str, Result] | str:
    import torch

    mine, other = read(made).calls, read(reference).calls
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, (a, b) in enumerate(zip(mine, other, strict=False)):
        for name in sorted({*a, *b}):
            if name not in a or name not in b or a[name].shape != b[name].shape:
                shapes = [list(it[name].shape) if name in it else "none" for it in (a, b)]
                return f"latents {index}.{name} are {shapes[0]}, those of the reference {shapes[1]}"
            pairs.append((a[name].double(), b[name].double()))
    if len(mine) != len(other):
        return f"latents are decoded in {len(mine)} calls, those of the reference in {len(other)}"
    gap = sum(float((a - b).abs().sum()) for a, b in pairs)
    whole = sum(float(b.abs().sum()) for _, b in pairs)
    product = sum(float((a * b).sum()) for a, b in pairs)
    squares = [sum(float((it[side] ** 2).sum()) for it in pairs) for side in (0, 1)]
    if not all(squares):
        nothing = skipped("the latents are all 0: relative to them says nothing")
        return dict.fromkeys(LATENT_METRICS, nothing)
    cosine = min(1.0, product / (squares[0] * squares[1]) ** 0.5)
    return {"latent_relative_l1": ok(gap / whole), "latent_cosine": ok(cosine)}
