"""In headless Chromium: the tab Evaluate, and prompts from strangers in every tab."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from browsing import Page, Server
from filming import BALANCED, HOSTILE, WORLDLY, film

pytestmark = pytest.mark.long


@pytest.fixture
def films(server: Server) -> Path:
    """Videos that were made some time before."""
    film(server.output, "dense", prompt=WORLDLY, seed=4)
    film(server.output, "fast", prompt=WORLDLY, seed=4, recipe=BALANCED, level=40)
    film(server.output, "hostile", prompt=HOSTILE, seed=4)
    return server.output


def tick(page: Page, *prompts: str) -> None:
    """Choose the videos of these prompts, and no others."""
    for box in page.tab.locator("#k-choices input").all():
        box.uncheck()
    for prompt in prompts:
        for card in page.tab.locator("#k-choices .k-card").all():
            if prompt in card.inner_text():
                card.locator("input").check()


def test_evaluate_scores_what_is_ticked_and_gives_the_report(page: Page, films: Path) -> None:
    page.show("evaluate")
    page.until(lambda: page.count("#k-choices .k-card") >= 3)
    page.press("evaluate")
    page.until(lambda: "no video is chosen" in page.text("evaluate-status"))
    tick(page, WORLDLY)
    page.press("evaluate")
    page.until(lambda: "all correct" in page.text("evaluated"))
    assert page.phase("evaluate-status") == "done"
    assert "2 of 2" in page.text("evaluated") and "skipped" in page.text("evaluated")
    with page.tab.expect_download() as waited:
        page.find("#k-evaluated a[download]").click()
    report = json.loads(Path(waited.value.path()).read_text())
    assert {it["path"] for it in report["clips"]} == {"dense.mp4", "fast.mp4"}
    page.choose("suite", "Nearness")
    page.until(lambda: page.find("#k-reference").is_visible())
    page.choose("eval-recipe", "blade, changed")
    page.until(lambda: page.count("#k-choices .k-card") == 1)
    tick(page, WORLDLY)
    page.press("evaluate")
    page.until(lambda: "psnr" in page.text("evaluated"))
    assert "lossy: mp4 against mp4" in page.text("evaluated")
    page.choose("suite", "VBench")
    page.press("evaluate")
    page.until(lambda: page.phase("evaluate-status") in ("failed", "done"))
    page.until(lambda: page.find("#k-evaluate").is_enabled())


def test_evaluate_is_cancelled(page: Page, films: Path) -> None:
    long: dict[str, Any] = {"prompt": "a long one", "size": 256, "frames": 81}
    film(films, "long-dense", **long)
    film(films, "long-fast", **long, recipe=BALANCED, level=60)
    page.show("evaluate")
    page.until(lambda: page.count("#k-choices .k-card") >= 5)
    page.find("#k-choices [data-all]").click()
    assert page.count("#k-choices input:checked") == page.count("#k-choices input")
    tick(page, "a long one")
    page.choose("suite", "Nearness")
    page.until(lambda: page.find("#k-reference").is_visible())
    page.press("evaluate")
    page.press("evaluate-cancel")
    page.until(lambda: "Cancelled" in page.text("evaluate-status"))
    page.until(lambda: page.find("#k-evaluate").is_enabled())


def test_prompts_of_strangers_are_text_in_every_tab(page: Page, films: Path) -> None:
    page.fill(prompt=HOSTILE)
    page.generate("done")
    page.show("compare")
    page.press("compare-start")
    page.until(lambda: "PSNR" in page.text("compared"))
    page.show("jobs")
    page.until(lambda: HOSTILE in page.text("jobs"))
    page.show("gallery")
    page.until(lambda: HOSTILE in page.text("gallery"))
    page.find("#k-gallery .k-card").click()
    page.until(lambda: HOSTILE in page.text("opened"))
    page.show("evaluate")
    page.until(lambda: HOSTILE in page.text("choices"))
    tick(page, HOSTILE, WORLDLY)
    page.press("evaluate")
    page.until(lambda: "By video" in page.text("evaluated"))
    page.find("#k-evaluated summary").click()
    page.until(lambda: "img src=x" in page.text("evaluated"))
    page.tab.wait_for_timeout(300)  # for an image that cannot be loaded to say so
    assert page.tab.evaluate("window.hacked") is None
    assert page.count("b:text-is('bold')") == 0 == page.count("img[src='x']")


def test_a_deep_link_to_a_file_is_nothing(page: Page, server: Server) -> None:
    answers: dict[str, Any] = {}
    for path in ("/gradio_api/file=/etc/passwd", "/evaluations/../../etc/passwd", "/file/x"):
        answers[path] = page.tab.request.get(server.address + path).status
    assert set(answers.values()) == {404}


def test_a_closed_page_ends_its_evaluation(
    page: Page, server: Server, chromium: Any, films: Path
) -> None:
    for seed in range(6):
        long: dict[str, Any] = {
            "prompt": "another long one",
            "seed": seed,
            "size": 256,
            "frames": 81,
        }
        film(films, f"closed-{seed}", **long, level=seed)
        film(films, f"closed-fast-{seed}", **long, recipe=BALANCED, level=60)

    def scoring() -> list[int]:
        below = psutil.Process(server.process.pid).children()
        return [it.pid for it in below if "kinora.app.ui.scoring" in it.cmdline()]

    other = Page(chromium, server)
    other.show("evaluate")
    other.until(lambda: other.count("#k-choices .k-card") >= 12)
    tick(other, "another long one")
    other.choose("suite", "Nearness")
    other.until(lambda: other.find("#k-reference").is_visible())
    other.press("evaluate")
    other.until(scoring)
    began = time.monotonic()
    other.tab.close()
    page.until(lambda: not scoring())
    assert time.monotonic() - began < 20
