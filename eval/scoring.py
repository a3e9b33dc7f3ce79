"""One clip's metrics: what is scored together, from files, in whatever process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .clips import Clip, EvalError, sha256_of
from .learned.spec import Tools
from .registry import Metric
from .result import Result, failed

if TYPE_CHECKING:
    from .fidelity import Frames


@dataclass(frozen=True, slots=True)
class Job:
    """A clip, its reference and the metrics that are still to be taken of it."""

    clip: Clip
    reference: Clip | None
    metrics: tuple[Metric, ...]
    tools: Tools = field(default_factory=Tools)


@dataclass(frozen=True, slots=True)
class Scored:
    """A clip's results by metric."""

    clip: Clip
    reference: Clip | None
    results: dict[str, Result] = field(default_factory=dict[str, Result])


def content_of(job: Job) -> dict[Metric, tuple[str, ...]]:
    """What each metric's score depends on: hashes of files, and the prompt where it is asked for.

    Raises `EvalError` where a file cannot be read.
    """
    video = job.clip.sha256()
    beside = "" if job.reference is None else job.reference.sha256()
    latents: tuple[str, ...] = ()
    if job.reference is not None and any(it.scorer == "latents" for it in job.metrics):
        files = (job.clip.latents, job.reference.latents)
        latents = tuple("" if it is None else sha256_of(it) for it in files)
    depends = {
        "frames": (video, beside),
        "latents": latents,
        "world": (video, job.clip.prompt or ""),
        "flicker": (video,),
    }
    scorers = {it.scorer for it in job.metrics}
    if "lpips" in scorers:
        from .learned import client

        depends["lpips"] = (video, beside, client.identity("lpips", job.tools))
    if "clip" in scorers:
        from .learned import measure

        checkpoint = measure.clip_identity(job.tools)
        depends["clip"] = (video, job.clip.prompt or "", checkpoint)
    parts: dict[Metric, tuple[str, ...]] = {}
    for metric in job.metrics:
        mine = depends[metric.scorer]
        parts[metric] = (metric.name, str(metric.version), *mine)
    return parts


def score(job: Job) -> Scored:
    """Take the metrics. Nothing that a file can hold makes it raise."""
    scored = Scored(job.clip, job.reference)
    names = {
        scorer: tuple(it.name for it in job.metrics if it.scorer == scorer)
        for scorer in dict.fromkeys(it.scorer for it in job.metrics)
    }
    results = scored.results
    frames = None
    if {"frames", "world", "lpips", "clip"} & names.keys():
        try:
            frames = job.clip.frames()
        except EvalError as error:
            return Scored(job.clip, job.reference, _all(job.metrics, str(error)))
    if frames is not None and (pairs := names.get("frames", ()) + names.get("lpips", ())):
        results |= _against(job, frames, pairs)
    if "latents" in names and job.reference is not None:
        from . import latents

        results |= latents.compare(job.clip, job.reference, names["latents"])
    if "world" in names and frames is not None:
        from . import worldsuite

        results |= worldsuite.measure(job.clip, frames, names["world"])
    for name in names.get("clip", ()):
        from .learned import measure

        if frames is not None:
            results[name] = measure.clip_score(job.clip, frames, job.tools)
    for name in names.get("flicker", ()):
        from . import flicker

        try:
            results[name] = flicker.measure(job.clip)
        except EvalError as error:
            results[name] = failed(str(error))
    return scored


def _against(job: Job, made: Frames, names: Sequence[str]) -> dict[str, Result]:
    from . import fidelity

    assert job.reference is not None
    try:
        reference = job.reference.frames()
    except EvalError as error:
        return dict.fromkeys(names, failed(f"its reference: {error}"))
    if made.shape != reference.shape:
        told = [fidelity.shape_words(it) for it in (made, reference)]
        why = f"{job.clip.path} has {told[0]}, its reference {job.reference.path} {told[1]}"
        return dict.fromkeys(names, failed(why))
    notes = lossy(job.clip, job.reference)
    found: dict[str, Result] = {}
    for name in names:
        if name == "lpips":
            from .learned import measure

            found[name] = measure.lpips(made, reference, job.tools, *notes)
        else:
            found[name] = fidelity.compare(made, reference, name, *notes)
    return found


def lossy(clip: Clip, reference: Clip) -> tuple[str, ...]:
    """What must be said of a comparison of frames that were encoded with loss."""
    if clip.lossless and reference.lossless:
        return ()
    return (f"lossy: {clip.form} against {reference.form}; --format png keeps frames as made",)


def _all(metrics: Sequence[Metric], why: str) -> dict[str, Result]:
    return {it.name: failed(why) for it in metrics}
