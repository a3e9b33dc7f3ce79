"""In headless Chromium: what is chosen or pressed while what came before it is unanswered."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from browsing import Page, Server
from filming import WORLDLY, film

pytestmark = pytest.mark.long


def preset(page: Page, name: str) -> None:
    """Press one."""
    page.find(f"#k-presets [data-id={name}]").click()


def recipe(page: Page, name: str) -> None:
    """Choose one in the list."""
    page.choose("recipe", name)


@pytest.mark.parametrize("first", [preset, recipe])
@pytest.mark.parametrize("second", [preset, recipe])
def test_the_last_of_two_quick_recipes_counts(
    page: Page, first: Callable[[Page, str], None], second: Callable[[Page, str], None]
) -> None:
    page.open_builder()
    with page.unanswered() as asked:
        first(page, "fast")
        page.until(lambda: asked)
        second(page, "balanced")
        assert page.value("recipe") == "balanced"
    page.until(lambda: "--recipe balanced" in page.value("command"))
    page.until(lambda: "--set" not in page.value("command"))  # its values, not those of the first
    assert page.value("recipe") == "balanced"
    pressed = page.find("#k-presets [aria-pressed=true]")
    page.until(lambda: pressed.get_attribute("data-id") == "balanced")


def test_the_last_of_two_quick_models_counts(page: Page) -> None:
    with page.unanswered() as asked:
        page.choose("model", "cogvideox-2b")
        page.until(lambda: asked)
        page.choose("model", "kinora-tiny")
    page.until(lambda: "kinora" in page.find("#k-model").inner_text())
    page.until(lambda: page.value("frames") == "33")
    assert page.value("model") == "kinora-tiny"


def test_a_button_takes_no_press_that_would_be_lost(page: Page, server: Server) -> None:
    film(server.output, "world", prompt=WORLDLY)
    for tab, button in (("generate", "generate"), ("compare", "compare-start")):
        page.show(tab)
        with page.unanswered() as asked:
            page.press(button)
            page.until(lambda asked=asked: asked)
            assert not page.find(f"#k-{button}").is_enabled()
        page.until(lambda button=button: page.find(f"#k-{button}").is_enabled())
    page.show("evaluate")
    page.until(lambda: page.count("#k-choices .k-card"))
    with page.unanswered() as asked:
        page.press("evaluate")
        page.until(lambda: asked)
        assert not page.find("#k-evaluate").is_enabled()
    page.find(f"#k-choices .k-card:has-text('{WORLDLY}') input").check()
    page.press("evaluate")
    page.until(lambda: "all correct" in page.text("evaluated"))
    assert "1 of 1" in page.text("evaluated")
