"""The plan of a layer: what the recipe on the page keeps there, drawn by `kinora inspect`."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool

from ...pipelines.errors import RequestError
from . import spelling, tied, view
from .history import BRIEF, OWN, Fields, Update, Values

_LONGEST_S = 1800.0


class Drawing:
    """Its components, at work. A process of its own draws, one at a time."""

    def __init__(self, page: Fields) -> None:
        self._page = page
        with gr.Accordion("The plan of a layer", open=False, elem_id="k-plan"):
            with gr.Row():
                shared: dict[str, Any] = {"placeholder": "the middle one", "min_width": 90}
                # No numbers, of which gradio makes 0 where nothing is given.
                self._layer = gr.Textbox(label="Layer, from 0", elem_id="k-plan-layer", **shared)
                self._step = gr.Textbox(label="Step, from 0", elem_id="k-plan-step", **shared)
                self._draw = gr.Button("Draw", elem_id="k-plan-draw", min_width=90)
            self._drawn = gr.HTML(
                '<p class="k-facts">What the recipe of this page keeps of the attention there: the '
                "model is loaded a second time and run up to that step.</p>",
                elem_id="k-plan-drawn",
            )

    def wire(self, inputs: set[Any]) -> None:
        """Connect them; `inputs` are those of a request."""
        given: set[Any] = {*inputs, self._layer, self._step}
        parts = [self._drawn, self._draw]
        self._draw.click(self.draw, given, parts, concurrency_limit=1, **OWN).then(
            lambda: gr.update(interactive=True), None, self._draw, **BRIEF
        )

    async def draw(self, values: Values) -> AsyncGenerator[Update, None]:
        """The picture, or in one line why there is none."""
        yield {
            self._drawn: '<p class="k-doing" role="status">drawing …</p>',
            self._draw: gr.update(interactive=False),
        }
        try:
            layer, step = (
                _whole(what, values[it])
                for what, it in (("layer", self._layer), ("step", self._step))
            )
            request = await run_in_threadpool(self._page.request, values)
            with TemporaryDirectory(prefix="kinora-plan-") as folder:
                file = Path(folder) / "plan.png"
                complaint = await _run(spelling.inspection(request, layer, step, file))
                picture = b"" if complaint else file.read_bytes()
            yield {
                self._drawn: view.refused(complaint, "No picture") if complaint else _shown(picture)
            }
        except Exception as error:
            yield {self._drawn: view.refused(self._page.told(error), "No picture")}


def _whole(what: str, given: str | None) -> int | None:
    """A number as it was typed, None for nothing. Raises `RequestError` where it is none."""
    told = (given or "").strip()
    if told and not re.fullmatch("[0-9]{1,6}", told):
        raise RequestError(f"the {what} must be a whole number from 0, not {told[:40]!r}")
    return int(told) if told else None


def _shown(picture: bytes) -> str:
    told = "All pairs of tokens, and the keys of one query: blue is kept, red is left out"
    address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return (
        f'<a href="{address}" download="plan.png" title="Save it">'
        f'<img class="k-plan" src="{address}" alt="{told}"></a><p class="k-facts">{told}.</p>'
    )


async def _run(arguments: list[str]) -> str:
    """Run `kinora` so; what it complains of, or nothing.

    It ends with whoever waits for it, and with this process, however that ends.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", tied.__name__, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(_LONGEST_S):
            told = await process.stderr.read()  # `communicate` would end its stdin, and it
            await process.wait()
    except TimeoutError:
        return f"it takes longer than {_LONGEST_S / 60:.0f} minutes: choose an earlier step"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode == 0:
        return ""
    lines = told.decode(errors="replace").splitlines()
    complaints = [it.removeprefix("kinora: ") for it in lines if it.startswith("kinora: ")]
    return (complaints or lines[-1:] or [f"it ended with status {process.returncode}"])[-1][:500]
