"""Recipes against the dense run, over the same prompts and noise: what `kinora compare` says.

    for event in compare({"dense": "videos/dense", "fast": "videos/fast"}):
        ...                                   # Progress, and at the end the Comparison

Everything is taken over pairs: a recipe's run and the dense run of its prompt and seed. Runs that
differ in more than their recipe are refused, and then the recipe has no verdict.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from .clips import Clip, EvalError, References
from .comparison import Case, Compared, Comparison, Ruling, worst_first
from .costs import computed_all, cost
from .evaluate import Progress, evaluate
from .paired import KEPT_SHARE, Verdict, verdict
from .registry import METRICS
from .report import Report, sha256_of_prompts
from .result import Result, total
from .runs import (
    Identity,
    Runs,
    baseline_of,
    dense_kernels,
    differences,
    read_runs,
    record_of,
    refusal,
)
from .world import ALL_CORRECT

HEADLINE = ALL_CORRECT
FIDELITY = ("psnr", "ssim", "ms_ssim", "relative_l1")
QUALITY = tuple(name for name, it in METRICS.items() if it.suite == "world")

Found = dict[Identity, dict[str, Result]]


def compare(
    folders: Mapping[str, str | Path],
    *,
    videos: Mapping[str, Sequence[Path]] | None = None,
    cache: Path | None = None,
    workers: int = 1,
) -> Generator[Progress | Comparison, None, None]:
    """Compare the videos of several recipes; yields progress and at last the comparison.

    Args:
        folders: of each recipe's videos, by its name; the first are dense, by the stock pipeline.
        videos: which of a folder are meant, by recipe; without them all are.
        cache, workers: as of `evaluate`.

    Raises:
        EvalError: fewer than two folders, one that does not hold runs of one recipe, a first that
            is not dense, or dense runs that differ among themselves.
    """
    if len(folders) < 2:
        raise EvalError(f"{len(folders)} folders were given: give the dense one and another")
    runs = {
        name: read_runs(name, Path(folder), (videos or {}).get(name))
        for name, folder in folders.items()
    }
    dense = next(iter(runs.values()))
    if dense.recipe:
        raise EvalError(f"the videos in {dense.folder} are not dense: name the dense ones first")
    _check_alike(dense)
    refused = {name: _refusals(it, runs) for name, it in runs.items() if it is not dense}
    accepted = {
        name: {key: clip for key, clip in it.clips.items()
               if it is dense or key not in refused[name]}
        for name, it in runs.items()
    }  # fmt: skip
    references = References(dense.folder, list(dense.clips.values()))
    found: dict[str, Found] = {}
    done, of = 0, sum(len(it) for it in accepted.values())
    for name, clips in accepted.items():
        found[name] = {}
        if not clips:
            continue
        events = evaluate(
            [it.path for it in clips.values()],
            reference=None if name == dense.name else references,
            metrics=() if name == dense.name else FIDELITY,
            suites=("world",),
            cache=cache,
            workers=workers,
        )
        for event in events:
            if isinstance(event, Report):
                found[name] = {it.clip.identity: it.results for it in event.clips
                               if it.clip.identity is not None}  # fmt: skip
            else:
                yield Progress(done + event.done, of, event.known, event.path)
        done += len(clips)
    yield _summed(runs, accepted, refused, found)


def _check_alike(dense: Runs) -> None:
    """Raises `EvalError` if the dense runs are of several samplers or machines."""
    clips = list(dense.clips.values())
    for clip in clips[1:]:
        told = next(differences(record_of(clip), record_of(clips[0])), None)
        if told is not None:
            raise EvalError(f"{clip.path} and {clips[0].path} are not alike: {told}")


def _refusals(runs: Runs, all_runs: Mapping[str, Runs]) -> dict[Identity, str]:
    """Why each run that cannot be compared cannot; dense runs without a fellow count too."""
    dense = next(iter(all_runs.values()))
    against = baseline_of(runs, all_runs)
    told: dict[Identity, str] = {}
    for key, clip in runs.clips.items():
        for other in dict.fromkeys((dense.name, against.name)):
            fellow = all_runs[other].clips.get(key)
            if fellow is None:
                told[key] = f"{clip.path}: {other} has no run of its prompt and seed"
            else:
                # A dense recipe's gain is its kernel: there they are meant to differ.
                same = other == against.name and not runs.dense
                why = refusal(clip, fellow, kernels=same)
                if why is not None:
                    told[key] = why
            if key in told:
                break
    for key, clip in dense.clips.items():
        if key not in runs.clips:
            told[key] = f"{runs.name} has no run of the prompt and seed of {clip.path}"
    return told


def _summed(
    runs: Mapping[str, Runs],
    accepted: Mapping[str, Mapping[Identity, Clip]],
    refused: Mapping[str, Mapping[Identity, str]],
    found: Mapping[str, Found],
) -> Comparison:
    dense = next(iter(runs.values()))
    recipes: list[Compared] = []
    for name, it in runs.items():
        if it is dense:
            continue
        clips = accepted[name]
        keys = list(clips)
        against = baseline_of(it, runs)
        quality = {
            metric: _verdict([found[name][key][metric] for key in keys],
                             [found[dense.name][key][metric] for key in keys])
            for metric in QUALITY
        }  # fmt: skip
        reasons = tuple(dict.fromkeys(refused[name].values()))
        ruling, why = _ruling(quality[HEADLINE], reasons)
        recipes.append(
            Compared(
                name, it.recipe, ruling, why, quality,
                {metric: total([found[name][key][metric] for key in keys]) for metric in FIDELITY},
                cost([record_of(clips[key]) for key in keys]) if keys else None,
                against.name,
                cost([record_of(against.clips[key]) for key in keys]) if keys else None,
                reasons,
                bool(keys) and all(_same(clips[key], dense.clips[key]) for key in keys),
            )
        )  # fmt: skip
    cases = [
        Case(
            key,
            {name: clips[key] for name, clips in accepted.items() if key in clips},
            {name: found[name][key] for name, clips in accepted.items() if key in clips},
        )
        for key in dense.clips
    ]
    return Comparison(
        dense.name,
        cost([record_of(it) for it in dense.clips.values()]),
        {it: total([one[it] for one in found[dense.name].values()]) for it in QUALITY},
        HEADLINE,
        tuple(recipes),
        worst_first(cases, HEADLINE, dense.name),
        _provenance(dense),
    )


def _same(fast: Clip, dense: Clip) -> bool:
    """Whether both runs did the same work."""
    one, other = record_of(fast), record_of(dense)
    return (
        one.latents_sha256 == other.latents_sha256
        and computed_all(one)
        and dense_kernels(one) == dense_kernels(other)
    )


def _verdict(fast: list[Result], dense: list[Result]) -> Verdict:
    """Over pairs of which the metric asks something; None unless all of them have scores."""
    pairs = [(a, b) for a, b in zip(fast, dense, strict=True) if a.applies or b.applies]
    scores = [(a.score, b.score) for a, b in pairs]
    kept = [(a, b) for a, b in scores if a is not None and b is not None]
    if len(kept) < len(pairs):
        lacking = next(it for pair in pairs for it in pair if it.score is None)
        why = f"{len(pairs) - len(kept)} of {len(pairs)} pairs have no score; {lacking.reason}"
        return Verdict(None, False, KEPT_SHARE, None, None, None, None, why)
    return verdict([a for a, _ in kept], [b for _, b in kept])


def _ruling(headline: Verdict, refused: Sequence[str]) -> tuple[Ruling, str]:
    if refused:
        more = f"; {len(refused) - 1} more" if len(refused) > 1 else ""
        return "refused", f"{refused[0]}{more}"
    if headline.kept is None:
        return "none", f"{HEADLINE}: {headline.reason}"
    return ("kept" if headline.kept else "below"), ""


def _provenance(dense: Runs) -> dict[str, object]:
    record = record_of(next(iter(dense.clips.values())))
    asked = record.request
    prompts = sorted({prompt for prompt, _ in dense.clips})
    clips: list[Clip] = list(dense.clips.values())
    return {
        "model": asked.model,
        "fingerprint": record.model.fingerprint,
        "size": f"{asked.width}x{asked.height}",
        "frames": asked.frames,
        "fps": asked.fps,
        "steps": asked.steps,
        "guidance": asked.guidance,
        "negative_prompt": asked.negative_prompt,
        "dtype": asked.dtype,
        "prompts": len(prompts),
        "prompts_sha256": sha256_of_prompts(prompts),
        "seeds": sorted({seed for _, seed in dense.clips}),
        "forms": sorted({it.form for it in clips}),
        "metrics": {it: METRICS[it].version for it in (*FIDELITY, *QUALITY)},
        "made_on": record.machine.device,
        "threads": record.machine.threads,
        "versions": record.machine.versions,
    }
