"""Scores of many videos: what `kinora eval` does.

    for event in evaluate(["outputs"], reference="dense"):
        ...                                   # Progress, and at the end the Report

Videos are scored in processes of their own where there are several. Whatever is wrong with one of
them is a result of that one; the others are scored. A video that was scored before is not scored
again, unless it, its reference or the metric has changed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from .cache import Cache
from .clips import Clip, EvalError, References, find, with_prompts
from .learned.spec import Tools
from .registry import Metric, chosen
from .report import Report, report
from .result import Result, Total, failed
from .scoring import Job, Scored, content_of, score

_TOOLS = Tools()
FEW = 4  # videos that are scored before a process has started
CRASHED = "scoring it ended its process: the file crashes its decoder, or memory ran out"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `of` videos have their scores; `known` of them from an earlier evaluation."""

    done: int
    of: int
    known: int
    path: Path


def evaluate(
    videos: Sequence[str | Path],
    *,
    reference: str | Path | References | None = None,
    metrics: Sequence[str] = (),
    suites: Sequence[str] = (),
    prompts: str | Path | None = None,
    cache: Path | None = None,
    workers: int = 1,
    tools: Tools = _TOOLS,
) -> Generator[Progress | Report, None, None]:
    """Score `videos`: files, sidecars, or folders of them; yields progress and at last the report.

    Args:
        reference: folder of the videos to compare with, found by prompt and seed, or by name.
        metrics, suites: names of the registry; without any, fidelity or the world's judge.
        prompts: JSON file of prompts by file name, instead of those that videos carry.
        cache: file of earlier scores, read and added to; None keeps none.
        workers: processes; 0 for as many as there are cores. Above 1, a script needs its
            `if __name__ == "__main__"`.
        tools: what metrics by networks are taken with.

    Raises:
        EvalError: nothing can be scored as asked: an unknown metric, no videos at all, no reference
            where one is needed, prompts for other files.
    """
    wanted = chosen(metrics, suites, reference=reference is not None)
    if not videos:
        raise EvalError("there are no VIDEOS: give files, or folders of them")
    clips, rejected = find([Path(it) for it in videos])
    if not clips:
        raise EvalError(rejected[0].reason)
    beside = reference
    if beside is not None and not isinstance(beside, References):
        beside = References(Path(beside))
    unmatched: list[str] = []
    if prompts is not None:
        clips, unmatched = with_prompts(clips, Path(prompts))
    known = Cache(cache)
    for metric in wanted:
        if metric.scorer in ("lpips", "set"):
            from .learned import client

            client.command(metric.name, tools)  # an interpreter that is not there is no one's score
    sets = [it for it in wanted if it.scorer == "set"]
    single = [it for it in wanted if it.scorer != "set"]
    scored: list[Scored] = []
    jobs: list[tuple[Job, dict[str, Result], dict[Metric, tuple[str, ...]]]] = []
    for clip in clips:
        prepared = _prepared(clip, beside, single, known, tools)
        if isinstance(prepared, Scored):
            scored.append(prepared)
        else:
            jobs.append(prepared)
        done = len(scored)
        if isinstance(prepared, Scored):
            yield Progress(done, len(clips), done, clip.path)
    earlier = len(scored)
    for index, found in _scored([job for job, _, _ in jobs], workers):
        job, before, parts = jobs[index]
        for metric in job.metrics:
            result = found.results[metric.name]
            if result.status == "ok" or not metric.learned:
                known.put(parts[metric], result)
        results = {it.name: (before | found.results)[it.name] for it in single}
        scored.append(Scored(found.clip, found.reference, results))
        yield Progress(len(scored), len(clips), earlier, found.clip.path)
    places = {clip.path: place for place, clip in enumerate(clips)}
    scored.sort(key=lambda it: places[it.clip.path])
    of_all: dict[str, Total] = {}
    for metric in sets:
        from .learned.sets import measure

        assert beside is not None  # `chosen` has seen to it
        reading = measure(metric, clips, beside.clips, known, tools)
        of, done = len(clips) + len(beside.clips), 0
        while True:
            try:
                path = next(reading)
            except StopIteration as end:
                of_all[metric.name] = end.value
                break
            done += 1
            yield Progress(done, of, 0, path)
    environments = {it.name: _environment(it, tools) for it in wanted if it.learned}
    yield report(wanted, scored, rejected, unmatched, of_all, environments)


def _environment(metric: Metric, tools: Tools) -> str:
    from .learned import client, measure

    if metric.scorer == "clip":
        return f"checkpoint {measure.clip_identity(tools)}, device {tools.device}"
    return f"{client.identity(metric.name, tools)}, device {tools.device}"


def _prepared(
    clip: Clip, beside: References | None, wanted: Sequence[Metric], known: Cache, tools: Tools
) -> Scored | tuple[Job, dict[str, Result], dict[Metric, tuple[str, ...]]]:
    """What is left to be scored of a clip, what is known and what that depends on."""
    found: Clip | None = None
    before: dict[str, Result] = {}
    if beside is not None and any(it.pairs for it in wanted):
        try:
            found = beside.of(clip)
        except EvalError as error:
            before = {it.name: failed(str(error)) for it in wanted if it.pairs}
    open_ = tuple(it for it in wanted if it.name not in before)
    try:
        parts = content_of(Job(clip, found, open_, tools))
    except EvalError as error:
        return Scored(clip, found, {it.name: failed(str(error)) for it in wanted})
    for metric, content in parts.items():
        result = known.get(content)
        if result is not None:
            before[metric.name] = result
    left = tuple(it for it in wanted if it.name not in before)
    if not left:
        return Scored(clip, found, {it.name: before[it.name] for it in wanted})
    return Job(clip, found, left, tools), before, parts


def _scored(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Scored]]:
    """Each job's number and scores, as they are done."""
    count = min(workers or _cores(), len(jobs))
    if count < 2 or len(jobs) <= FEW:
        for index, job in enumerate(jobs):
            yield index, score(job)
        return
    lost: list[int] = []
    with _pool(count) as pool:
        waiting: dict[Future[Scored], int] = {}
        left = iter(range(len(jobs)))
        while True:
            # Few at a time, so that an interruption does not wait for all.
            for index in left:
                try:
                    waiting[pool.submit(score, jobs[index])] = index
                except BrokenProcessPool:
                    lost.append(index)
                if len(waiting) >= 2 * count:
                    break
            if not waiting:
                break
            for one in wait(waiting, return_when=FIRST_COMPLETED).done:
                index = waiting.pop(one)
                try:
                    yield index, one.result()
                except BrokenProcessPool:
                    lost.append(index)
    # One file ended a process and with it the pool: each of the others gets a pool to itself.
    for index in lost:
        with _pool(1) as pool:
            try:
                yield index, pool.submit(score, jobs[index]).result()
            except BrokenProcessPool:
                job = jobs[index]
                lines = {it.name: failed(f"{job.clip.path}: {CRASHED}") for it in job.metrics}
                yield index, Scored(job.clip, job.reference, lines)


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=_alone_on_its_core
    )


def _alone_on_its_core() -> None:
    """Processes share the cores: threads of each would only wait for each other."""
    import gc
    import signal

    import cv2

    gc.freeze()  # imageio collects garbage whenever it closes a file, which took 40 % of the time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits for us
    cv2.setNumThreads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, where a metric needs it


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
