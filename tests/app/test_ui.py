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
from kinora.accel.options import Option, options_of
from kinora.accel.parts import ATTENTION, PARTS, STEPS
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


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("attention.qk", "QK"), ("attention.pv", "PV"), ("parallel.cfg", "CFG (processes)"),
        ("attention.from_step", "From step"), ("attention.from_layer", "From layer"),
        ("steps.lagrange_step", "Lagrange step"), ("steps.max_skip", "Max skip (steps)"),
        ("attention.levels", "Levels"), ("steps.fn_compute_blocks", "Fn compute blocks"),
        ("attention.beta", "Beta (standard deviations)"),
        ("steps.retention_ratio", "Retention ratio (of the steps)"),
    ],
)  # fmt: skip
def test_a_label_has_the_unit_that_the_name_does_not(path: str, label: str) -> None:
    known = {path: it for group in controls.groups().values() for path, it in group.items()}
    made: Any = controls.control(known[path], known[path].default)
    assert made.label == label


@pytest.mark.parametrize("group", controls.groups())
def test_every_option_has_a_control_that_takes_its_default(group: str) -> None:
    for it in controls.groups()[group].values():
        made: Any = controls.control(it, it.default)
        assert made.preprocess(made.value) == it.default


def test_the_groups_have_all_that_a_recipe_can_say() -> None:
    known = controls.groups()
    parts: tuple[Any, ...] = (ATTENTION, STEPS)
    for part in parts:
        for name, chosen in part.known.items():
            active = controls.active({f"{part.key}.{part.selector}": name})
            assert {group for group in active if "." in group} == {f"{part.key}.{name}"}
            told = {path for group in active for path in known[group]}
            assert {f"{part.key}.{it.name}" for it in part.options(chosen)} <= told
    assert {it for part in PARTS.values() for it in part.names()} == {
        path.rpartition(".")[2] for each in (*known.values(), controls.selectors()) for path in each
    } - {it.name for it in options_of(recipes.Recipe)}


@pytest.mark.parametrize("name", recipes.names())
def test_the_values_of_a_preset_change_nothing(name: str) -> None:
    recipe = recipes.find(name)
    values = controls.values(recipe)
    assert controls.settings(recipe, values) == ()
    assert (values["attention.method"] == "") == (recipe.attention is None)
    assert controls.settings(recipe, dict.fromkeys(values)) == ()


def test_a_changed_control_is_a_setting_and_nothing_else() -> None:
    recipe = recipes.find("balanced")
    values = {**controls.values(recipe), "attention.keep": 0.5, "when": "always"}
    values |= {"attention.every": 3, "attention.first_frame": True}
    told = controls.settings(recipe, values)
    assert told is not None and sorted(told) == [
        "attention.every=3", "attention.first_frame=true", "attention.keep=0.5", "when=always",
    ]  # fmt: skip
    assert controls.values(recipes.changed(recipe, told)) == values


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("part", [ATTENTION, STEPS], ids=lambda it: it.key)
def test_choosing_does_what_set_does(name: str, part: Any) -> None:
    base = recipes.find(name)
    for chosen in part.known:
        asked = f"{part.key}.{part.selector}={chosen}"
        recipe = recipes.changed(base, [asked])
        path = f"{part.key}.{part.selector}"
        values = {**controls.values(base), **controls.defaults(path, chosen)}
        told = controls.settings(base, values)
        assert told is not None
        assert recipes.changed(base, told).table() == recipe.table()
        from_dense = controls.settings(recipes.find("dense"), controls.values(recipe))
        assert from_dense is not None
        again = recipes.changed(recipes.find("dense"), from_dense).table()
        assert {**again, "title": recipe.title} == {**recipe.table(), "title": recipe.title}


def test_a_part_that_is_left_out_is_told_from_the_dense_recipe() -> None:
    balanced = recipes.find("balanced")
    chosen = {**controls.values(balanced), "attention.method": "", "steps.policy": "shadow"}
    assert controls.settings(balanced, chosen) is None
    made = form.request_of({**FIELDS, "recipe": "balanced"}, chosen, "out")
    assert made.recipe == "dense" and "steps.policy=shadow" in made.settings
    table = resolve(made, cards.find("kinora-tiny")).recipe
    assert set(table) == {"dense_kernel", "steps"}


def test_fields_make_the_request_of_the_command_line() -> None:
    made = form.request_of({**FIELDS, "recipe": "balanced"}, {"attention.keep": 0.5}, "out")
    said = Request.model_validate(
        {**FIELDS, "recipe": "balanced", "settings": ("attention.keep=0.5",), "output": "out"}
    )
    assert made == said


def test_empty_fields_are_the_defaults_of_the_model() -> None:
    empty = {**dict.fromkeys(FIELDS), "prompt": "a cat", "model": "", "recipe": "dense"}
    assert form.request_of(empty, {}, "out") == Request(prompt="a cat", output="out")
    card = cards.find("kinora-tiny")
    resolved = resolve(Request(prompt="a cat"), card)
    assert form.defaults(card) == {name: getattr(resolved, name) for name in form.BY_CARD}
    with pytest.raises(RequestError, match="the prompt is empty"):
        resolve(form.request_of({"prompt": None, "recipe": "dense"}, {}, "out"), card)


def test_what_is_out_of_range_is_refused_in_the_words_of_the_recipe() -> None:
    chosen = {"attention.every": -1}
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
    others = {"prompt", "settings", "output", "image_sha256"}
    assert set(Request.model_fields) - set(fields.FIELDS) == others


@pytest.mark.parametrize("name", fields.FIELDS)
def test_every_field_has_a_control_that_asks_for_its_default(name: str) -> None:
    default = Request.model_fields[name].default
    value = form.defaults(cards.find("kinora-tiny")).get(name, default)
    made: Any = fields.explained(name, value)
    given = made.preprocess(made.value)
    asked = form.request_of({"prompt": "a", name: given}, {}, "outputs")
    assert getattr(asked, name) == value
    assert made.info == fields.spelled_as(name).help and made.elem_id == f"k-{name}"


def test_a_fraction_is_not_rounded() -> None:
    made: Any = fields.explained("steps", 30)
    given = {"prompt": "a", "steps": made.preprocess(2.5)}
    with pytest.raises(RequestError, match=r"steps must be a whole number, not 2\.5"):
        form.request_of(given, {}, "outputs")


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
