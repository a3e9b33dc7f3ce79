"""The acceleration builder without a browser: choices, refusals, predictions, what to copy."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from standing import Standing, opened

from kinora.accel import recipe as recipes
from kinora.accel.presets import MEASURED
from kinora.app.ui import builder, controls, spelling
from kinora.app.ui.page import Page
from kinora.pipelines import cards, choices, planning
from kinora.pipelines.errors import KinoraError, RequestError
from kinora.pipelines.request import Request, resolve

Cli = Callable[..., Any]
PROMPT = "a red circle"


@pytest.fixture
def page(tmp_path: Path) -> Generator[Page, None, None]:
    """The page over an empty folder; nothing is made."""
    with opened(tmp_path / "made") as made:
        yield made


@pytest.mark.parametrize("named_only", [True, False])
def test_strangers_are_told_the_name_of_an_image_alone(named_only: bool, page: Page) -> None:
    page._named_only = named_only  # pyright: ignore[reportPrivateUsage]
    asked = Request(prompt="a", image="/out/.kinora-jobs/images/x.png", image_sha256="0" * 64)
    shown = "x.png" if named_only else asked.image
    assert page.elsewhere(asked) == asked.model_copy(update={"image": shown})
    assert page.elsewhere(Request(prompt="a")) == Request(prompt="a")


@pytest.mark.parametrize("named_only", [True, False])
def test_strangers_name_no_files(named_only: bool, page: Page) -> None:
    page._named_only = named_only  # pyright: ignore[reportPrivateUsage]
    standing = Standing(page)
    standing.choose("attention.method", "paro")
    standing.set("attention.paro", "attention.calibration", "/etc/passwd")
    if named_only:
        with pytest.raises(RequestError, match="calibration names a file of the server"):
            standing.request()
        told = standing.predicted()
        assert "/etc/passwd" not in str(told) and "names a file" in str(told)
    else:
        assert standing.request().settings[-1] == "attention.calibration=/etc/passwd"


def test_a_preset_is_shown_with_its_figures_and_pressed() -> None:
    html = builder.presets("balanced")
    assert html.count("<button") == len(MEASURED)
    assert html.count('aria-pressed="true"') == 1
    assert 'data-id="balanced" aria-pressed="true"' in html
    for name, measured in MEASURED.items():
        assert f"<b>{name}</b>" in html and measured.cost in html and measured.speed in html
    assert MEASURED["balanced"].where.replace("`", "") in html.replace("&#x27;", "'")
    assert 'aria-pressed="true"' not in builder.presets("/some/<file>.toml")


def test_choices_make_the_recipe_that_set_would(page: Page) -> None:
    standing = Standing(page)
    assert standing.request().recipe == "dense" and not standing.request().settings
    standing.preset("balanced")
    assert standing.request().recipe == "balanced" and not standing.request().settings
    standing.choose("attention.method", "x-attention")
    standing.set("attention.x-attention", "attention.threshold", 0.9)
    standing.set("attention", "attention.qk", "int8")
    standing.choose("steps.policy", "sada")
    standing.set("steps.sada", "steps.prune", True)
    asked = ("attention.method=x-attention", "steps.policy=sada", "attention.threshold=0.9",
             "attention.qk=int8", "steps.prune=true")  # fmt: skip
    request = standing.request()
    assert request.recipe == "balanced" and sorted(request.settings) == sorted(asked)
    standing.choose("attention.method", "")
    table = resolve(standing.request(), cards.find("kinora-tiny")).recipe
    assert "attention" not in table and table["steps"]["prune"] is True


def test_only_the_options_of_what_is_chosen_are_shown(page: Page) -> None:
    standing = Standing(page)
    update = standing.builder.selected("steps.policy", "shadow")
    shown = {group for group, it in standing.builder.columns.items()
             if it in update and update[it]["visible"]}  # fmt: skip
    assert shown == {"steps.shadow"}
    about = update[standing.builder.about["steps.policy"]]
    assert "Choose it where quality comes first" in about
    hidden = {it for it in standing.builder.columns if it.startswith("attention")}
    assert not any(standing.builder.columns[it] in update for it in hidden)
    assert builder.about("steps.policy", "no such <policy>") == ""


def test_the_prediction_follows_and_a_bad_combination_is_one_line_in_place(page: Page) -> None:
    standing = Standing(page)
    told = standing.predicted()
    assert "nothing accelerated" in told[standing.panel.prediction]
    standing.preset("balanced")
    sparse = standing.predicted()[standing.panel.prediction]
    assert "times as fast" in sparse and "of memory" in sparse
    standing.choose("steps.policy", "shadow")
    assert " to " in standing.predicted()[standing.panel.prediction]
    standing.set("attention", "attention.from_step", 0.9)
    standing.set("attention", "attention.to_step", 0.3)
    told = standing.predicted()
    for part in (standing.panel.prediction, standing.builder.why):
        assert "attention.from_step 0.9 must be below attention.to_step 0.3" in told[part]
        assert told[part].count("<li>") == 1 and "k-bad" in told[part]
    assert told[standing.builder.toml] == told[standing.builder.command] == ""


def test_several_processes_are_refused_here_and_there_to_copy(page: Page) -> None:
    standing = Standing(page)
    standing.set("parallel", "parallel.ulysses", 2)
    told = standing.predicted()
    assert "a job is made by one" in told[standing.panel.prediction]
    assert told[standing.panel.prediction].count("<li>") == 1
    assert told[standing.builder.command].endswith("--set parallel.ulysses=2")
    with pytest.raises(RequestError, match=r"2 processes, and a job .* --nproc-per-node 2"):
        page._jobs.submit(standing.request())  # pyright: ignore[reportPrivateUsage]
    assert not page._jobs.jobs()  # pyright: ignore[reportPrivateUsage]


def test_strict_says_what_it_would_refuse(page: Page) -> None:
    standing = Standing(page)
    standing.preset("balanced")
    standing.values[standing.panel.fields["frames"]] = 1
    assert "strict:" not in standing.predicted()[standing.panel.prediction]
    standing.values[standing.panel.fields["strict"]] = True
    told = standing.predicted()[standing.panel.prediction]
    assert "strict: attention would not run as asked" in told and "k-bad" in told


def test_what_cannot_run_is_greyed_with_the_reason_that_a_plan_gives(page: Page) -> None:
    standing = Standing(page)
    standing.preset("balanced")
    request = standing.request()
    refused = choices.refused(request)
    told = standing.predicted()
    for path, selector in standing.builder.selectors.items():
        greyed = {
            value for label, value in told[selector]["choices"] if label.endswith("(not here)")
        }
        assert greyed == set(refused[path])
    pv = standing.builder.options["attention"]["attention.pv"]
    assert ("fp8 (not here)", "fp8") in told[pv]["choices"] and ("input", "input") in told[pv][
        "choices"
    ]
    assert "no kernel multiplies so on cpu" in told[standing.builder.why]


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "sdxl"])
@pytest.mark.parametrize("path", ["attention.method", "steps.policy", "dense_kernel"])
def test_choices_are_refused_where_and_as_plans_refuse_them(
    family: str, path: str, model_folders: dict[str, Path]
) -> None:
    base = Request(prompt=PROMPT, model=str(model_folders[family]), device="cpu", steps=20)
    part = controls.selectors().get(path)
    known = part.known if part else controls.groups()[""][path].choices
    refused = choices.refused(base)[path]
    for name in known:
        request = base.model_copy(update={"settings": (f"{path}={name}",)})
        try:
            whys = [it.why for it in planning.plan(request).parts if it.verdict == "refused"]
        except KinoraError as error:
            assert "needs attention.calibration" in str(error), "paro, which has no default"
            continue
        assert ([refused[name]] if name in refused else []) == whys


def test_nothing_of_an_unknown_denoiser_can_be_accelerated(unknown_folder: Path) -> None:
    refused = choices.refused(Request(prompt=PROMPT, model=str(unknown_folder)))
    reasons = set(refused["attention.method"].values())
    assert len(reasons) == 1 and "cannot be accelerated yet" in reasons.pop()
    html = builder.reasons({"attention.method": {"a": "no <b>", "b": "no <b>"}})
    assert html.count("<li>") == 1 and "method a, b: no &lt;b&gt;" in html
    assert builder.reasons({"attention.method": {}}) == ""


def test_a_method_in_the_precision_of_the_input_alone_says_so() -> None:
    refused = choices.refused(Request(prompt=PROMPT, settings=("attention.method=kv-merge",)))
    assert set(refused["attention.qk"]) == {"int8", "int4"}
    assert "computed in the precision of the input alone" in refused["attention.pv"]["fp8"]


ASKED = [
    Request(prompt=PROMPT),
    Request(prompt="-x 'it' \"is\" $HOME `ls` ü", recipe="balanced", seed=7, num_videos=3),
    Request(
        prompt="--help", width=128, height=64, frames=5, steps=3, guidance=2.5, fps=8,
        negative_prompt="-blue", format="gif", device="cpu", dtype="float32", strict=True,
        keep_latents=True, force=True, recipe="fast",
        settings=("attention.keep=0.4", "steps.policy=shadow", "title=a = b c"),
    ),
    Request(
        prompt=PROMPT, settings=("attention.method=top-blocks", "attention.by_layer=keep 1 0.2")
    ),
]  # fmt: skip


@pytest.mark.parametrize("request_", ASKED, ids=range(len(ASKED)))
def test_the_command_line_asks_for_the_same(
    request_: Request, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []

    def run(request: Request, **_: Any) -> Any:
        asked.append(request)
        raise RequestError("enough")

    monkeypatch.setattr("kinora.pipelines.generate.generate", run)
    line = shlex.join(["kinora", *spelling.arguments(request_)])
    called = cli(*shlex.split(line)[1:])
    assert "enough" in called.complaint and asked == [request_]
    card = cards.find(request_.model)
    resolved = resolve(request_, card)
    assert resolve(asked[0], card).recipe == resolved.recipe
    text = spelling.toml(request_)
    table = resolved.recipe or recipes.find("dense").table()
    assert recipes.from_table(tomllib.loads(text)).table() == table


def test_what_the_page_shows_is_what_it_would_ask_for(page: Page, tmp_path: Path) -> None:
    standing = Standing(page)
    standing.preset("balanced")
    standing.choose("steps.policy", "easy")
    standing.set("steps.easy", "steps.max_skip", 2)
    told = standing.predicted()
    request = standing.request()
    line = told[standing.builder.command]
    assert shlex.split(line) == ["kinora", *spelling.arguments(request)]
    policy = "--set steps.policy=easy --set steps.max_skip=2"
    assert line.endswith(f"--recipe balanced --fps 16.0 {policy}")
    file = tmp_path / "mine.toml"
    file.write_text(told[standing.builder.toml])
    assert recipes.find(str(file)).table() == resolve(request, cards.find("kinora-tiny")).recipe


def test_half_a_size_is_completed_by_the_model() -> None:
    arguments = spelling.arguments(Request(prompt=PROMPT, width=64))
    assert arguments[2:4] == ["--size", f"64x{cards.find('kinora-tiny').height}"]


@pytest.mark.parametrize("recipe", ["balanced", "dense"])
def test_a_plan_is_drawn_of_what_the_page_asks_for(
    recipe: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Request, Any, Any]] = []

    def look(request: Request, *, layer: Any, step: Any, **_: Any) -> Any:
        asked.append((request, layer, step))
        raise RequestError("enough")

    monkeypatch.setattr("kinora.pipelines.inspection.inspect", look)
    settings = ("attention.method=top-blocks",) if recipe == "dense" else ("attention.keep=0.4",)
    request = Request(prompt="-a", recipe=recipe, settings=settings, steps=3, seed=9, device="cpu",
                      negative_prompt="b", width=64, height=64, guidance=2.0, fps=8)  # fmt: skip
    for layer, step in ((1, 2), (None, None)):
        cli(*spelling.inspection(request, layer, step, tmp_path / "plan.png"))
        of_files = {"fps": None}
        assert asked.pop() == (request.model_copy(update=of_files), layer, step)


def drawn(page: Page, *, layer: str | None, step: str = "1", **fields: Any) -> str:
    """What Draw shows at last."""
    standing = Standing(page)
    standing.preset("balanced")
    for name, value in fields.items():
        standing.values[standing.panel.fields[name]] = value
    drawing = standing.panel.drawing
    given = {**standing.values, drawing._layer: layer, drawing._step: step}  # pyright: ignore[reportPrivateUsage]

    async def all_of_it() -> list[Any]:
        return [it async for it in drawing.draw(given)]

    first, *_, last = asyncio.run(all_of_it())
    assert "drawing" in first[drawing._drawn]  # pyright: ignore[reportPrivateUsage]
    return last[drawing._drawn]  # pyright: ignore[reportPrivateUsage]


@pytest.mark.long
def test_draw_shows_a_picture_or_one_line(page: Page, wan_folder: Path) -> None:
    small: dict[str, Any] = {
        "model": str(wan_folder),
        "width": 128,
        "height": 128,
        "frames": 5,
        "steps": 3,
    }
    html = drawn(page, layer=None, step=" ", **small)
    (address,) = re.findall(r'<img class="k-plan" src="data:image/png;base64,([^"]+)"', html)
    with Image.open(io.BytesIO(base64.b64decode(address))) as picture:
        assert picture.format == "PNG" and picture.width > 500
    html = drawn(page, layer="7", **small)
    assert "the layer must be 0 to 1, not 7" in html and html.count("<li>") == 1
    assert "the layer must be a whole number from 0, not &#x27;1.5&#x27;" in drawn(
        page, layer="1.5", **small
    )
    assert "there is no model folder" in drawn(page, layer="1", **{**small, "model": "/no/folder"})


@pytest.mark.long
def test_a_page_that_is_killed_leaves_no_drawing_behind(tmp_path: Path) -> None:
    long = ["inspect", PROMPT, "--step", "29", "--output", str(tmp_path / "plan.png")]
    script = f"import asyncio; from kinora.app.ui import drawing; asyncio.run(drawing._run({long}))"
    with subprocess.Popen([sys.executable, "-c", script]) as page:
        at_work: list[psutil.Process] = []
        end = time.monotonic() + 60
        while not at_work and time.monotonic() < end:
            time.sleep(0.05)
            at_work = psutil.Process(page.pid).children()
        page.kill()
    assert len(at_work) == 1
    _, left = psutil.wait_procs(at_work, timeout=30)
    assert not left
    assert not list(tmp_path.iterdir())
