"""The page at work: what its fields and buttons do."""

from __future__ import annotations

import asyncio
import os
import secrets
import traceback
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi.concurrency import run_in_threadpool

from ...accel import recipe as recipes
from ...accel.recipe import Recipe
from ...pipelines import cards, choices, planning, sidecar, timing, together, vocabulary
from ...pipelines.errors import KinoraError
from ...pipelines.jobs import Jobs
from ...pipelines.request import DEFAULT_MODEL, DENSE, EXAMPLE_PROMPT, Request, check_image_given
from ...pipelines.sidecar import Record
from . import form, view, wire
from .acting import acted, grey_when_pressed
from .compare import Compare
from .evaluate import Evaluate, Reports
from .gallery import Gallery
from .history import BRIEF, LAST, OWN, History, Update, Values
from .layout import lay_out, lay_out_history
from .seen import Seen, see

CSS = Path(__file__).with_name("page.css")
ICON = Path(__file__).with_name("kinora.svg")
_TICK_S = 0.25


def theme() -> gr.themes.Base:
    """Gradio's plain theme with the fonts of the system: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="md",
    ).set(
        block_padding="0px",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        input_border_width="1px",
        input_background_fill="*background_fill_primary",
        input_background_fill_dark="*background_fill_secondary",
        button_large_text_size="*text_md",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )


class Page:
    """One page for all who open it. What each has asked for goes on when it is closed."""

    def __init__(self, jobs: Jobs, gallery: Gallery, *, named_only: bool = False) -> None:
        """With `named_only`, models and recipes are given by name, and jobs tell no folder."""
        self._jobs, self._gallery = jobs, gallery
        self._named_only = named_only
        self._asked: dict[str | None, list[str]] = {}
        self.reports = Reports()
        with gr.Blocks(title="Kinora", analytics_enabled=False) as self.blocks:
            gr.HTML("<h1>Kinora</h1>", elem_id="k-name")
            with gr.Tabs(elem_id="k-tabs") as self._tabs:
                with gr.Tab("Generate", id="generate") as generate_tab:
                    self._panel = lay_out(self)
                compare = Compare(self, jobs)
                evaluate = Evaluate(self, gallery, self.reports)
                shelf = lay_out_history()
            self._wire()
            compare.wire(set(self._panel.inputs()))
            self._panel.drawing.wire(set(self._panel.inputs()))
            evaluate.wire(self.blocks)
            elsewhere = [generate_tab, compare.tab, evaluate.tab]
            History(self, jobs, gallery, shelf).wire(elsewhere, self._tabs)

    def _wire(self) -> None:
        panel = self._panel
        inputs, prompt = set(panel.inputs()), panel.fields["prompt"]
        model, recipe = panel.fields["model"], panel.builder.recipe
        buttons = [panel.generate, panel.cancel]
        foretold = inputs | {panel.status}, [panel.prediction, *panel.builder.greyed()]
        grey_when_pressed(panel.generate)
        # Jobs are made in turn; here they are followed without holding up anything else.
        run = gr.on(
            [panel.generate.click, cast("Any", prompt).submit], self.generate, inputs,
            [panel.status, panel.result, *buttons], concurrency_limit=None, **OWN,
        )  # fmt: skip
        run.failure(self.ready, None, buttons, **BRIEF)
        run.then(self.ready, None, buttons, **BRIEF).then(
            self.predict, *foretold, **BRIEF  # how long it takes is known now
        )  # fmt: skip
        panel.cancel.click(self.cancel, None, panel.cancel, **BRIEF)
        builder = panel.builder
        described = [model, *(panel.fields[name] for name in form.BY_CARD)]
        described += [*panel.image.changed(), panel.words]
        panel.image.wire(self._jobs.uploads)
        self._settled = gr.Textbox("", visible="hidden", elem_id="k-settled")
        # In the browser: a press is told at once, and by the field that a choice in the list is.
        pressed = gr.Textbox("", visible="hidden", elem_id="k-pressed")
        press = f"() => [{acted('k-presets')}, String(Math.random())]"
        builder.presets.click(None, None, [recipe, pressed], js=press, **BRIEF)
        restored = [*self.restoring(), panel.dropped]
        for event in (
            cast("Any", model).input(self.describe, model, described, **LAST),
            gr.on([recipe.input, pressed.change], self.preset, recipe, builder.changed(), **LAST),
            panel.dropped.upload(self.restore_file, panel.dropped, restored, **BRIEF),
            *(
                it.input(partial(builder.selected, path), it, builder.changed(), **LAST)
                for path, it in builder.selectors.items()
            ),
        ):
            self.settle(event)
        # Not of a prediction: it comes late, and may not know yet what a preset has set.
        gr.on(
            [cast("Any", it).input for it in builder.inputs()], self.named, inputs,
            [builder.line, builder.presets], **LAST,
        )  # fmt: skip
        edits = [cast("Any", it).change for it in panel.inputs()]
        gr.on(
            [self.blocks.load, self._settled.change, *edits], self.predict, *foretold,
            **LAST,
        )  # fmt: skip

    def settle(self, event: Any) -> None:
        """Predict anew once the handler of `event` has set fields, as `click(…)` returns it.

        Those that are not on the screen do not say themselves that they have been set.
        """
        event.then(lambda: secrets.token_hex(4), None, self._settled, **BRIEF)

    def restoring(self) -> list[Any]:
        """The components that `restore` changes."""
        panel = self._panel
        own = [panel.words, panel.status, self._tabs]
        parts = [*panel.builder.changed(), *panel.image.changed(), *own]
        return list(dict.fromkeys((*panel.fields.values(), *parts)))

    async def generate(self, values: Values, asker: gr.Request) -> AsyncGenerator[Update, None]:
        """Put what is asked for into the line, and show how far it is until it has ended."""
        try:
            jobs = await run_in_threadpool(lambda: self._jobs.submit(self.request(values)))
        except Exception as error:
            yield self._drawn(view.failed(self.told(error)), None)
            return
        ids = self._asked[asker.session_hash] = [job.id for job in jobs]
        before: Update = {}
        while True:
            seen = await run_in_threadpool(self.see, ids)
            now = self._drawn(view.status(seen), view.result(seen), seen)
            # What has not changed is not sent: a video would begin again.
            new = {it: content for it, content in now.items() if before.get(it) != content}
            before = now
            if new:
                yield new
            if not any(it.job.open for it in seen):
                return
            await asyncio.sleep(_TICK_S)

    def request(self, values: Values) -> Request:
        """What the fields ask for. Raises `KinoraError`."""
        request = self._panel.request(values, str(self._jobs.folder))
        if request.image is not None:  # its id
            request = request.model_copy(update=self._jobs.uploads.fields(request.image))
        self.check(request)
        return request

    def check(self, request: Request) -> None:
        """Raises `RequestError` where it gives a path of the server and may not."""
        if self._named_only:
            wire.check_named(request.model, request.recipe)
            wire.check_no_paths(request)

    def ready(self) -> Update:
        """Offer the next run."""
        return {
            self._panel.generate: gr.Button(interactive=True),
            self._panel.cancel: gr.Button(interactive=False),
        }

    def cancel(self, asker: gr.Request) -> Update:
        """Ask for what this page asked for to end; `generate` shows when it has."""
        for id in self._asked.get(asker.session_hash, ()):
            job = self._jobs.get(id)
            if job is not None and not job.stopping:
                self._jobs.cancel(id)
        return {self._panel.cancel: gr.Button(interactive=False)}

    def restore_file(self, path: str | None) -> Update:
        """Set all fields as a dropped file has them, and forget the file."""
        if path is None:
            return {}
        file = Path(path)
        try:
            update = self.restore(sidecar.read(file))
        except Exception as error:
            text = self.told(error).replace(str(file), file.name)
            update: Update = {self._panel.status: view.failed(text)}
        finally:
            file.unlink(missing_ok=True)
        return {**update, self._panel.dropped: None}

    def restore(self, record: Record) -> Update:
        """Set all fields as a record has them. Raises `KinoraError`."""
        panel = self._panel
        fields, recipe = form.restored(record)
        update: Update = {panel.fields[name]: value for name, value in fields.items()}
        model, about = fields["model"], ""
        with suppress(KinoraError):  # gone since: the prediction says so
            card = cards.find(model)
            about, update[panel.words] = form.about(card), form.words(card)
            update |= panel.image.standing(card, record.request.image_sha256)
            for name, step in form.steps(card).items():
                update[panel.fields[name]] = gr.Number(fields[name], step=step)
        return {
            **update,
            panel.fields["model"]: gr.update(value=model, info=about),
            **panel.builder.shown(fields["recipe"], recipe),
            panel.status: view.restored(record),
            self._tabs: gr.Tabs(selected="generate"),
        }

    def describe(self, model: str | None) -> Update:
        """Fill in the model's own defaults and tell what it takes."""
        panel = self._panel
        try:
            card = cards.find(model or DEFAULT_MODEL)
        except KinoraError:
            # The prediction says why.
            return {panel.fields["model"]: gr.Dropdown(info=""), panel.words: ""}
        values, steps = form.defaults(card), form.steps(card)
        told = {
            panel.fields[name]: gr.Number(value, step=steps.get(name, 1))
            for name, value in values.items()
        }
        about = gr.Dropdown(info=form.about(card))
        told |= {panel.fields["model"]: about, panel.words: form.words(card)}
        return {**told, **panel.image.standing(card)}

    def preset(self, name: str | None) -> Update:
        """Set the controls to the recipe's values, and show those that it has.

        The field of its name is set where it was emptied alone: there may be another by now.
        """
        try:
            recipe = recipes.find(name or DENSE)
        except KinoraError:
            recipe = Recipe()  # the prediction says why
        builder = self._panel.builder
        emptied = {} if name else {builder.recipe: DENSE}
        return {**builder.shown(name or DENSE, recipe), **emptied}

    def named(self, values: Values) -> Update:
        """What the recipe is called now that somebody has changed it."""
        builder = self._panel.builder
        return builder.named(values[builder.recipe] or DENSE, builder.chosen(values))

    def predict(self, values: Values) -> Update:
        """What the run would do, in words, and how to ask for it elsewhere."""
        panel = self._panel
        try:
            asked = self.request(values)
            # Whether there is a prompt yet changes nothing.
            prompt = asked.prompt if asked.prompt.strip() else EXAMPLE_PROMPT
            request = asked.model_copy(update={"prompt": prompt})
            plan, card = planning.plan(request), cards.find(request.model)
            check_image_given(request, card)
            timed = timing.timed(plan, (it.record for it in self._gallery.items()))
            texts = filter(None, (asked.prompt.strip(), asked.negative_prompt))
            unknown = list(filter(None, (vocabulary.warning(card, it) for it in texts)))
            told = view.prediction(plan, timed, unknown)
            try:
                together.check_alone(plan.request.recipe)
            except KinoraError as error:  # elsewhere it can run: it is there to copy
                told = view.refused(self.told(error))
            return {
                panel.prediction: told,
                **panel.builder.told(self.elsewhere(asked), choices.refused(request)),
            }
        except Exception as error:
            line = self.told(error)
            told = view.refused(line)
            known = view.worded(line) in (values.get(panel.status) or "")  # the run said the same
            shown = "" if known else told
            return {panel.prediction: shown, **panel.builder.untold(told)}

    def elsewhere(self, request: Request) -> Request:
        """As a file and a command line say it: to strangers an image by its name alone."""
        if request.image is None or not self._named_only:
            return request
        return request.model_copy(update={"image": Path(request.image).name})

    def see(self, ids: Iterable[str]) -> list[Seen]:
        """Jobs as they stand, without those that were removed."""
        seen = [it for it in (see(self._jobs, id) for id in ids) if it is not None]
        return [it.within(self._jobs.folder) for it in seen] if self._named_only else seen

    def _drawn(self, status: str, result: str | None, seen: Sequence[Seen] = ()) -> Update:
        panel = self._panel
        stops = any(it.job.open and not it.job.stopping for it in seen)
        update: Update = {
            panel.status: status,
            panel.generate: gr.Button(interactive=False),
            panel.cancel: gr.Button(interactive=stops),
        }
        return update if result is None else {**update, panel.result: result}

    def told(self, error: Exception) -> str:
        """An exception as one line; what should not happen shows where on stderr, on demand."""
        if isinstance(error, KinoraError):
            return self._within(str(error))
        if os.environ.get("KINORA_DEBUG"):
            traceback.print_exception(error)
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = self._within(message)
        return f"a fault in Kinora: {message}; KINORA_DEBUG=1 shows where, please report it"

    def _within(self, text: str) -> str:
        return wire.within(self._jobs.folder, text) or "" if self._named_only else text
