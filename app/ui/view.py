"""What the page shows of jobs and videos, as HTML: everything that came from outside is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from ...pipelines.errors import shortened
from ...pipelines.events import STAGES
from ...pipelines.memory import amount
from ...pipelines.planning import Plan, refusal
from ...pipelines.request import Resolved
from ...pipelines.sidecar import Record
from ...pipelines.timing import Timed
from .fields import in_titles
from .seen import Seen, phase, recipe_name

_CODE = re.compile("`([^`]+)`")
EMPTY = '<div class="k-frame k-empty">The video appears here.</div>'
_ACTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "queued": (("cancel", "Cancel"),),
    "running": (("cancel", "Cancel"),),
    "done": (("open", "Open"), ("remove", "Delete")),
    "failed": (("retry", "Retry"), ("remove", "Delete")),
    "cancelled": (("retry", "Retry"), ("remove", "Delete")),
    "interrupted": (("retry", "Retry"), ("remove", "Delete")),
}
_SURE = ' data-sure="Delete for good?"'


def failed(text: str) -> str:
    """The status of what was refused before it was a job."""
    return _status("failed", [f'<p class="k-failed">{worded(text)}</p>'])


def status(seen: Sequence[Seen]) -> str:
    """The line about what was asked for, its bar and its notices."""
    lines: list[str] = []
    current = next((it for it in seen if it.job.status == "running"), None)
    current = current or next((it for it in seen if it.job.open), None)
    if current is not None:
        lines.append(doing(current, 1 + seen.index(current), len(seen)))
    told = dict.fromkeys(_ending(it) for it in seen if it.phase in ("failed", "cancelled"))
    lines += told
    lines += [f'<p class="k-notice">{worded(text)}</p>' for text in _notices(seen)]
    return _status(phase(seen), lines)


def restored(record: Record) -> str:
    """The status once settings stand as a record has them."""
    told = f"Settings of {record.created} are restored; Generate makes it again."
    return _status("idle", [f'<p class="k-notice">{escape(told)}</p>'])


def doing(seen: Seen, number: int = 1, count: int = 1) -> str:
    """What is being done at a job that has not ended, with a bar."""
    progress, which = seen.progress, f"video {number} of {count}" if count > 1 else ""
    what, step, times, bar = "starting", "", "", ""
    if seen.job.status == "queued":
        what = "waiting for its turn"
        times = f"{seen.ahead} ahead of it" if seen.ahead else "next"
        times = worded(seen.held) if seen.held else times
    elif progress is not None:
        what = progress.doing
        times = f"{progress.elapsed_s + seen.ago_s:.0f} s"
        if progress.eta_s is not None:
            times += f", about {max(0.0, progress.eta_s - seen.ago_s):.0f} s left"
        if progress.steps:
            step = f"step {progress.step} of {progress.steps}"
            bar = f' max="{progress.steps}" value="{progress.step}"'
    if seen.job.stopping:
        what, step = "stopping, within a step", ""
    where = ", ".join(filter(None, (which, step)))
    return (
        f'<p class="k-doing"><b>{what}</b> <span>{where}</span> <span>{times}</span></p>'
        f'<progress aria-label="{what}"{bar}></progress>'
    )


def result(seen: Sequence[Seen]) -> str:
    """The videos that there are, where, how long they took and what ran; before that, previews."""
    done = [it for it in seen if it.record is not None]
    if not done:
        shown = next((it for it in seen if it.preview is not None), None)
        return EMPTY if shown is None else _preview(shown)
    shown = "".join(_output(it) for it in done)
    several = " k-several" if len(seen) > 1 else ""
    records = [it.record for it in done if it.record is not None]
    return f'<div class="k-outputs{several}">{shown}</div>{details(records)}'


def _preview(seen: Seen) -> str:
    request, step = seen.job.row.request, seen.preview
    frame = "the first frame" if request.frames > 1 else "the image"
    told = f"Preview: {frame} as step {step} of {request.steps} estimates it"
    address = f"/v1/videos/{seen.name}/preview?step={step}"
    return (
        f'<figure class="k-frame k-preview"><img src="{address}" alt="{told}" '
        f'width="{request.width}" height="{request.height}"></figure>'
        f'<p class="k-facts">{told}.</p>'
    )


def details(records: Sequence[Record]) -> str:
    """How long videos took by stage, and what their receipts say."""
    return _times(records) + _receipt(records)


def media(request: Resolved, address: str, extra: str = "controls autoplay loop") -> str:
    """A video or image in its place."""
    told = prompt(request)
    # Its place is kept while it loads.
    facts = f'src="{address}" width="{request.width}" height="{request.height}"'
    if request.format in ("mp4", "webm"):
        return f'<video {facts} aria-label="{told}" {extra} muted playsinline></video>'
    return f'<img {facts} alt="{told}">'


def listing(seen: Sequence[Seen], *, more: bool = False) -> str:
    """Jobs as a list, with what can be done about each; `more` says that there are older ones."""
    if not seen:
        return '<div class="k-frame k-empty">No job yet.</div>'
    held = next((it.held for it in seen if it.held), None)
    note = f'<p class="k-notice">{worded(held)}</p>' if held else ""
    older = '<p class="k-facts">Older ones are in <code>GET /v1/videos</code> alone.</p>'
    listed = "".join(map(_listed, seen))
    return f'{note}<ul class="k-jobs">{listed}</ul>{older if more else ""}'


def prediction(plan: Plan, timed: Timed | None = None, notices: Sequence[str] = ()) -> str:
    """What a run would do and need, how long it would take, and what it would say besides."""
    request = plan.request
    fits = plan.memory.peak <= plan.free_bytes
    lines = [
        f"{plan.tokens:,} tokens, {request.steps} steps on {request.device}",
        _lasting(timed),
        f"{amount(plan.memory.peak)} of memory, {amount(plan.free_bytes)} free: "
        f"it {'fits' if fits else 'does not fit'}",
    ]
    if plan.parts and plan.speedup is None:
        lines.append("how much faster denoising is, is not known beforehand")
    elif plan.speedup is not None and any(f"{it:.2f}" != "1.00" for it in plan.speedup):
        lines.append(f"denoising {_between(*plan.speedup, digits=2)} times as fast")
    errors = [refusal(it, strict=request.strict) for it in plan.parts]
    for part, error in zip(plan.parts, errors, strict=True):
        adjusted = error is not None and part.verdict != "refused"
        lines.append(str(error) if adjusted else f"{part.part} {part.verdict}: {part.why}")
    lines += [] if plan.parts else ["nothing accelerated: the stock pipeline"]
    bad = not fits or any(errors)
    return remark("Predicted", [*lines, *notices], "k-bad" if bad else "")


def _lasting(timed: Timed | None) -> str:
    if timed is None:
        return "how long it takes is known once a video like it was made here"
    what = "the same recipe" if timed.same else "dense"
    return (
        f"about {_between(timed.least_s, timed.most_s)} s once the model is loaded, by a run "
        f"of {timed.by.created[:10]}, {what}"
    )


def _between(least: float, most: float, digits: int = 0) -> str:
    told = [f"{it:.{digits}f}" for it in (least, most)]
    return told[0] if told[0] == told[1] else " to ".join(told)


def refused(text: str, heading: str = "Predicted") -> str:
    """Why nothing can be predicted, or made."""
    return remark(heading, [text], "k-bad")


def remark(heading: str, lines: Sequence[str], mark: str = "") -> str:
    """Some lines under a heading."""
    items = "".join(f"<li>{worded(line)}</li>" for line in lines)
    return f'<div class="k-remark {mark}"><b>{heading}</b><ul>{items}</ul></div>'


def worded(text: str) -> str:
    """A text of Kinora's as HTML, in the page's words, with code where backticks say so."""
    return _CODE.sub(r"<code>\1</code>", escape(in_titles(text)))


def prompt(request: Resolved) -> str:
    """What was asked for in words; of long ones both ends."""
    return escape(shortened(request.prompt))


def settings(request: Resolved) -> str:
    """What was asked for, in a line."""
    facts = (
        request.model,
        f"{request.width}×{request.height}",
        f"{request.frames} frames" if request.frames > 1 else "1 frame",
        f"{request.steps} steps",
        f"seed {request.seed}",
        recipe_name(request.recipe),
    )
    return escape(" · ".join(facts))


def _status(phase: str, lines: Sequence[str]) -> str:
    return f'<div role="status" data-phase="{phase}">{"".join(lines)}</div>'


def _notices(seen: Sequence[Seen]) -> list[str]:
    """What jobs say besides, each once; of which recipe it is, unless it is of the first too."""
    by_text: dict[str, dict[str, None]] = {}
    for it in seen:
        for text in it.notices:
            by_text.setdefault(text, {})[recipe_name(it.job.row.request.recipe)] = None
    first = recipe_name(seen[0].job.row.request.recipe) if seen else ""
    return [
        text if first in names else f"{', '.join(names)}: {text}" for text, names in by_text.items()
    ]


def _ending(seen: Seen) -> str:
    """How a job ended that came to no video, in a line."""
    job = seen.job
    told = job.reason or f"the job was {job.status}"
    if job.status == "cancelled":
        told = "Cancelled: nothing of it is left."
    elif job.status == "interrupted":
        told = f"Interrupted: {told}"
    if seen.latents is not None and str(seen.latents) not in told:
        told = told.replace(": nothing of it is left.", "")
        told += f": its latents are kept: finish with `kinora decode {seen.latents}`"
    return f'<p class="k-{seen.phase}">{worded(told)}</p>'


def _listed(seen: Seen) -> str:
    job = seen.job
    buttons = "".join(
        f'<button data-act="{act}" data-id="{seen.name}"{_SURE if act == "remove" else ""}>{label}'
        "</button>"
        for act, label in _ACTIONS[job.status]
    )
    if job.stopping:
        buttons = f'<button data-act="cancel" data-id="{seen.name}">Stop at once</button>'
    more = doing(seen) if job.open else _ending(seen) if job.status != "done" else ""
    took = ""
    if job.status == "done" and job.started and job.ended:
        took = f" · {job.ended - job.started:.0f} s"
    return (
        f'<li data-status="{job.status}"><div class="k-what"><span class="k-chip">{job.status}'
        f"</span> <b>{prompt(job.row.request)}</b>"
        f'<p class="k-facts">{settings(job.row.request)}{took}</p>{more}</div>'
        f'<div class="k-acts">{buttons}</div></li>'
    )


def _output(seen: Seen) -> str:
    request, address = seen.job.row.request, f"/v1/videos/{seen.name}/content"
    links = [(address, f"{seen.job.row.name}.{request.format}")]
    links.append((f"{address}?variant=sidecar", f"{seen.job.row.name}.json"))
    if seen.latents is not None:
        links.append((f"{address}?variant=latents", seen.latents.name))
    named = " ".join(
        f'<a href="{url}" download="{escape(it)}">{escape(it)}</a>' for url, it in links
    )
    return (
        f'<div><figure class="k-frame">{media(request, address)}</figure>'
        f'<p class="k-paths">{named}</p></div>'
    )


def _times(records: Sequence[Record]) -> str:
    times: dict[str, float] = {
        it: sum(record.stages_s.get(it, 0.0) for record in records) for it in STAGES
    }
    times["total"] = sum(times.values())
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{taken:.2f} s</dd></div>" for name, taken in times.items()
    )
    return f'<dl class="k-times">{cells}</dl>'


def _receipt(records: Sequence[Record]) -> str:
    receipts = [it.receipt for it in records if it.receipt is not None]
    lines = dict.fromkeys(line for receipt in receipts for line in receipt.words())
    return remark("Receipt", list(lines)) if lines else ""
