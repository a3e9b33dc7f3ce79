"""The line under Recipe and the preset that is pressed: of what the fields ask for alone."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from standing import Standing, opened

from kinora.accel import recipe as recipes
from kinora.accel.presets import MEASURED
from kinora.app.ui.page import Page
from kinora.pipelines import cards
from kinora.pipelines.request import Request, resolve
from kinora.pipelines.sidecar import Machine, ModelRecord, Record


@pytest.fixture
def page(tmp_path: Path) -> Generator[Page, None, None]:
    """The page over an empty folder; nothing is made."""
    with opened(tmp_path / "made") as made:
        yield made


class Fields(Standing):
    """What the fields of Generate hold, and what the page says of their recipe."""

    def shown(self, update: dict[Any, Any]) -> tuple[str, list[str]]:
        """Take up what a handler returns; see `said`."""
        self.put(update)
        return self.said(update)

    def after(self, group: str, path: str, value: Any) -> tuple[str, list[str]]:
        """Change an option; see `said`."""
        self.set(group, path, value)
        return self.said(self.page.named(self.values))

    def said(self, update: dict[Any, Any]) -> tuple[str, list[str]]:
        """The line under Recipe, and the presets that are pressed."""
        shown = update[self.builder.presets]
        line = update[self.builder.line].removeprefix('<p class="k-facts">').removesuffix("</p>")
        return line, [it for it in MEASURED if f'data-id="{it}" aria-pressed="true"' in shown]


def record(recipe: dict[str, Any]) -> Record:
    """What a sidecar of that recipe says."""
    request = resolve(Request(prompt="a red circle", recipe=recipe), cards.find("kinora-tiny"))
    model = ModelRecord(name="m", pipeline="p", repo=None, fingerprint="f", vae_dtype="float32")
    return Record(request=request, model=model, created="today", latents_sha256="l", receipt=None,
                  machine=Machine(device="cpu", threads=1, versions={}))  # fmt: skip


@pytest.mark.parametrize(
    ("title", "settings", "line"),
    [
        ("My own", (), recipes.find("fast").title),
        ("My own", ("attention.keep=0.4",), "fast, changed"),
    ],
)
def test_a_restored_recipe_is_called_what_the_fields_ask_for(
    page: Page, title: str, settings: tuple[str, ...], line: str
) -> None:
    recipe = recipes.changed(recipes.find("fast"), (*settings, f"title={title}"))
    fields = Fields(page)
    said = fields.shown(page.restore(record(recipe.table())))
    assert said == (line, [] if settings else ["fast"])


def test_a_preset_that_is_changed_is_no_longer_it(page: Page) -> None:
    fields = Fields(page)
    whole = recipes.find("fast").title, ["fast"]
    assert fields.said(fields.preset("fast")) == whole
    keep = fields.builder.options["attention.blade"]["attention.keep"]
    before = fields.values[keep]
    changed = "fast, changed", []
    assert fields.after("attention.blade", "attention.keep", 0.4) == changed
    assert fields.after("attention.blade", "attention.keep", -1) == changed, "refused"
    assert fields.after("attention.blade", "attention.keep", before) == whole


def test_a_part_that_is_left_out_is_a_change(page: Page) -> None:
    fields = Fields(page)
    fields.preset("balanced")
    fields.values[fields.builder.selectors["attention.method"]] = ""
    assert fields.after("", "when", "faster") == ("balanced, changed", [])


def test_what_is_no_recipe_has_no_line(page: Page) -> None:
    fields = Fields(page)
    assert fields.said(fields.preset("no such")) == ("", [])


def test_a_file_is_called_by_its_title_until_it_is_changed(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(recipes.changed(recipes.find("fast"), ("title=My own",)).to_toml())
    fields = Fields(page)
    assert fields.said(fields.preset(str(file))) == ("My own", [])
    assert fields.after("", "when", "always") == ("mine, changed", [])
