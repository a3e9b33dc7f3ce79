"""The tab Evaluate: scores of videos that are there, by what `kinora eval` calls."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import gradio as gr
from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from ...eval.runs import differences
from ...pipelines.errors import RequestError, shortened
from . import api, scores, view
from .acting import grey_when_pressed
from .fields import filtering, known
from .gallery import SHOWN, Gallery, Item, of
from .history import BRIEF, LAST, OWN, Fields, Update
from .scoring import SUITES, Scoring, ScoringError
from .seen import recipe_name

MOST = 500
"""Videos of one evaluation."""
_KEPT = 20
_TICK_S = 0.25
_CANCELLED = '<p class="k-cancelled">Cancelled; scores that were there are kept.</p>'
_SUITES = (
    ("What was asked: kinora-tiny's judge", "world"),
    ("Nearness to other videos of the same prompt and seed", "fidelity"),
    ("Flicker", "flicker"),
    ("VBench, where it is installed", "vbench"),
)
# What is ticked goes with the press of the button; nothing is kept between.
_CHOSEN = (
    "(_, ...rest) => [JSON.stringify([...document.querySelectorAll('#k-choices input:checked')]"
    ".map(it => it.value)), ...rest]"
)
_TICKING = """
element.addEventListener('click', event => {
  if (!event.target.closest('[data-all]')) return;
  const boxes = [...element.querySelectorAll('input')], on = boxes.some(it => !it.checked);
  boxes.forEach(it => { it.checked = on; });
});
"""


@dataclass(slots=True)
class _Asked:
    """An evaluation that a page asked for."""

    scoring: Scoring | None = None
    cancelled: bool = False


class Reports:
    """The last reports by an id that nobody guesses, as JSON."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, report: dict[str, Any]) -> str:
        """Keep one; its id."""
        id = secrets.token_hex(8)
        self._known[id] = json.dumps(report, indent=1).encode()
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return id

    def find(self, id: str) -> bytes | None:
        """The one with this id."""
        return self._known.get(id)


def add(app: FastAPI, reports: Reports) -> None:
    """Add the route of reports to `app`."""
    router = APIRouter()

    def report(id: str) -> Response:
        content = reports.find(id)
        if content is None:
            api.fail(404, f"there is no evaluation {id[:40]!r}", "id")
        named = {"content-disposition": f'attachment; filename="evaluation-{id}.json"'}
        return Response(content, media_type="application/json", headers=named)

    router.add_api_route("/evaluations/{id}", report, methods=["GET"], response_model=None)
    app.include_router(router)


class Evaluate:
    """The tab at work. One evaluation runs at a time; closing its page ends it."""

    def __init__(self, page: Fields, gallery: Gallery, reports: Reports) -> None:
        self._page, self._gallery, self._reports = page, gallery, reports
        self._asked: dict[str | None, _Asked] = {}
        self._busy = False
        with gr.Tab("Evaluate", id="evaluate") as self.tab:
            with gr.Row(elem_id="k-scoring"):
                self._suite = gr.Dropdown(
                    list(_SUITES), value="world", label="Score", elem_id="k-suite", min_width=240
                )
                self._reference = gr.Dropdown(
                    [("dense", "dense")], value="dense", label="Compared with", visible=False,
                    elem_id="k-reference", min_width=140,
                )  # fmt: skip
                self._start = gr.Button("Evaluate", variant="primary", elem_id="k-evaluate")
                self._stop = gr.Button("Cancel", interactive=False, elem_id="k-evaluate-cancel")
            self._status = gr.HTML(view.status(()), elem_id="k-evaluate-status")
            self._result = gr.HTML(elem_id="k-evaluated")
            with gr.Row(elem_id="k-evaluate-filters"):
                every = [("all", "")]
                self._model = gr.Dropdown(every, value="", label="Model", elem_id="k-eval-model")
                self._recipe = gr.Dropdown(every, value="", label="Recipe", elem_id="k-eval-recipe")
            self._choices = gr.HTML(elem_id="k-choices", js_on_load=_TICKING)
            self._chosen = gr.Textbox(visible=False)

    def wire(self, blocks: gr.Blocks) -> None:
        """Connect the components, which are of `blocks`."""
        blocks.unload(self.leave)
        browsed = [self._model, self._recipe, self._reference, self._choices]
        filters = [self._model, self._recipe, self._reference]
        self.tab.select(self.browse, filters, browsed, **BRIEF)
        gr.on([self._model.input, self._recipe.input], self.browse, filters, browsed, **LAST)
        self._suite.change(
            lambda suite: gr.Dropdown(visible=suite == "fidelity"), self._suite,
            self._reference, **BRIEF,
        )  # fmt: skip
        buttons = [self._start, self._stop]
        grey_when_pressed(self._start)
        asked = self._start.click(
            self.evaluate, [self._chosen, self._suite, self._reference],
            [self._status, self._result, *buttons], js=_CHOSEN, concurrency_limit=None, **OWN,
        )  # fmt: skip
        for over in (asked.then, asked.failure):
            over(self.ready, None, buttons, **BRIEF)
        self._stop.click(self.cancel, None, self._stop, **BRIEF)

    def browse(self, model: str | None, recipe: str | None, reference: str | None) -> Update:
        """The videos of a model and a recipe to choose from."""
        items = self._gallery.items()
        recipes = sorted({recipe_name(it.record.request.recipe) for it in items} | {"dense"})
        models = sorted({it.record.request.model for it in items})
        others = [(it, it) for it in recipes]
        return {
            self._model: filtering(models, model),
            self._recipe: filtering(recipes, recipe),
            self._reference: (
                gr.Dropdown(others) if reference in recipes else gr.Dropdown(others, value="dense")
            ),
            self._choices: choices(items, known(model, models), known(recipe, recipes)),
        }

    async def evaluate(
        self, chosen: str, suite: str, reference: str, asker: gr.Request
    ) -> AsyncGenerator[Update, None]:
        """Score what is chosen, and show how far that is, then the report."""
        asked = self._asked[asker.session_hash] = _Asked()
        yield self._drawn(_doing("reading the videos", 0, 0), busy=True)
        try:
            items = await run_in_threadpool(self._items, chosen)
            if suite not in SUITES:
                raise RequestError(f"there is no suite {suite[:40]!r}: choose {', '.join(SUITES)}")
            beside = await run_in_threadpool(self._beside, items, suite, reference)
            if self._busy:
                yield self._drawn(_doing("waiting for another evaluation", 0, 0), busy=True)
            while self._busy and not asked.cancelled:
                await asyncio.sleep(_TICK_S)
            if not asked.cancelled:
                async for update in self._scored(items, suite, beside, asked):
                    yield update
            if asked.cancelled:
                yield self._drawn(_status("cancelled", _CANCELLED), busy=False)
        except Exception as error:
            yield self._drawn(view.failed(self._page.told(error)), busy=False)

    async def _scored(
        self, items: Sequence[Item], suite: str, beside: Sequence[Item], asked: _Asked
    ) -> AsyncGenerator[Update, None]:
        paths = ([it.path for it in items], [it.path for it in beside])
        self._busy = True
        try:
            scoring = asked.scoring = Scoring(suite, *paths, self._gallery.folder)
            while True:
                told = await run_in_threadpool(scoring.told)
                if "error" in told:
                    raise ScoringError(told["error"])
                if "report" in told:
                    yield self._reported(told["report"], items)
                    return
                doing = _doing(f"scoring {told['doing']}", told["done"], told["of"])
                yield self._drawn(doing, busy=True)
        except ScoringError:
            if not asked.cancelled:
                raise
        finally:  # when the page is closed, too
            self._busy = False
            if asked.scoring is not None:
                threading.Thread(target=asked.scoring.close, daemon=True).start()

    def ready(self) -> Update:
        """Offer the next one."""
        return {
            self._start: gr.Button(interactive=True),
            self._stop: gr.Button(interactive=False),
        }

    def cancel(self, asker: gr.Request) -> Update:
        """Have what this page asked for end."""
        self._stop_of(asker.session_hash)
        return {self._stop: gr.Button(interactive=False)}

    def leave(self, asker: gr.Request) -> None:
        """End what a page asked for that was closed."""
        self._stop_of(asker.session_hash)
        self._asked.pop(asker.session_hash, None)

    def _stop_of(self, asker: str | None) -> None:
        asked = self._asked.get(asker)
        if asked is not None:
            asked.cancelled = True
            if asked.scoring is not None:
                threading.Thread(target=asked.scoring.end, daemon=True).start()

    def _items(self, chosen: str) -> list[Item]:
        """What was ticked; it may come from anybody. Raises `RequestError`."""
        try:
            ids: Any = json.loads(chosen or "[]")
        except (ValueError, RecursionError):
            ids = None
        if not isinstance(ids, list) or not all(isinstance(it, str) for it in cast("Any", ids)):
            raise RequestError("the videos must be a list of ids")
        named = list(dict.fromkeys(cast("list[str]", ids)))
        if not named:
            raise RequestError("no video is chosen: tick one or more below")
        if len(named) > MOST:
            raise RequestError(f"{len(named):,} videos are chosen, {MOST} are the most at once")
        found = [self._gallery.find(it) for it in named]
        gone = next((id for id, it in zip(named, found, strict=True) if it is None), None)
        if gone is not None:
            raise RequestError(f"there is no video {gone[:40]!r} any more: open the tab anew")
        return [it for it in found if it is not None]

    def _beside(self, items: Sequence[Item], suite: str, recipe: str) -> list[Item]:
        """Videos by `recipe` to compare `items` with: one for each, newest first."""
        if suite != "fidelity":
            return []
        others = [
            it for it in self._gallery.items() if recipe_name(it.record.request.recipe) == recipe
        ]
        found = dict[str, Item]()
        for item in items:
            pick = _reference(item, others)
            if pick is not None:
                found[pick.id] = pick
        return list(found.values())

    def _reported(self, report: dict[str, Any], items: Sequence[Item]) -> Update:
        folder = self._gallery.folder
        names = {str(it.path.relative_to(folder)): _called(it) for it in items}
        id = self._reports.keep(report)
        link = f'<p class="k-paths"><a href="/evaluations/{id}" download>The report as JSON</a></p>'
        status = _status("done", "")
        return self._drawn(status, busy=False) | {self._result: scores.shown(report, names) + link}

    def _drawn(self, status: str, *, busy: bool) -> Update:
        return {
            self._status: status,
            self._start: gr.Button(interactive=False),  # until all of it was told: see `ready`
            self._stop: gr.Button(interactive=busy),
        }


def choices(items: Sequence[Item], model: str, recipe: str) -> str:
    """The videos of a model and a recipe (each empty for all) as pictures to tick."""
    chosen = of(items, model, recipe)
    if not chosen:
        return '<div class="k-frame k-empty">No video here.</div>'
    cards = "".join(map(_choice, chosen[:SHOWN]))
    more = len(chosen) - SHOWN
    note = f'<p class="k-facts">and {more:,} older ones: choose by model and recipe</p>'
    return (
        '<p class="k-acts"><button type="button" data-all>All, or none</button> '
        '<span class="k-facts">Tick what is to be scored.</span></p>'
        f'<div class="k-gallery">{cards}</div>{note if more > 0 else ""}'
    )


def _choice(item: Item) -> str:
    prompt = view.prompt(item.record.request)
    return (
        f'<label class="k-card" title="{prompt}"><input type="checkbox" value="{item.id}">'
        f'<img src="/gallery/{item.id}/thumbnail" alt="" loading="lazy"><span>{prompt}</span>'
        f"<small>{view.settings(item.record.request)}</small></label>"
    )


def _reference(item: Item, others: Sequence[Item]) -> Item | None:
    """The newest of `others` of its prompt and seed, of the same settings if there is one."""
    asked = item.record.request
    same = [
        it
        for it in others
        if it.id != item.id
        and (it.record.request.prompt, it.record.request.seed) == (asked.prompt, asked.seed)
    ]
    alike = (it for it in same if next(differences(item.record, it.record), None) is None)
    return next(alike, same[0] if same else None)


def _called(item: Item) -> str:
    request = item.record.request
    return f"{shortened(request.prompt)} · seed {request.seed} · {recipe_name(request.recipe)}"


def _doing(what: str, done: int, of: int) -> str:
    bar = f' max="{of}" value="{done}"' if of else ""
    count = f"<span>{done} of {of}</span>" if of else ""
    return _status(
        "running",
        f'<p class="k-doing"><b>{escape(what)}</b> {count}</p>'
        f'<progress aria-label="evaluation"{bar}></progress>',
    )


def _status(phase: str, content: str) -> str:
    return f'<div role="status" data-phase="{phase}">{content}</div>'
