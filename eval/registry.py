"""The metrics by name. Nothing is imported until a metric is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..pipelines.errors import nearest
from .clips import EvalError

Scorer: TypeAlias = Literal["frames", "latents", "world", "flicker", "lpips", "clip", "set"]
"""What is computed together: pairs of frames, pairs of latents, the judge, one clip's flicker, what
a network says of a pair or of a clip and its prompt, or of all clips and references as two sets."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `version` changes with its definition, so that no older score stands for it."""

    name: str
    suite: str
    scorer: Scorer
    what: str
    better: Literal["more", "less"] = "more"
    version: int = 1

    @property
    def pairs(self) -> bool:
        """Whether it compares a clip with a reference."""
        return self.scorer in ("frames", "latents", "lpips", "set")

    @property
    def learned(self) -> bool:
        """Whether it needs weights, which may be there the next time."""
        return self.scorer in ("lpips", "clip", "set")


def _world(name: str, what: str) -> Metric:
    return Metric(f"world.{name}", "world", "world", what)


_ALL = (
    Metric("psnr", "fidelity", "frames", "dB over pixels and colours, at most 100"),
    Metric("ssim", "fidelity", "frames", "Gaussian window of 11 px, σ 1.5, mean over frames"),
    Metric("ms_ssim", "fidelity", "frames", "five scales, fewer where sides are under 176 px"),
    Metric("relative_l1", "fidelity", "frames", "difference over the reference's sum", "less"),
    Metric("cosine", "fidelity", "frames", "of frames as vectors, mean over frames"),
    Metric("latent_relative_l1", "fidelity", "latents", "the same of latents", "less"),
    Metric("latent_cosine", "fidelity", "latents", "of latents as one vector"),
    _world("object_class", "share of frames with every shape"),
    _world("color", "share of things in their colour"),
    _world("count", "share of frames with as many things"),
    _world("multiple_objects", "share of frames with both things, each right"),
    _world("spatial_relationship", "share of frames in which the relation holds"),
    _world("motion", "share of things that move as asked"),
    _world("scene", "share of frames over the background asked for"),
    _world("subject_consistency", "outlines and colours stay"),
    _world("background_consistency", "the background stays"),
    _world("motion_smoothness", "positions lie between their neighbours"),
    _world("temporal_flickering", "the background's colours stay"),
    _world("dynamic_degree", "something moves"),
    _world("imaging_quality", "clean colours and outlines"),
    _world("all_correct", "everything that is asked holds"),
    Metric(
        "vbench.temporal_flickering", "flicker", "flicker",
        "VBench's own, without its filter for still videos",
    ),
    Metric("lpips", "learned", "lpips", "AlexNet, frames in −1 to 1, mean over frames", "less"),
    Metric("clip_score", "learned", "clip", "100 cos of frame and prompt, mean over frames"),
    Metric("fid", "learned", "set", "of all frames to all of the references", "less"),
    Metric("fvd", "learned", "set", "of all videos to all references, by I3D", "less"),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
SUITES: tuple[str, ...] = tuple(dict.fromkeys(metric.suite for metric in _ALL))


def chosen(
    metrics: Sequence[str] = (), suites: Sequence[str] = (), *, reference: bool
) -> list[Metric]:
    """The metrics asked for, each once, in the registry's order.

    Without either: fidelity where there is a reference, else the world's judge. Raises `EvalError`
    for a name that is not known, or a comparison without a reference.
    """
    for name in metrics:
        if name not in METRICS:
            raise EvalError(_unknown("metric", name, tuple(METRICS)))
    for name in suites:
        if name not in SUITES:
            raise EvalError(_unknown("suite", name, SUITES))
    if not metrics and not suites:
        suites = ("fidelity",) if reference else ("world",)
    found = [it for it in METRICS.values() if it.name in metrics or it.suite in suites]
    paired = [it.name for it in found if it.pairs]
    if paired and not reference:
        raise EvalError(f"{paired[0]} compares with a reference: give --reference DIR")
    return found


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    close = nearest(name, known, 1)
    told = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"there is no {what} {name!r}: {told}"
