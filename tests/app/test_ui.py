"""The page without a browser: controls from definitions, fields to a request, events to a view."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from kinora.accel import recipe as recipes
from kinora.accel.methods import METHODS
from kinora.accel.options import Option
from kinora.accel.parts import ATTENTION
from kinora.accel.receipt import Receipt
from kinora.app import cli as command_line
from kinora.app.ui import controls, fields, form, guard, server, view
from kinora.app.ui.desk import Desk, Ended
from kinora.app.ui.view import View
from kinora.pipelines import cards, planning
from kinora.pipelines.errors import RecipeError, RequestError
from kinora.pipelines.events import STAGES, Notice, Progress, Stage
from kinora.pipelines.request import Request, resolve
from kinora.pipelines.run import Output, Run
from kinora.pipelines.saving import Kept

Cli = Callable[..., Any]

FIELDS: dict[str, Any] = {
    "prompt": "a red circle", "model": "kinora-tiny", "width": 128, "height": 128, "frames": 33,
    "steps": 30, "guidance": 4.0, "seed": 7,
}  # fmt: skip


def option(kind: type, default: Any, **limits: Any) -> Option:
    """An option called `some_name`."""
    rest: dict[str, Any] = {"unit": "", "least": None, "above": False, "most": None, "choices": ()}
    return Option("some_name", kind, default, "What it does", **{**rest, **limits})


@pytest.mark.parametrize(
    ("given", "control", "expected"),
    [
        (option(float, 0.25, least=0.0, above=True, most=1.0), "Slider",
         {"minimum": 0.01, "maximum": 1.0, "step": 0.01}),
        (option(float, 0.0, least=0.0, most=1.0), "Slider", {"minimum": 0.0}),
        (option(float, 0.125, least=0.0, most=1.0), "Slider", {"step": 0.001}),
        (option(float, 5.0, least=0.0, most=50.0), "Slider", {"step": 0.1}),
        (option(int, 2, least=1, most=8), "Slider", {"minimum": 1, "maximum": 8, "step": 1}),
        (option(int, 1, least=1, most=1000), "Number", {"precision": None}),
        (option(float, 1.5, least=0.0), "Number", {"precision": None}),
        (option(bool, True), "Checkbox", {}),
        (option(str, "b", choices=("a", "b")), "Dropdown", {"choices": [("a", "a"), ("b", "b")]}),
        (option(str, "text"), "Textbox", {}),
    ],
)  # fmt: skip
def test_a_definition_makes_its_control(
    given: Option, control: str, expected: dict[str, Any]
) -> None:
    made: Any = controls.control(given, given.default)
    assert type(made).__name__ == control
    assert (made.label, made.info, made.value) == ("Some name", "What it does", given.default)
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_unit_stands_in_the_label() -> None:
    made: Any = controls.control(option(int, 1, unit="layers"), 1)
    assert made.label == "Some name (layers)"


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_every_method_has_a_control_that_takes_its_default(method: str) -> None:
    known = controls.method_options(method)
    assert {f"attention.{it.name}" for it in ATTENTION.options(METHODS[method])} == set(known)
    for it in (*known.values(), *controls.recipe_options().values()):
        made: Any = controls.control(it, it.default)
        assert made.preprocess(made.value) == it.default


@pytest.mark.parametrize("name", recipes.names())
def test_the_values_of_a_preset_change_nothing(name: str) -> None:
    recipe = recipes.find(name)
    values = controls.values(recipe)
    assert controls.settings(recipe, values) == ()
    of_method = values.keys() - controls.recipe_options().keys()
    assert (not of_method) == (controls.method_of(recipe) is None)
    emptied = dict.fromkeys(values)
    assert controls.settings(recipe, emptied) == ()


def test_a_changed_control_is_a_setting_and_nothing_else() -> None:
    recipe = recipes.find("balanced")
    values = {**controls.values(recipe), "attention.keep": 0.5, "when": "always"}
    values["attention.every"] = 3
    told = controls.settings(recipe, values)
    assert sorted(told) == ["attention.every=3", "attention.keep=0.5", "when=always"]
    table = recipes.changed(recipe, told).table()
    assert controls.values(recipes.from_table(table)) == values


def test_fields_make_the_request_of_the_command_line() -> None:
    chosen = {"": {"when": "faster"}, "blade": {"attention.keep": 0.5}}
    chosen["another-method"] = {"attention.keep": 0.9}
    made = form.request_of({**FIELDS, "recipe": "balanced"}, chosen, "out")
    said = Request.model_validate(
        {**FIELDS, "recipe": "balanced", "settings": ("attention.keep=0.5",), "output": "out"}
    )
    assert made == said


def test_options_of_a_method_that_is_not_chosen_are_left_alone() -> None:
    chosen = {"": {"dense_kernel": "flash"}, "top-blocks": {"attention.keep": 0.5}}
    made = form.request_of({**FIELDS, "recipe": "dense"}, chosen, "out")
    assert made.settings == ("dense_kernel=flash",) and made.recipe == "dense"


def test_empty_fields_are_the_defaults_of_the_model() -> None:
    empty = {**dict.fromkeys(FIELDS), "prompt": "a cat", "model": "", "recipe": "dense"}
    assert form.request_of(empty, {"": {}}, "out") == Request(prompt="a cat", output="out")
    card = cards.find("kinora-tiny")
    resolved = resolve(Request(prompt="a cat"), card)
    assert form.defaults(card) == {name: getattr(resolved, name) for name in form.BY_CARD}
    with pytest.raises(RequestError, match="the prompt is empty"):
        resolve(form.request_of({"prompt": None, "recipe": "dense"}, {"": {}}, "out"), card)


def test_what_is_out_of_range_is_refused_in_the_words_of_the_recipe() -> None:
    chosen = {"": {}, "blade": {"attention.every": -1}}
    made = form.request_of({**FIELDS, "recipe": "balanced"}, chosen, "out")
    with pytest.raises(RecipeError, match=r"attention\.every must be a whole number from 0 to"):
        resolve(made, cards.find("kinora-tiny"))


def test_the_page_has_the_command_lines_options_with_their_words() -> None:
    group: Any = typer.main.get_command(command_line.app)
    generate = group.commands["generate"]
    known = {it.opts[0]: it.help for it in generate.params if it.opts[0].startswith("--")}
    here = {it.flag: it for it in map(fields.spelled_as, fields.FIELDS)}
    elsewhere = {"--set", "--output", "--from", "--json"}
    assert set(known) - set(here) == elsewhere
    for flag, it in here.items():
        default = f" [default: {it.default}]" if it.default else ""
        assert known[flag] == f"{it.help}{default}"
    assert set(Request.model_fields) - set(fields.FIELDS) == {"prompt", "settings", "output"}


@pytest.mark.parametrize("name", fields.FIELDS)
def test_every_field_has_a_control_that_asks_for_its_default(name: str) -> None:
    default = Request.model_fields[name].default
    value = form.defaults(cards.find("kinora-tiny")).get(name, default)
    made: Any = fields.explained(name, value)
    given = made.preprocess(made.value)
    asked = form.request_of({"prompt": "a", name: given}, {"": {}}, "outputs")
    assert getattr(asked, name) == value
    assert made.info == fields.spelled_as(name).help and made.elem_id == f"k-{name}"


def test_a_fraction_is_not_rounded() -> None:
    made: Any = fields.explained("steps", 30)
    given = {"prompt": "a", "steps": made.preprocess(2.5)}
    with pytest.raises(ValidationError, match="steps"):
        form.request_of(given, {"": {}}, "outputs")


@pytest.mark.parametrize(
    ("name", "control", "expected"),
    [
        ("negative_prompt", "Textbox", {"placeholder": "nothing"}),
        ("num_videos", "Number", {"precision": None, "placeholder": "1"}),
        ("fps", "Number", {"precision": None, "placeholder": "the model's"}),
        ("format", "Dropdown", {"choices": [("mp4, or png for one frame", ""), ("mp4", "mp4"),
         ("gif", "gif"), ("webm", "webm"), ("png", "png")], "allow_custom_value": False}),
        ("device", "Dropdown", {"choices": [(it, it) for it in ("auto", "cpu", "cuda", "mps")],
         "allow_custom_value": True}),
        ("strict", "Checkbox", {"value": False}),
    ],
)  # fmt: skip
def test_the_kind_of_a_field_makes_its_control(
    name: str, control: str, expected: dict[str, Any]
) -> None:
    made: Any = fields.explained(name, 16.0 if name == "fps" else None)
    assert type(made).__name__ == control
    assert {key: getattr(made, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the nearest is --size 32x48", "the nearest is Width and Height 32x48"),
        ("a smaller --size or --frames", "a smaller Width and Height or Frames"),
        ("leave --negative-prompt out", "leave Negative prompt out"),
        ("num_videos must be 1 to 9", "Videos must be 1 to 9"),
        ("choose --recipe dense; try --dtype float32", "choose Recipe dense; try Dtype float32"),
        ("going on, as --force asks", "going on, as Force asks"),
        ("another --output", "another --output"),
        ("`kinora decode x --device cpu`", "`kinora decode x --device cpu`"),
        ("/models/num_videos --sizes x--size", "/models/num_videos --sizes x--size"),
    ],
)
def test_what_is_said_on_the_page_has_its_words(text: str, expected: str) -> None:
    assert fields.in_titles(text) == expected
    assert escape(expected) in view.status(view.failed(text), 0.0)
    assert escape(expected) in view.refused(text)
    assert escape(expected) in view.status(view.after(View("running"), Notice(text), 0.0), 0.0)


def progress(stage: Any, step: int = 0, steps: int = 0, eta_s: float | None = None) -> Progress:
    return Progress(stage, step, steps, 10.0, eta_s, 1, 1)


ASKED = Request(prompt='a "red" <circle>')


def output(tmp_path: Path, suffix: str = ".mp4", seed: int = 0) -> Output:
    """A finished video."""
    receipt = Receipt(recipe={}, strict=False, steps=2, attention=None)
    times: dict[Stage, float] = dict(zip(STAGES, (1.0, 0.0, 2.5, 0.25, 0.25), strict=True))
    path = tmp_path / f"a b{seed or ''}{suffix}"
    beside = path.with_suffix(".json")
    return Output(path, beside, None, seed, times, "l" * 64, "f" * 64, receipt=receipt)


def run(tmp_path: Path) -> Run:
    """A finished run, as `generate` ends with it."""
    made = output(tmp_path)
    resolved = resolve(ASKED, cards.find("kinora-tiny"))
    return Run(resolved, (made,), made.stages_s, "cpu", {})


def test_events_become_what_is_shown(tmp_path: Path) -> None:
    shown = View("waiting")
    assert "waiting for its turn" in view.status(shown, 0.0)
    shown = view.after(shown, progress("load"), 1.0)
    assert "loading the model" in view.status(shown, 1.0)
    assert "<progress" in view.status(shown, 1.0) and "value=" not in view.status(shown, 1.0)
    shown = view.after(shown, Notice("the <b> is escaped"), 2.0)
    shown = view.after(shown, progress("denoise", 12, 30, 20.0), 5.0)
    told = view.status(shown, 8.0)
    assert "step 12 of 30" in told and 'max="30" value="12"' in told
    assert "13 s, about 17 s left" in told, "three seconds after the step"
    assert "the &lt;b&gt; is escaped" in told
    assert "stopping" in view.status(replace(shown, stopping=True), 8.0)
    assert shown.busy and "The video appears here" in view.result(shown)
    done = view.after(shown, run(tmp_path), 9.0)
    assert not done.busy and view.after(done, Ended("cancelled"), 9.5) is done
    assert "step 12" not in view.status(done, 9.0) and "&lt;b&gt;" in view.status(done, 9.0)


@pytest.mark.parametrize(
    ("end", "phase", "told"),
    [
        (Ended("cancelled"), "cancelled", "nothing of it is left"),
        (
            Ended("cancelled", "its latents are kept"),
            "cancelled",
            "Cancelled: its latents are kept.",
        ),
        (Ended("closed"), "cancelled", "`kinora ui` has ended: nothing of it is left."),
        (Ended("closed", "latents are kept"), "cancelled", "has ended: latents are kept."),
        (Ended("refused", "no <model>"), "failed", "no &lt;model&gt;"),
        (Ended("fault", "a fault in Kinora: x"), "failed", "a fault in Kinora: x"),
    ],
)
def test_what_ended_a_run_is_one_line(end: Ended, phase: str, told: str) -> None:
    shown = view.after(View("running"), end, 0.0)
    assert not shown.busy
    html = view.status(shown, 0.0)
    assert told in html and f'data-phase="{phase}"' in html and html.count("<p") == 1


def test_the_result_names_files_times_and_receipt(tmp_path: Path) -> None:
    html = view.result(View("done", ASKED, outputs=(output(tmp_path),)))
    assert f'<video src="/gradio_api/file={tmp_path}/a%20b.mp4?ffff' in html
    assert "a &quot;red&quot; &lt;circle&gt;" in html and "<circle>" not in html
    assert "<dt>denoise</dt><dd>2.50 s</dd>" in html and "<dt>total</dt><dd>4.00 s</dd>" in html
    assert "nothing accelerated: the stock pipeline ran" in html
    assert f"{tmp_path}/a b.mp4</a>" in html and f"{tmp_path}/a b.json</a>" in html
    for suffix, tag in ((".png", "<img src="), (".gif", "<img src="), (".webm", "<video src=")):
        assert tag in view.result(View("done", ASKED, outputs=(output(tmp_path, suffix),)))
    sized = ASKED.model_copy(update={"width": 64, "height": 32})
    html = view.result(View("done", sized, outputs=(output(tmp_path),)))
    assert ' width="64" height="32"' in html
    kept = replace(output(tmp_path), latents=tmp_path / "a b.latents.safetensors")
    assert f"{kept.latents}</a>" in view.result(View("done", ASKED, outputs=(kept,)))


def test_several_videos_are_all_shown_as_they_come(tmp_path: Path) -> None:
    asked = ASKED.model_copy(update={"num_videos": 3})
    outputs = output(tmp_path), output(tmp_path, seed=1)
    shown = View("running", asked, Progress("denoise", 2, 9, 10.0, None, 3, 3), outputs=outputs)
    assert "video 3 of 3, step 2 of 9" in view.status(shown, 0.0)
    html = view.result(shown)
    assert html.count("<video") == 2 and "a%20b1.mp4" in html and "k-several" in html
    assert "<dt>total</dt><dd>8.00 s</dd>" in html
    assert html.count("nothing accelerated") == 1, "what all receipts say is said once"
    ended = view.after(shown, Ended("cancelled"), 0.0)
    assert "the finished videos stay" in view.status(ended, 0.0)
    assert view.result(ended) == html
    assert "k-several" not in view.result(replace(shown, request=ASKED, outputs=outputs[:1]))


def test_a_prediction_in_words(wan_folder: Path) -> None:
    plan = planning.plan(Request(prompt="a", model=str(wan_folder), width=32, height=32, frames=5))
    html = view.prediction(plan)
    assert "32 tokens, 50 steps on" in html and "it fits" in html
    assert "nothing accelerated: the stock pipeline" in html and "k-bad" not in html
    part = planning.Part("attention", "x", "refused", "it <cannot>", 1.0, None)
    html = view.prediction(replace(plan, parts=(part,), free_bytes=0))
    assert "attention refused: it &lt;cannot&gt;" in html
    assert "it does not fit" in html and "k-bad" in html


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"host": "127.0.0.1:7860"}, None),
        ("/", {"host": "localhost:8000"}, None),
        ("/", {"host": "evil.example:7860"}, 403),
        ("/", {"host": "127.0.0.1.evil.example"}, 403),
        ("/", {}, 403),
        ("/gradio_api/queue/join", {"host": "localhost:1", "origin": "http://localhost:1"}, None),
        ("/gradio_api/queue/join", {"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ("/gradio_api/queue/join", {"host": "localhost:1", "origin": "http://evil.example"}, 403),
        ("/gradio_api/queue/join", {"host": "localhost:1", "origin": "null"}, 403),
        ("/gradio_api/file=/tmp/x.mp4", {"host": "localhost"}, None),
        ("/gradio_api/file=http://evil.example/", {"host": "localhost"}, 404),
        ("/gradio_api/proxy=http://evil.example/", {"host": "localhost"}, 404),
        ("/gradio_api/upload", {"host": "localhost"}, 404),
        ("/gradio_api/call/generate", {"host": "localhost"}, 404),
        ("/docs", {"host": "localhost"}, 404),
    ],
)
def test_only_the_page_itself_is_answered(
    path: str, headers: dict[str, str], status: int | None
) -> None:
    raw = {name.encode(): value.encode() for name, value in headers.items()}
    assert guard.refusal(path, raw) == status


def test_a_port_that_is_taken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.listening(0) as taken:
        port = taken.getsockname()[1]
        refused = cli("ui", "--port", port)
        assert refused.status == 2
        assert f"port {port} is taken: choose another --port" in refused.complaint
        monkeypatch.setattr(server, "DEFAULT_PORT", port)
        with server.listening(None) as other:
            assert port < other.getsockname()[1] < port + 100
            assert other.getsockname()[0] == "127.0.0.1"


def test_what_cannot_be_served_is_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in cli("ui", "--port", 0, "--output", tmp_path / "file").complaint
    monkeypatch.setitem(sys.modules, "gradio", None)
    missing = cli("ui", "--port", 0)
    assert missing.status == 2
    assert 'gradio, which is not installed: `pip install --editable ".[ui]"`' in missing.complaint
    assert cli("ui", "--port", 65536).status == 2


def test_ctrl_c_names_the_latents_that_are_kept(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = Kept(tmp_path / "a.latents.safetensors", "a", "l" * 64)

    def stopped(desk: Desk, _: object) -> None:
        desk._unfinished.append(kept)  # pyright: ignore[reportPrivateUsage]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Desk, "work", stopped)
    monkeypatch.setattr(server, "_application", lambda *given: (None, Desk(unfinished=given[-1])))
    monkeypatch.setattr(server, "_served", lambda *_: nullcontext(threading.main_thread()))
    called = cli("ui", "--port", 0)
    assert called.status == 130
    assert called.err.splitlines()[-1] == f"stopped; {kept.remedy()}"


def test_listening_is_on_this_machine_only() -> None:
    with server.listening(0) as listener, socket.socket() as other:
        other.bind(("127.0.0.2", listener.getsockname()[1]))  # free: nothing listens on 0.0.0.0
