"""The tab Compare: the same prompt and seed, dense and by one or two recipes, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool

from ...accel import recipe as recipes
from ...accel.receipt import Receipt
from ...eval import fidelity
from ...eval.players import SCRIPT, players
from ...eval.result import Result
from ...eval.world import ALL_CORRECT, judge
from ...pipelines.errors import KinoraError, RequestError
from ...pipelines.jobs import Jobs
from ...pipelines.media import read_frames
from ...pipelines.request import DENSE, Request
from ...pipelines.sidecar import Record
from . import view
from .acting import grey_when_pressed
from .history import BRIEF, OWN, Fields, Update, Values
from .seen import Seen, recipe_name

EMPTY = (
    '<div class="k-frame k-empty">The same prompt and seed, dense and with recipes, appears here.'
    "</div>"
)
_PLAYED = ("mp4", "webm")
_STAGES = ("text", "denoise", "decode")
_LOADING_S = 0.5
_TOO_SHORT_S = 0.05  # for a ratio to mean anything
_TICK_S = 0.5
_CHOSEN = "of Generate", "/generate"
"""How the lists offer what is chosen there, and what stands for it."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A video beside the first, which is dense; `fidelity` is by metric, empty for the first.

    `correct` is the judge's verdict where the prompt is one of the world's, from 0 to 1.
    """

    address: str
    record: Record
    fidelity: dict[str, Result]
    correct: float | None


class Compare:
    """The tab at work; what is compared are the fields of Generate."""

    def __init__(self, page: Fields, jobs: Jobs) -> None:
        self._page, self._jobs = page, jobs
        self._asked: dict[str | None, list[str]] = {}
        with gr.Tab("Compare", id="compare") as self.tab:
            gr.HTML(
                '<p class="k-facts">The prompt, model, size and seed of Generate, made dense '
                "and by</p>"
            )
            with gr.Row(elem_id="k-versus"):
                names = [it for it in recipes.names() if it != DENSE]
                offered = [*((it, it) for it in names), _CHOSEN]
                shared: dict[str, Any] = {"allow_custom_value": True, "min_width": 140}
                self._first = gr.Dropdown(
                    offered, value=names[0], label="Recipe", elem_id="k-recipe-1", **shared
                )
                self._second = gr.Dropdown(
                    [("none", ""), *offered], value="", label="and recipe",
                    elem_id="k-recipe-2", **shared,
                )  # fmt: skip
                self._start = gr.Button("Compare", variant="primary", elem_id="k-compare-start")
                self._stop = gr.Button("Cancel", interactive=False, elem_id="k-compare-cancel")
            self._status = gr.HTML(view.status(()), elem_id="k-compare-status")
            self._result = gr.HTML(
                EMPTY, elem_id="k-compared", js_on_load=SCRIPT.read_text("utf-8")
            )

    def wire(self, inputs: set[Any]) -> None:
        """Connect the components; `inputs` are those of a request."""
        drawn = [self._status, self._result, self._start, self._stop]
        grey_when_pressed(self._start)
        asked = self._start.click(
            self.compare, inputs | {self._first, self._second}, drawn, concurrency_limit=None, **OWN
        )
        for over in (asked.then, asked.failure):
            over(self.ready, None, [self._start, self._stop], **BRIEF)
        self._stop.click(self.cancel, None, self._stop, **BRIEF)

    async def compare(self, values: Values, asker: gr.Request) -> AsyncGenerator[Update, None]:
        """Have the videos made, and show how far they are, then how they compare."""
        names = [values[self._first], values[self._second]]
        yield self._drawn(view.status(()), busy=True) | {self._result: EMPTY}
        try:
            requests = await run_in_threadpool(self._requests, values, names)
            jobs = await run_in_threadpool(self._jobs.submit, *requests)
            ids = self._asked[asker.session_hash] = [job.id for job in jobs]
            while True:
                seen = await run_in_threadpool(self._page.see, ids)
                yield self._drawn(view.status(seen), busy=any(it.job.open for it in seen))
                if not any(it.job.open for it in seen):
                    break
                await asyncio.sleep(_TICK_S)
            if len(seen) == len(ids) and all(it.record for it in seen):
                found = await run_in_threadpool(measure, self._jobs, seen)
                yield {self._result: shown(found)}
        except Exception as error:
            yield self._drawn(view.failed(self._page.told(error)), busy=False)

    def ready(self) -> Update:
        """Offer the next one."""
        return {
            self._start: gr.Button(interactive=True),
            self._stop: gr.Button(interactive=False),
        }

    def cancel(self, asker: gr.Request) -> Update:
        """Ask for what is being made to end."""
        for id in self._asked.get(asker.session_hash, ()):
            job = self._jobs.get(id)
            if job is not None and not job.stopping:
                self._jobs.cancel(id)
        return {self._stop: gr.Button(interactive=False)}

    def _requests(self, values: Values, names: Sequence[str | None]) -> list[Request]:
        """Dense, then by each recipe. Raises `KinoraError`."""
        base = self._page.request(values).model_copy(update={"num_videos": 1})
        resolved = self._jobs.resolve(base)
        if resolved.format not in _PLAYED:
            raise RequestError(
                f"a {resolved.format} cannot be compared: choose --format {' or '.join(_PLAYED)}"
                f"{' and several --frames' if resolved.frames == 1 else ''}"
            )
        chosen = [it for it in names if it]
        dense = [it for it in chosen if it == _CHOSEN[1] and not resolved.recipe]
        if not chosen or dense or len({DENSE, *chosen}) <= len(chosen):
            raise RequestError("choose a recipe to compare with dense, or two that differ")
        made: list[Request] = []
        for name in (DENSE, *chosen):
            own = name == _CHOSEN[1]
            made.append(base if own else base.model_copy(update={"recipe": name, "settings": ()}))
            self._page.check(made[-1])
        return made

    def _drawn(self, status: str, *, busy: bool) -> Update:
        return {
            self._status: status,
            self._start: gr.Button(interactive=False),  # until all of it was told: see `ready`
            self._stop: gr.Button(interactive=busy),
        }


def measure(jobs: Jobs, seen: Sequence[Seen]) -> list[Compared]:
    """How near each video is to the first, and whether it shows what was asked for."""
    found: list[Compared] = []
    reference: fidelity.Frames | None = None
    for it in seen:
        record = it.record
        if record is None:
            raise KinoraError(f"{it.name} has no sidecar any more")
        frames = read_frames(jobs.media(it.job))
        near: dict[str, Result] = {}
        if reference is None:
            reference = frames
        else:
            near = {name: fidelity.compare(frames, reference, name) for name in ("psnr", "ssim")}
        try:
            correct = judge(frames, record.request.prompt)[ALL_CORRECT]
        except ValueError:  # no prompt or no size of the world
            correct = None
        found.append(Compared(f"/v1/videos/{it.name}/content", record, near, correct))
    return found


def shown(found: Sequence[Compared]) -> str:
    """The players, the stage where two are laid over each other, and the figures."""
    request = found[0].record.request
    names = [recipe_name(it.record.request.recipe) for it in found]
    media = [view.media(it.record.request, it.address, "preload=auto loop") for it in found]
    return players(
        names,
        media,
        fps=request.fps,
        frames=request.frames,
        size=(request.width, request.height),
        beside=_figures([escape(it) for it in names], found),
    )


def _figures(names: Sequence[str], found: Sequence[Compared]) -> str:
    first = found[0].record
    rows: list[list[str]] = []
    for stage in (*_STAGES, "all three"):
        times = [_seconds(it.record, stage) for it in found]
        cells = [f"{times[0]:.2f} s"]
        cells += [
            f"{taken:.2f} s" + _ratio(times[0], taken, it.record.receipt)
            for taken, it in zip(times[1:], found[1:], strict=True)
        ]
        rows.append([stage, *cells])
    for label, metric, unit in (("PSNR", "psnr", " dB"), ("SSIM", "ssim", "")):
        results = [it.fidelity[metric] for it in found[1:]]
        rows.append([label, "–", *(_score(it, unit) for it in results)])
    if any(it.correct is not None for it in found):
        told = ["–" if it.correct is None else ("yes" if it.correct else "no") for it in found]
        rows.append(["shows what was asked", *told])
    head = "".join(f"<th>{name}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{it}</td>' for it in row[1:])}</tr>" for row in rows
    )
    notes = ["PSNR and SSIM are of the files, as encoded, against the dense one."]
    if first.stages_s.get("load", 0.0) > _LOADING_S:
        notes.append(
            "The dense video was the first since the model was loaded, which makes it slower: "
            "compare again for times that count."
        )
    receipts = [it.record.receipt for it in found[1:]]
    notes += [
        f"{name}: {line}"
        for name, receipt in zip(names[1:], receipts, strict=True)
        if receipt is not None
        for line in receipt.words()
        if line.startswith(("ran", "fell back", "nothing", "inert"))
    ]
    notes_html = "".join(f"<li>{it}</li>" for it in map(escape, notes))
    return (
        f'<div><table class="k-figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'<div class="k-remark k-facts"><ul>{notes_html}</ul></div></div>'
    )


def _seconds(record: Record, stage: str) -> float:
    times = record.stages_s
    if stage == "all three":
        return sum(times.get(it, 0.0) for it in _STAGES)
    return next((taken for name, taken in times.items() if name == stage), 0.0)


def _ratio(dense_s: float, taken_s: float, receipt: Receipt | None) -> str:
    """Nothing where it would be noise: of a short time, or of what ran as the dense video did."""
    if min(dense_s, taken_s) <= _TOO_SHORT_S or (receipt is not None and receipt.stock):
        return ""
    return f" <b>{dense_s / taken_s:.2f}×</b>"


def _score(result: Result, unit: str) -> str:
    if result.score is None:
        return f'<span title="{escape(result.reason)}">–</span>'
    if unit and result.score >= fidelity.HIGHEST_DB:
        return "equal"
    return f"{result.score:.2f}{unit}" if unit else f"{result.score:.4f}"
