"""In headless Chromium: what is predicted of fields that are set and are not on the screen."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from browsing import Page, Server

from kinora.app.ui import form
from kinora.pipelines import cards

pytestmark = pytest.mark.long


def command(page: Page) -> list[str]:
    """*As a command line*, word by word."""
    return shlex.split(page.value("command"))


def settings(page: Page) -> list[str]:
    """What it sets beside the recipe."""
    return [value for flag, value in pairwise(command(page)) if flag == "--set"]


def test_a_preset_and_a_method_bring_their_values(page: Page) -> None:
    for name in ("fast", "balanced"):
        page.find(f"#k-presets [data-id={name}]").click()
        page.until(lambda name=name: name in command(page) and not settings(page))
    page.open_builder()
    page.choose("attention-method", "x-attention")
    page.until(lambda: settings(page) == ["attention.method=x-attention"])
    threshold = page.find("#k-options-attention-x-attention input[type=number]")
    threshold.fill("0.8")
    threshold.press("Tab")
    page.until(lambda: len(settings(page)) == 2)
    for method in ("top-blocks", "x-attention"):
        page.choose("attention-method", method)
        page.until(lambda method=method: settings(page) == [f"attention.method={method}"])


def test_what_alone_changes_off_the_screen_is_predicted(
    page: Page, server: Server, tmp_path: Path
) -> None:
    page.find("#k-presets [data-id=balanced]").click()
    page.fill(prompt="a red cross", seed=31)
    page.until(lambda: {"balanced", "a red cross", "31"} <= {*command(page)})
    assert "--device" not in command(page)
    page.generate("done")
    page.show("gallery")
    page.find("#k-gallery .k-card").click()
    page.find("#k-opened [data-act=restore]").click()
    page.until(lambda: "--device" in command(page))  # all else stood so before
    assert "balanced" in command(page) and not settings(page)
    record = json.loads(server.path("a-red-cross-s31.json").read_text())
    request = record["request"]
    request["negative_prompt"] = "a blue ring"
    request["recipe"]["attention"]["from_step"] = 0.35
    share = "attention.from_step=0.35"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    page.find("#k-restore > button").click()
    page.drop(changed)
    # Text is predicted as it changes; what is off the screen when all stands.
    page.until(lambda: "a blue ring" in command(page) and settings(page) == [share])
    assert "balanced" in command(page)
    page.find("#k-presets [data-id=balanced]").click()  # it stands in the list of recipes already
    page.until(lambda: "balanced" in command(page) and not settings(page))
    card = cards.find("cogvideox-2b")
    request |= {"model": card.name, **form.defaults(card), "fps": 9.0}
    changed.write_text(json.dumps(record))
    page.drop(changed)
    page.until(lambda: {card.name, "9.0"} <= {*command(page)})
    page.fill(model="cogvideox-5b")  # of the same size, frames, steps and guidance
    page.until(lambda: {"cogvideox-5b", "8.0"} <= {*command(page)})
