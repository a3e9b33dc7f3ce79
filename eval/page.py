"""A comparison as one HTML file: nothing is fetched, the videos are inside of it.

The scores are of the files, also where videos without loss are packed as mp4 for the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from .comparison import Case, Compared, Comparison
from .costs import STAGES, WHOLE, Cost, gain
from .markup import MOST_VIDEO_BYTES, document, media, note, provenance, table, warnings
from .paired import KEPT_SHARE
from .players import players
from .plot import Point, plot
from .runs import record_of

RULINGS = {
    "kept": "keeps 99 %",
    "below": "below 99 %",
    "none": "no verdict",
    "refused": "refused",
}


def page(found: Comparison, *, most_video_bytes: int = MOST_VIDEO_BYTES) -> str:
    """The report, in UTF-8. Cases beyond the bound, which are the better ones, name their files."""
    names = [it.name for it in found.recipes]
    title = f"{_listed(names)} against {found.dense}"
    made = found.provenance
    facts = (
        f"{made['model']}, {made['size']}, {made['frames']} frames, {made['steps']} steps, "
        f"guidance {made['guidance']}; {len(found.cases)} videos of each, of {made['prompts']} "
        f"prompts with seeds {_seeds(made['seeds'])}; {made['made_on']}, {made['threads']} threads"
    )
    body = (
        f"<h2>Verdict</h2>{_verdicts(found)}{warnings((*found.failures(), *found.notes()))}"
        f"<h2>Speed and quality</h2>{_plotted(found)}"
        f"<h2>Seconds by stage</h2>{_stages(found)}"
        f"<h2>Scores, as differences of pairs</h2>{_scores(found)}"
        f"<h2>Videos, the worst first</h2>{_cases(found, most_video_bytes)}"
        f"<h2>Made with</h2>{provenance(made)}"
    )
    return document(title, facts, body)


def row_of(found: Comparison, it: Compared) -> list[str]:
    """What the table says of a recipe, cell by cell, as `HEADINGS` name them."""
    headline = it.quality[found.headline]
    told = headline.difference
    cost = it.cost
    return [
        RULINGS[it.ruling] + ("" if headline.kept is None or headline.sure else ", unsure"),
        "–" if headline.ratio is None else f"{headline.ratio:.1%}",
        "–" if told is None else f"{told.mean:+z.3f} ({told.low:+z.3f} to {told.high:+z.3f})",
        _mean(it, "psnr", ".1f"),
        _mean(it, "ssim", ".4f"),
        times(cost, found.dense_cost),
        "–" if it.against == found.dense else f"{times(cost, it.against_cost)} {it.against}",
        "–" if cost is None else f"{cost.evaluations:.3g}/{cost.steps:.3g}",
        "–" if cost is None else f"{cost.density:.0%}",
        _memory(cost),
    ]


HEADINGS = (
    *("verdict", "of dense", "difference (95 %)", "PSNR", "SSIM", "speed", "same kernels"),
    *("steps", "density", "memory"),
)


def times(fast: Cost | None, dense: Cost | None, stage: str = WHOLE) -> str:
    """How many times as fast, in words."""
    ratio = None if fast is None or dense is None else gain(fast, dense, stage)
    return "–" if ratio is None else f"{ratio:.2f}×"


def _verdicts(found: Comparison) -> str:
    rows = [
        [escape(it.name), f'<span class="{it.ruling}">{escape(cells[0])}</span>',
         *map(escape, cells[1:])]
        for it in found.recipes
        for cells in (row_of(found, it),)
    ]  # fmt: skip
    dense = found.dense_cost
    steps = f"{dense.evaluations:.3g}/{dense.steps:.3g}"
    cells = ["", "", "", "", "", "1×", "", steps, f"{dense.density:.0%}", _memory(dense)]
    rows.append([escape(found.dense), *cells])
    rule = (
        f"The rule: the mean of {found.headline} is at least {KEPT_SHARE:.0%} of the dense one; "
        f"unsure where the interval of the pairs, resampled, does not lie on one side of that. "
        f"Same kernels: over the dense run whose dense calls ran by the same kernel. Steps: those "
        f"for which the denoiser was evaluated."
    )
    return table(["", *HEADINGS], rows) + note(rule)


def _plotted(found: Comparison) -> str:
    metric = found.headline
    dense = found.dense_quality[metric]
    if dense.mean is None or dense.low is None or dense.high is None:
        return note(f"no plot: {metric}: {dense.reason}")
    points = [Point(found.dense, 1.0, dense.mean, dense.low, dense.high)]
    for it in found.recipes:
        verdict = it.quality[metric]
        faster = None if it.cost is None else gain(it.cost, found.dense_cost)
        if verdict.fast is None or verdict.dense is None or faster is None:
            continue
        span = verdict.difference
        if span is not None:  # the interval of the pairs, set upon the dense mean
            low, high = verdict.dense + span.low, verdict.dense + span.high
            points.append(Point(it.name, faster, verdict.fast, low, high))
    drawn = plot(points, score=metric, rule=KEPT_SHARE * dense.mean)
    return drawn + note(
        "Bars of recipes: the 95 % interval of their paired difference from the dense mean."
    )


def _stages(found: Comparison) -> str:
    dense = found.dense_cost
    rows: list[list[str]] = []
    costs = [(found.dense, dense), *((it.name, it.cost) for it in found.recipes)]
    for name, cost in costs:
        if cost is None:
            rows.append([escape(name), *("–" for _ in (*STAGES, WHOLE, ""))])
            continue
        cells = [
            f"{cost.seconds[stage]:.2f} s"
            + ("" if cost is dense else f" <b>{times(cost, dense, stage)}</b>")
            for stage in (*STAGES, WHOLE)
        ]
        rows.append([escape(name), *cells, f"{cost.timed} of {cost.runs}"])
    return table(["", *STAGES, WHOLE, "runs timed"], rows) + note(
        "Medians. Runs right after loading, which warm up, are left out where there are others."
    )


def _scores(found: Comparison) -> str:
    rows: list[list[str]] = []
    for metric, dense in found.dense_quality.items():
        cells = ["–" if dense.mean is None else f"{dense.mean:.4f}"]
        for it in found.recipes:
            told = it.quality[metric].difference
            title = escape(it.quality[metric].reason)
            cells.append(
                f'<span title="{title}">–</span>' if told is None
                else f"{told.mean:+z.4f} <small>{told.low:+z.4f} to {told.high:+z.4f}</small>"
            )  # fmt: skip
        rows.append([escape(metric), *cells])
    return table(["", found.dense, *(it.name for it in found.recipes)], rows)


def _cases(found: Comparison, most_bytes: int) -> str:
    told: list[str] = []
    left = most_bytes
    for number, case in enumerate(found.cases):
        held = {name: media(clip) for name, clip in case.clips.items()} if left > 0 else {}
        size = sum(len(it) for it in held.values())
        if size > left:
            held, size, left = {}, 0, 0  # none of the better ones either: the order is kept
        left -= size
        told.append(_case(found, case, held, first=not number))
    return "".join(told)


def _case(found: Comparison, case: Case, held: Mapping[str, str], *, first: bool) -> str:
    prompt, seed = case.identity
    others = [name for name in case.clips if name != found.dense]
    rows = [
        [escape(name), *(_score(case, name, it) for it in (found.headline, "psnr", "ssim"))]
        for name in case.clips
    ]
    figures = table(["", found.headline, "PSNR", "SSIM"], rows)
    request = record_of(next(iter(case.clips.values()))).request
    if held and request.frames > 1 and others:
        body = players(
            list(held), list(held.values()), fps=request.fps, frames=request.frames,
            size=(request.width, request.height), beside=figures,
        )  # fmt: skip
    elif held:
        body = "".join(f'<div class="k-frame">{it}</div>' for it in held.values()) + figures
    else:
        files = "".join(f"<p>{escape(f'{n}: {it.path}')}</p>" for n, it in case.clips.items())
        body = f'<div class="k-facts"><p>The page is full: the files are</p>{files}</div>{figures}'
    return (
        f"<details{' open' if first else ''}><summary>{escape(prompt)}"
        f"<small>seed {seed}</small></summary><form>{body}</form></details>"
    )


def _score(case: Case, name: str, metric: str) -> str:
    result = case.results[name].get(metric)
    if result is None:
        return "–"
    if result.score is None:
        return f'<span title="{escape(result.reason)}">–</span>'
    return f"{result.score:.4g}"


def _mean(it: Compared, metric: str, form: str) -> str:
    mean = it.fidelity[metric].mean
    return "–" if mean is None else format(mean, form)


def _memory(cost: Cost | None) -> str:
    if cost is None or cost.memory_bytes is None:
        return "–"
    return f"{cost.memory_bytes / 1e9:.1f} GB"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds[:8])) + (f" and {len(seeds) - 8} more" if seeds[8:] else "")
