"""What the page shows of a run: events in, a `View`; a `View` in, HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ...pipelines.events import STAGES, Notice, Progress, Stage
from ...pipelines.memory import amount
from ...pipelines.planning import Plan
from ...pipelines.run import Output, Run
from ...pipelines.worker import Event
from .desk import Ended

Phase = Literal["idle", "waiting", "running", "done", "cancelled", "failed"]
FILES = "/gradio_api/file="
"""Where gradio serves the files that it may."""

_DOING: dict[Stage, str] = {
    "load": "loading the model",
    "text": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
}
_LAST: dict[str, tuple[Phase, str]] = {
    "cancelled": ("cancelled", "Cancelled: nothing of it is left."),
    "closed": ("cancelled", "Stopped: `kinora ui` has ended."),
    "refused": ("failed", ""),
    "fault": ("failed", ""),
}


@dataclass(frozen=True, slots=True)
class View:
    """A run as far as it is known. `at` is when `progress` came, on the clock of the caller."""

    phase: Phase = "idle"
    progress: Progress | None = None
    at: float = 0.0
    stopping: bool = False
    notices: tuple[str, ...] = ()
    told: str = ""
    run: Run | None = None

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
        return replace(view, phase="done", run=event)
    phase, told = _LAST[event.how]
    return replace(view, phase=phase, told=told or event.text)


def failed(text: str) -> View:
    """A run that was refused before it was one."""
    return View("failed", told=text)


def status(view: View, now: float) -> str:
    """The line about the run, its bar and its notices, as HTML."""
    lines: list[str] = []
    if view.told:
        lines.append(f'<p class="k-{view.phase}">{escape(view.told)}</p>')
    elif view.busy:
        lines.append(_doing(view, now))
    lines += [f'<p class="k-notice">{escape(text)}</p>' for text in view.notices]
    return f'<div role="status" data-phase="{view.phase}">{"".join(lines)}</div>'


def result(view: View) -> str:
    """The video with what ran, how long it took and where it is, as HTML."""
    if view.run is None:
        return '<div class="k-frame k-empty">The video appears here.</div>'
    return "".join(_output(view.run, output) for output in view.run.outputs)


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
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="k-remark {mark}"><b>{heading}</b><ul>{items}</ul></div>'


def _doing(view: View, now: float) -> str:
    progress = view.progress
    if progress is None:
        doing, count, times = "waiting for its turn", "", ""
    else:
        passed = max(0.0, now - view.at)
        doing = "saving the latents" if progress.latents else _DOING[progress.stage]
        count = f"step {progress.step} of {progress.steps}" if progress.steps else ""
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


def _output(run: Run, output: Output) -> str:
    times = [(stage, output.stages_s[stage]) for stage in STAGES]
    times.append(("total", sum(output.stages_s.values())))
    cells = "".join(f"<div><dt>{name}</dt><dd>{taken:.2f} s</dd></div>" for name, taken in times)
    receipt = output.receipt.words() if output.receipt is not None else []
    return (
        f'<figure class="k-frame">{_media(run, output)}</figure>'
        f'<dl class="k-times">{cells}</dl>'
        f"{_remark('Receipt', receipt) if receipt else ''}"
        f'<p class="k-paths">{_link(output.path)} {_link(output.sidecar)}</p>'
    )


def _media(run: Run, output: Output) -> str:
    request = run.request
    facts = f'src="{_url(output.path, output.frames_sha256)}" width="{request.width}" '
    facts += f'height="{request.height}"'
    if output.path.suffix in (".mp4", ".webm"):
        return (
            f'<video {facts} aria-label="{escape(request.prompt)}" '
            f"controls autoplay loop muted playsinline></video>"
        )
    return f'<img {facts} alt="{escape(request.prompt)}">'


def _link(path: Path) -> str:
    return f'<a href="{_url(path)}" target="_blank">{escape(str(path))}</a>'


def _url(path: Path, version: str = "") -> str:
    # The version keeps a browser from showing an earlier file of the same name.
    query = f"?{quote(version[:16])}" if version else ""
    return f"{FILES}{quote(os.path.abspath(os.path.expanduser(path)))}{query}"
