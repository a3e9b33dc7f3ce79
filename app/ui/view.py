"""What the page shows of a run: events in, a `View`; a `View` in, HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ...pipelines.events import STAGES, Notice, Progress
from ...pipelines.memory import amount
from ...pipelines.planning import Plan
from ...pipelines.request import Request
from ...pipelines.run import Output, Run
from ...pipelines.worker import Event
from .desk import Ended
from .fields import in_titles

Phase = Literal["idle", "waiting", "running", "done", "cancelled", "failed"]
FILES = "/gradio_api/file="
"""Where gradio serves the files that it may."""

_LAST: dict[str, tuple[Phase, str]] = {
    "cancelled": ("cancelled", "Cancelled"),
    "closed": ("cancelled", "`kinora ui` has ended"),
    "refused": ("failed", ""),
    "fault": ("failed", ""),
}


@dataclass(frozen=True, slots=True)
class View:
    """A run of `request` as far as it is known.

    `at` is when `progress` came, on the clock of the caller; `outputs` are on disk, and `kept` says
    which latents are.
    """

    phase: Phase = "idle"
    request: Request | None = None
    progress: Progress | None = None
    at: float = 0.0
    stopping: bool = False
    notices: tuple[str, ...] = ()
    told: str = ""
    kept: str = ""
    outputs: tuple[Output, ...] = ()

    @property
    def busy(self) -> bool:
        """Whether more is to come."""
        return self.phase in ("waiting", "running")


def after(view: View, event: Event | Ended, now: float) -> View:
    """The view once `event` has come."""
    if not view.busy:
        return view  # a cancel that came too late changes nothing
    if isinstance(event, Progress):
        return replace(view, phase="running", progress=event, at=now)
    if isinstance(event, Notice):
        return replace(view, notices=(*view.notices, event.text))
    if isinstance(event, Run):
        return replace(view, phase="done", outputs=event.outputs)
    phase, told = _LAST[event.how]
    return replace(view, phase=phase, told=told or event.text, kept=event.text if told else "")


def failed(text: str) -> View:
    """A run that was refused before it was one."""
    return View("failed", told=text)


def status(view: View, now: float) -> str:
    """The line about the run, its bar and its notices, as HTML."""
    lines: list[str] = []
    if view.busy:
        lines.append(_doing(view, now))
    elif view.told:
        told = view.told
        if view.phase == "cancelled":
            stays = ["the finished videos stay"] if view.outputs else []
            stays += [view.kept] if view.kept else []
            told += f": {'; '.join(stays) or 'nothing of it is left'}."
        lines.append(f'<p class="k-{view.phase}">{_worded(told)}</p>')
    lines += [f'<p class="k-notice">{_worded(text)}</p>' for text in view.notices]
    return f'<div role="status" data-phase="{view.phase}">{"".join(lines)}</div>'


def result(view: View) -> str:
    """The videos that there are, where, how long they took and what ran, as HTML."""
    if not view.outputs:
        return '<div class="k-frame k-empty">The video appears here.</div>'
    shown = "".join(_output(view, output) for output in view.outputs)
    several = " k-several" if view.request and view.request.num_videos > 1 else ""
    return f'<div class="k-outputs{several}">{shown}</div>{_times(view)}{_receipt(view)}'


def prediction(plan: Plan) -> str:
    """What a run would do and need, as HTML."""
    request = plan.request
    fits = plan.memory.peak <= plan.free_bytes
    lines = [
        f"{plan.tokens:,} tokens, {request.steps} steps on {request.device}",
        f"{amount(plan.memory.peak)} of memory, {amount(plan.free_bytes)} free: "
        f"it {'fits' if fits else 'does not fit'}",
    ]
    parts = [f"{it.part} {it.verdict}: {it.why}" for it in plan.parts]
    parts += [
        f"denoising {it.speedup:.2f} times as fast"
        for it in plan.parts
        if it.speedup is not None and f"{it.speedup:.2f}" != "1.00"
    ]
    lines += parts or ["nothing accelerated: the stock pipeline"]
    bad = not fits or any(it.verdict == "refused" for it in plan.parts)
    return _remark("Predicted", lines, "k-bad" if bad else "")


def refused(text: str) -> str:
    """Why nothing can be predicted, as HTML."""
    return _remark("Predicted", [text], "k-bad k-refused")


def _remark(heading: str, lines: list[str], mark: str = "") -> str:
    items = "".join(f"<li>{_worded(line)}</li>" for line in lines)
    return f'<div class="k-remark {mark}"><b>{heading}</b><ul>{items}</ul></div>'


def _worded(text: str) -> str:
    """A text of Kinora's as HTML, in the page's words."""
    return escape(in_titles(text))


def _doing(view: View, now: float) -> str:
    progress = view.progress
    if progress is None:
        doing, count, times = "waiting for its turn", "", ""
    else:
        passed = max(0.0, now - view.at)
        doing = progress.doing
        which = f"video {progress.video} of {progress.videos}" if progress.videos > 1 else ""
        step = f"step {progress.step} of {progress.steps}" if progress.steps else ""
        count = ", ".join(filter(None, (which, step)))
        times = f"{progress.elapsed_s + passed:.0f} s"
        if progress.eta_s is not None:
            times += f", about {max(0.0, progress.eta_s - passed):.0f} s left"
    if view.stopping:
        doing, count = "stopping, within a step", ""
    known = progress is not None and progress.steps > 0
    value = f' max="{progress.steps}" value="{progress.step}"' if progress and known else ""
    return (
        f'<p class="k-doing"><b>{doing}</b> <span>{count}</span> <span>{times}</span></p>'
        f'<progress aria-label="{doing}"{value}></progress>'
    )


def _output(view: View, output: Output) -> str:
    files = filter(None, (output.path, output.sidecar, output.latents))
    return (
        f'<div><figure class="k-frame">{_media(view, output)}</figure>'
        f'<p class="k-paths">{" ".join(_link(path) for path in files)}</p></div>'
    )


def _times(view: View) -> str:
    times = [(it, sum(output.stages_s[it] for output in view.outputs)) for it in STAGES]
    times.append(("total", sum(taken for _, taken in times)))
    cells = "".join(f"<div><dt>{name}</dt><dd>{taken:.2f} s</dd></div>" for name, taken in times)
    return f'<dl class="k-times">{cells}</dl>'


def _receipt(view: View) -> str:
    receipts = [output.receipt for output in view.outputs if output.receipt is not None]
    lines = dict.fromkeys(line for receipt in receipts for line in receipt.words())
    return _remark("Receipt", list(lines)) if lines else ""


def _media(view: View, output: Output) -> str:
    request, facts = view.request, f'src="{_url(output.path, output.frames_sha256)}"'
    prompt = escape(request.prompt) if request else ""
    if request and request.width and request.height:  # its place is kept while it loads
        facts += f' width="{request.width}" height="{request.height}"'
    if output.path.suffix in (".mp4", ".webm"):
        return (
            f'<video {facts} aria-label="{prompt}" controls autoplay loop muted playsinline>'
            "</video>"
        )
    return f'<img {facts} alt="{prompt}">'


def _link(path: Path) -> str:
    return f'<a href="{_url(path)}" target="_blank">{escape(str(path))}</a>'


def _url(path: Path, version: str = "") -> str:
    # The version keeps a browser from showing an earlier file of the same name.
    query = f"?{quote(version[:16])}" if version else ""
    return f"{FILES}{quote(os.path.abspath(os.path.expanduser(path)))}{query}"
