"""An evaluation as one HTML file: totals, what is missing and why, every video, the worst first.

Nothing is fetched; videos are inside of it as long as there is room.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .clips import Clip
from .markup import MOST_VIDEO_BYTES, document, media, note, provenance, table, warnings
from .players import players
from .result import Result, ok

if TYPE_CHECKING:
    from .report import Report
    from .vbench.suite import VBenchReport

_WIDTH, _HEIGHT = 160, 28  # px of a line of values by frame


@dataclass(frozen=True, slots=True)
class Line:
    """One video, what the page calls it, and its results by metric."""

    name: str
    clip: Clip
    reference: Clip | None
    results: Mapping[str, Result]


def page(found: Report, *, most_video_bytes: int = MOST_VIDEO_BYTES) -> str:
    """The page of an evaluation's report, in UTF-8."""
    rows = [
        [
            escape(metric.name),
            "–" if it.mean is None else f"{it.mean:.4f}",
            "" if it.low is None or it.high is None else f"{it.low:.4f} to {it.high:.4f}",
            f"{it.n} of {it.asked}",
            _status(it.status),
            escape(metric.what + ("; less is better" if metric.better == "less" else "")),
        ]
        for metric in found.metrics
        for it in (found.totals[metric.name],)
    ]
    told = found.remarks()
    less = {it.name for it in found.metrics if it.better == "less"}
    lines = [Line(it.clip.path.name, it.clip, it.reference, it.results) for it in found.clips]
    made = found.provenance
    versions = {it.name: f"version {it.version}" for it in found.metrics}
    headings = ("", "mean", "95 %", "videos", "status", "what")
    body = (
        f"<h2>Totals</h2>{table(headings, rows)}{_notes(told)}{warnings(found.failures())}"
        f"{_videos(worst_first(lines, less), most_video_bytes)}"
        f"<h2>Scored with</h2>{provenance({**made, 'metrics': versions})}"
    )
    facts = f"{found.status}; prompts: {made['prompts']}; read from {', '.join(made['forms'])}"
    return document(f"Scores of {_count(len(lines))}", facts, body)


def vbench_page(found: VBenchReport, *, most_video_bytes: int = MOST_VIDEO_BYTES) -> str:
    """The page of a report by VBench, in UTF-8: dimensions in %, videos as the package has them."""
    rows = [
        [
            escape(name),
            "–" if it.score is None else f"{100 * it.score:.2f}",
            f"{it.details['videos']} of {it.details['expected']}" if "videos" in it.details else "",
            _status(it.status),
        ]
        for name, it in found.results.items()
    ]
    totals = [
        [f"<b>{escape(name)}</b>", "–" if value is None else f"{100 * value:.2f}", "", ""]
        for name, value in found.totals.scores.items()
    ]
    told = found.remarks()
    clips: dict[Path, Clip] = {}
    scores: dict[Path, dict[str, Result]] = {}
    for dimension, links in found.clips.items():
        values = found.results[dimension].details.get("by_video", {})
        for name, clip in links.items():
            clips[clip.path] = clip
            its = scores.setdefault(clip.path, {})
            if isinstance(values.get(name), int | float):
                its[dimension] = ok(float(values[name]))
    lines = [Line(clip.path.name, clip, None, scores[path]) for path, clip in clips.items()]
    made = found.provenance
    body = (
        f"<h2>Dimensions</h2>{table(('', 'score', 'videos', 'status'), [*rows, *totals])}"
        f"{_notes(told)}{warnings(found.failures())}"
        f"{_videos(worst_first(lines, ()), most_video_bytes)}"
        f"<h2>Scored with</h2>{provenance(made)}"
    )
    facts = f"{made['suite']} {made['version']}, {made['mode']} input"
    return document(f"{made['suite']} of {_count(len(lines))}", facts, body)


def worst_first(lines: Sequence[Line], less: Collection[str]) -> list[Line]:
    """Videos with failures, then by their mean place over the metrics, from 0 for the worst to 1.

    Equal scores share the mean of their places. `less` are metrics of which less is better.
    """
    places: dict[int, list[float]] = {k: [] for k in range(len(lines))}
    for name in _metrics(lines):
        sign = -1.0 if name in less else 1.0
        given = [it.results.get(name) for it in lines]
        scores = {k: sign * it.score for k, it in enumerate(given) if it and it.score is not None}
        ranked = sorted(scores.values())
        for k, score in scores.items():
            mean = (bisect_left(ranked, score) + bisect_right(ranked, score) - 1) / 2
            places[k].append(mean / max(1, len(ranked) - 1))

    def goodness(k: int) -> tuple[bool, float]:
        states = {it.status for it in lines[k].results.values()}
        return "failed" not in states, math.fsum(places[k]) / len(places[k]) if places[k] else 1.0

    return [lines[k] for k in sorted(places, key=goodness)]


def _videos(lines: Sequence[Line], most_bytes: int) -> str:
    """Those that there is room for with all they have, then all as a table."""
    told: list[str] = []
    left = most_bytes
    for line in lines:
        held = _held(line, left)
        left -= sum(map(len, held.values()))
        if not held or left < 0:
            break  # none of the better ones either: the order is kept
        told.append(_case(line, held, first=not told))
    rest = len(lines) - len(told)
    more = note(f"The page is full: {rest} more are in the table below.") if rest else ""
    metrics = _metrics(lines)
    names = _short(metrics)
    rows = [
        [
            f'<span title="{escape(str(it.clip.path))}">{escape(it.name)}</span>',
            *(_score(it.results.get(metric)) for metric in metrics),
        ]
        for it in lines
    ]
    return (
        f"<h2>Videos, the worst first</h2>{''.join(told)}{more}"
        f"<h2>All videos</h2>{table(['', *names], rows)}"
    )


def _held(line: Line, most_bytes: int) -> dict[str, str]:
    """The video, and what it is compared with, as elements; none if the files are too large."""
    clips = {line.name: line.clip}
    if line.reference is not None:
        clips[f"reference: {line.reference.path.name}"] = line.reference
    if sum(_size(it) for it in clips.values()) > most_bytes:
        return {}
    record = line.clip.record
    together = len(clips) > 1 and record is not None and record.request.frames > 1
    return {name: media(it, controls=not together) for name, it in clips.items()}


def _size(clip: Clip) -> int:
    """Of what is put into the page as it is; frames without loss are packed first."""
    return clip.path.stat().st_size if not clip.lossless and clip.path.is_file() else 0


def _case(line: Line, held: Mapping[str, str], *, first: bool) -> str:
    drawn = {name: _by_frame(it) for name, it in line.results.items()}
    headings = ["", "score", *(["by frame"] if any(drawn.values()) else [])]
    rows = [
        [escape(name), _score(it), drawn[name]][: len(headings)]
        for name, it in line.results.items()
    ]
    reasons = _notes(it.reason for it in line.results.values() if it.reason)
    figures = f"<div>{table(headings, rows)}{reasons}</div>"
    record = line.clip.record
    moving = all("<video" in it for it in held.values())
    if record is not None and len(held) > 1 and moving:
        asked = record.request
        body = players(
            list(held), list(held.values()), fps=asked.fps, frames=asked.frames,
            size=(asked.width, asked.height), beside=figures,
        )  # fmt: skip
    else:
        frames = "".join(f'<div class="k-frame">{it}</div>' for it in held.values())
        body = f'<div class="k-below"><div>{frames}</div>{figures}</div>'
    seed = "" if line.clip.seed is None else f", seed {line.clip.seed}"
    path = str(line.clip.path)
    told = escape(line.clip.prompt or path)
    if line.clip.prompt is not None:
        told += f"<small>{escape(f'{path}{seed}')}</small>"
    return (
        f"<details{' open' if first else ''}><summary>{told}</summary><form>{body}</form></details>"
    )


def _by_frame(result: Result) -> str:
    """Values by frame as a line, from its least to its greatest."""
    values = result.details.get("frames", ())
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = high - low or 1.0
    points = " ".join(
        f"{2 + k * (_WIDTH - 4) / (len(values) - 1):.1f},"
        f"{2 + (high - value) / span * (_HEIGHT - 4):.1f}"
        for k, value in enumerate(values)
    )
    return (
        f'<svg class="k-line" viewBox="0 0 {_WIDTH} {_HEIGHT}"><title>{low:.4g} to {high:.4g}'
        f'</title><polyline points="{points}"/></svg>'
    )


def _score(result: Result | None) -> str:
    if result is None:
        return ""
    title = f' title="{escape(result.reason)}"' if result.reason else ""
    if result.score is not None:
        return f"<span{title}>{result.score:.4g}</span>"
    told = "failed" if result.status == "failed" else "–"
    return f'<span class="{result.status}"{title}>{told}</span>'


def _status(status: str) -> str:
    return f'<span class="{status}">{status}</span>'


def _notes(lines: Iterable[str]) -> str:
    return "".join(map(note, dict.fromkeys(lines)))


def _count(videos: int) -> str:
    return f"{videos} video{'' if videos == 1 else 's'}"


def _metrics(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for it in lines for name in it.results))


def _short(metrics: Sequence[str]) -> list[str]:
    """Without the suite that all of them begin with, and with room to wrap."""
    suites = {it.partition(".")[0] for it in metrics if "." in it}
    if len(suites) == 1 and all("." in it for it in metrics):
        metrics = [it.partition(".")[2] for it in metrics]
    return [it.replace("_", " ") for it in metrics]
