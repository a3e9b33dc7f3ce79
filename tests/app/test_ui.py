"""The page without a browser: controls from definitions, fields to a request, events to a view."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from kinora.accel import recipe as recipes
from kinora.accel.methods import METHODS
from kinora.accel.options import Option
from kinora.accel.parts import ATTENTION
from kinora.app import cli as command_line
from kinora.app.ui import controls, fields, form, server
from kinora.pipelines import cards
from kinora.pipelines.errors import RecipeError, RequestError
from kinora.pipelines.request import Request, resolve

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
    with pytest.raises(RequestError, match=r"steps must be a whole number, not 2\.5"):
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


def test_listening_is_on_this_machine_only() -> None:
    with server.listening(0) as listener, socket.socket() as other:
        other.bind(("127.0.0.2", listener.getsockname()[1]))  # free: nothing listens on 0.0.0.0
