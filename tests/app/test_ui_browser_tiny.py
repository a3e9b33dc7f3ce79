"""The page in headless Chromium with the embedded model: what one does on the first evening."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from browsing import Page, Server

pytestmark = pytest.mark.long
SMALL = {"width": 96, "height": 96, "frames": 9, "steps": 4}


@pytest.fixture
def tiny(page: Page) -> Generator[Page, None, None]:
    """The page with `kinora-tiny` chosen, at a size of seconds."""
    page.choose("model", "kinora-tiny")
    page.until(lambda: page.value("steps") == "30")
    page.fill(**SMALL, prompt="a red circle moving left", seed=4)
    yield page
    assert page.faults == []


def test_generate_cancel_a_mistake_and_restore(tiny: Page, server: Server) -> None:
    tiny.generate("done")
    video = "document.querySelector('#k-output video')"
    tiny.until(lambda: tiny.tab.evaluate(f"{video}.videoWidth") == 96)
    before = server.files()
    tiny.fill(steps=1000, width=128, height=128, frames=33, seed=5)
    tiny.generate("running")
    tiny.until(lambda: " of 1000" in tiny.text("status"))
    tiny.press("cancel")
    tiny.until(lambda: tiny.phase() == "cancelled")
    assert server.files() == before
    tiny.fill(width=90)
    tiny.until(lambda: "multiples of 16" in tiny.text("prediction"))
    tiny.generate("failed")
    assert "\n" not in tiny.text("status") and "multiples of 16" in tiny.text("status")
    tiny.find("#k-restore > button").click()
    tiny.drop(server.path("a-red-circle-moving-left-s4.mp4"))
    restored = {**SMALL, "prompt": "a red circle moving left", "seed": 4}
    for name, value in restored.items():
        tiny.until(lambda name=name, value=value: tiny.value(name) == str(value))


def test_compare_has_the_judges_verdict(tiny: Page, tmp_path: Path) -> None:
    recipe = tmp_path / "coarse.toml"
    lines = ('when = "always"', "[attention]", 'method = "top-blocks"', "keep = 0.2")
    recipe.write_text("\n".join((*lines, 'tile = "64x64"')))
    tiny.show("compare")
    tiny.fill(**{"recipe-1": recipe})
    tiny.press("compare-start")
    tiny.until(lambda: "dB" in tiny.text("compared"))
    told = tiny.text("compared")
    for word in ("dense", "top-blocks, changed", "PSNR", "SSIM", "denoise", "shows what was asked"):
        assert word in told, told
