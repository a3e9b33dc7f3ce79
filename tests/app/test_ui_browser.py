"""The page in headless Chromium: runs, mistakes, cancels, jobs, the gallery, restored settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from browsing import FOREVER, SMALL, Page, Server, worker_ids

pytestmark = pytest.mark.long
BLADE = "#k-options-attention-blade"


def test_a_run_shows_video_receipt_times_and_files(page: Page, server: Server) -> None:
    assert not page.find("#k-cancel").is_enabled()
    page.fill(prompt="a blue square", seed=3)
    page.choose("recipe", "balanced")
    page.until(lambda: "attention" in page.text("prediction"))
    page.open_builder()
    assert page.find(f"{BLADE} input[type=range]").input_value() == "0.25"
    page.generate("done")
    video = "document.querySelector('#k-output video')"
    script = f"[{video}.videoWidth, {video}.videoHeight, {video}.error]"
    page.until(lambda: page.tab.evaluate(script) == [32, 32, None])
    told = page.text("output")
    made = server.path("a-blue-square-s3.json")
    for word in ("asked: attention by blade", "denoise", "total", made.name):
        assert word in told
    assert server.files() == ["a-blue-square-s3.json", "a-blue-square-s3.mp4"]
    record = json.loads(made.read_text())
    assert record["request"]["recipe"]["attention"]["from_step"] == 0.2
    page.choose("recipe", "dense")
    page.until(lambda: not page.count(f"{BLADE}:visible"))
    assert page.asked == {"127.0.0.1"}


def test_accelerations_are_chosen_in_the_builder(page: Page) -> None:
    page.fill(steps=50)
    page.find("#k-presets [data-id=fast]").click()
    page.until(lambda: page.value("recipe") == "fast" and "--recipe fast" in page.value("command"))
    assert page.find("#k-presets [aria-pressed=true]").get_attribute("data-id") == "fast"
    page.open_builder()
    page.choose("steps-policy", "shadow")
    page.until(lambda: not page.count("#k-presets [aria-pressed=true]"))
    page.until(lambda: page.find("#k-options-steps-shadow").is_visible())
    page.until(lambda: page.value("command").endswith("--set steps.policy=shadow"))
    page.until(lambda: 'policy = "shadow"' in page.value("toml"))
    page.until(lambda: "of 50 steps evaluated, as the run goes" in page.text("prediction"))
    page.find("#k-steps-policy input").click()
    greyed = "#k-steps-policy [role=option][aria-label$='(not here)']"
    page.until(lambda: page.count(greyed))
    names = {it.strip() for it in page.tab.locator(greyed).all_inner_texts()}
    assert "faster-cache (not here)" in names
    assert page.find(greyed).evaluate("it => getComputedStyle(it).opacity") == "0.5"
    page.choose("steps-policy", "faster-cache")
    page.until(lambda: "steps refused: faster-cache" in page.text("prediction"))
    assert "faster-cache" in page.find("#k-why").text_content()
    page.choose("attention-method", "none")
    page.choose("steps-policy", "none")
    page.until(lambda: page.value("command").endswith("--set dense_kernel=fastest"))


def test_a_mistake_is_one_line(page: Page, server: Server) -> None:
    before = server.files()
    page.fill(frames=6)
    page.until(lambda: "cannot make 6 frames" in page.text("prediction"))
    page.generate("failed")
    assert page.text("status").endswith("the nearest is Frames 5")
    assert "\n" not in page.text("status") and "Traceback" not in page.tab.inner_text("body")
    page.fill(frames=5, prompt="")
    page.generate("failed")
    page.until(lambda: "the prompt is empty" in page.text("status"))
    page.fill(prompt="a", steps=0)
    page.until(lambda: "steps must be 1 to 1000, not 0" in page.text("prediction"))
    assert page.value("command") == ""
    page.generate("failed")
    page.until(lambda: "steps must be 1 to 1000" in page.text("status"))
    page.until(lambda: not page.text("prediction"))
    page.fill(steps=2, model="/no/folder")
    page.generate("failed")
    page.until(lambda: "there is no model folder at /no/folder" in page.text("status"))
    assert server.files() == before


def test_advanced_fields_a_recipe_file_and_several_videos(
    page: Page, server: Server, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    page.fill(recipe=recipe)
    page.until(lambda: "mine.toml cannot be read" in page.text("prediction"))
    lines = ('title = "Mine"', 'when = "always"', "[attention]", 'method = "top-blocks"')
    recipe.write_text("\n".join((*lines, "keep = 0.4", 'tile = "64x64"')))
    page.fill(recipe="dense")
    page.fill(recipe=recipe)
    slider = "#k-options-attention-top-blocks input[type=range]"
    page.open_builder()
    page.until(lambda: page.find(slider).input_value() == "0.4")
    page.until(lambda: page.text("recipe-line") == "Mine")
    page.open_advanced()
    assert page.value("fps") == "16"
    page.fill(prompt="a red square", negative_prompt="blue", num_videos=0)
    page.until(lambda: "Videos must be 1 to 1000, not 0" in page.text("prediction"))
    page.fill(num_videos=2, fps=8, device="cpu", format="gif")
    page.find("#k-keep_latents input").click()
    # Two tiles: strict refuses what is dense because of fewer.
    page.fill(width=64, height=64)
    page.find("#k-strict input").click()
    page.until(lambda: "128 tokens" in page.text("prediction"))
    page.generate("done")
    stems = ("a-red-square-s0", "a-red-square-s1")
    expected = {
        f"{stem}{end}" for stem in stems for end in (".gif", ".json", ".latents.safetensors")
    }
    assert expected <= set(server.files())
    record = json.loads(server.path("a-red-square-s1.json").read_text())["request"]
    asked = {"negative_prompt": "blue", "format": "gif", "fps": 8, "device": "cpu", "strict": True}
    assert {name: record[name] for name in asked} == asked
    assert record["recipe"]["attention"]["keep"] == 0.4
    pictures = "[...document.querySelectorAll('#k-output img')].map(it => it.naturalWidth)"
    page.until(lambda: page.tab.evaluate(pictures) == [64, 64])
    assert all(server.path(name).name in page.text("output") for name in expected)


def test_the_page_fits_a_narrow_window(page: Page) -> None:
    page.open_advanced()
    page.tab.set_viewport_size({"width": 390, "height": 900})
    page.until(lambda: page.tab.evaluate("document.documentElement.scrollWidth") <= 390)
    for name in ("generate", "compare", "evaluate", "jobs", "gallery"):
        page.show(name)
        right = "[...document.querySelectorAll('.tabitem input, .tabitem button')]"
        right = f"Math.max(0, ...{right}.map(it => it.getBoundingClientRect().right))"
        page.until(lambda right=right: page.tab.evaluate(right) <= 390)


def test_the_result_stays_in_one_column_of_a_low_window(page: Page) -> None:
    page.tab.set_viewport_size({"width": 1280, "height": 600})
    page.open_builder()
    page.generate("done")
    page.until(lambda: "about" in page.text("prediction"))
    panel = page.find("#k-result")
    left, wide = panel.bounding_box()["x"], panel.bounding_box()["width"]
    for name in ("output", "prediction", "plan"):
        box = page.find(f"#k-{name}").bounding_box()
        assert left <= box["x"] and box["x"] + box["width"] <= left + wide, name
    assert panel.evaluate("it => it.scrollHeight > it.clientHeight"), "more than fits"
    page.tab.evaluate("scrollTo(0, 500)")
    page.until(lambda: page.tab.evaluate("scrollY") == 500)
    page.until(lambda: abs(panel.bounding_box()["y"]) < 1)


def test_a_cancel_stops_leaves_nothing_and_the_next_run_works(page: Page, server: Server) -> None:
    before = server.files()
    page.fill(**FOREVER, prompt="a red circle")
    page.generate("running")
    page.until(lambda: " of 1000" in page.text("status"))
    assert not page.find("#k-generate").is_enabled()
    page.press("cancel")
    page.until(lambda: page.phase() == "cancelled")
    assert page.text("status") == "Cancelled: nothing of it is left."
    assert server.files() == before
    page.fill(**SMALL)
    page.generate("done")
    assert len(server.files()) == len(before) + 2


def test_a_run_outlives_its_page_and_is_cancelled_in_the_list(
    page: Page, server: Server, chromium: Any, wan_folder: Path
) -> None:
    before = server.files()
    page.fill(**FOREVER)
    page.generate("running")
    other = Page(chromium, server)
    other.fill(model=wan_folder)
    other.until(lambda: other.value("steps") == "50")
    other.fill(**SMALL)
    other.generate("waiting")
    assert "waiting for its turn" in other.text("status")
    assert "1 ahead of it" in other.text("status")
    assert page.phase() == "running"
    page.tab.close()
    other.tab.wait_for_timeout(2000)
    assert other.phase() == "waiting", "what the closed page asked for goes on"
    other.show("jobs")
    other.until(lambda: other.jobs("running") == 1 == other.jobs("queued"))
    other.act("running", "cancel")
    other.until(lambda: other.jobs("cancelled") >= 1 and not other.jobs("queued"))
    other.show("generate")
    other.until(lambda: other.phase() == "done")
    other.tab.close()
    assert len(server.files()) == len(before) + 2


def test_the_gallery_opens_videos_and_restores_their_settings(page: Page) -> None:
    page.fill(prompt='a "green" <b>ring</b>', seed=11, steps=12)
    page.open_builder()
    page.choose("recipe", "fast")
    page.until(lambda: page.find(BLADE).is_visible())
    page.generate("done")
    page.choose("recipe", "dense")
    page.fill(prompt="something else", seed=0, steps=2)
    page.show("gallery")
    cards = "#k-gallery .k-card"
    page.until(lambda: "green" in page.find(cards).inner_text())
    pictures = f"[...document.querySelectorAll('{cards} img')].map(it => it.naturalWidth)"
    page.until(lambda: all(page.tab.evaluate(pictures)))
    assert not page.count("#k-gallery b"), "prompts are no HTML"
    page.choose("of-recipe", "fast")
    page.until(lambda: page.count(cards) == 1)
    page.find(cards).click()
    page.until(lambda: "asked: attention by blade" in page.text("opened"))
    page.find("#k-opened [data-act=restore]").click()
    page.until(lambda: page.find("#k-prompt").is_visible())
    page.until(lambda: page.value("prompt") == 'a "green" <b>ring</b>')
    asked = {"seed": "11", "steps": "12", "width": "32", "frames": "5", "recipe": "fast"}
    page.until(lambda: {name: page.value(name) for name in asked} == asked)
    assert "are restored" in page.text("status")


def test_a_dropped_file_restores_settings_or_says_why_not(
    page: Page, server: Server, tmp_path: Path
) -> None:
    page.fill(prompt="a red cross", seed=21)
    page.open_builder()
    page.choose("recipe", "balanced")
    page.until(lambda: page.find(BLADE).is_visible())
    page.generate("done")
    page.find("#k-restore > button").click()
    for name in ("a-red-cross-s21.mp4", "a-red-cross-s21.json"):
        page.fill(prompt="another", seed=1)
        page.drop(server.path(name))
        page.until(lambda: page.value("seed") == "21" and page.value("prompt") == "a red cross")
        assert page.value("recipe") == "balanced"
    bad = {
        "broken.mp4": b"\x00\x00\x00\x18ftypmp42 and nothing more",
        "other.json": b'{"schema": "something/1"}',
        "<img src=x onerror=alert(1)>.json": b"[" * 100_000,
    }
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        page.drop(path)
        page.until(lambda: page.phase() == "failed")
        assert "\n" not in page.text("status") and "Traceback" not in page.text("status")
        assert "gradio" not in page.text("status").lower()
        page.fill(seed=3)
        page.generate("done")


def test_a_failed_job_is_retried_in_the_list(page: Page, server: Server) -> None:
    page.fill(**FOREVER, prompt="a blue cross")
    page.generate("running")
    psutil.Process(worker_ids(server)[0]).kill()
    page.until(lambda: page.phase() == "failed")
    assert "ended by SIGKILL, as by a system that is out of memory" in page.text("status")
    page.show("jobs")
    page.until(lambda: page.jobs("failed") == 1)
    page.act("failed", "retry")
    page.until(lambda: page.jobs("running") == 1)
    page.act("running", "cancel")
    page.until(lambda: not page.jobs("running"))
    assert not page.jobs("failed")


def test_a_double_click_in_the_list_does_one_thing(page: Page, server: Server) -> None:
    page.open_advanced()
    page.fill(prompt="a green cross", num_videos=3)
    page.generate("done")
    page.fill(**FOREVER, num_videos=1)
    page.generate("running")
    page.until(lambda: " of 1000" in page.text("status"))
    page.show("jobs")
    page.until(lambda: page.jobs("running") == 1)
    done, workers = page.jobs("done"), worker_ids(server)
    remove = "#k-jobs li[data-status=done] [data-act=remove]"
    press_twice(page, remove)()
    page.until(lambda: page.find(remove).inner_text() == "Delete for good?")
    page.until(lambda: page.find(remove).inner_text() == "Delete")
    assert page.jobs("done") == done, "a double click deletes nothing, nor does one press"
    again: list[Callable[[], None]] = []

    def removed() -> bool:
        """On a busy machine the question may be over before it is answered: then once more."""
        if page.find(remove).inner_text() == "Delete":
            page.find(remove).click()
        elif page.jobs("done") == done:
            again[:] = [press_twice(page, remove)]
            for _ in range(50):
                if page.jobs("done") == done:
                    page.tab.wait_for_timeout(100)
        return page.jobs("done") == done - 1

    page.until(removed)
    again[0]()
    once_more = press_twice(page, "#k-jobs li[data-status=running] [data-act=cancel]")
    page.until(lambda: page.count("#k-jobs li:has(progress[aria-label^=stopping])") == 1)
    once_more()
    page.until(lambda: not page.jobs("running"))
    assert page.jobs("done") == done - 1, "the next video came under the pointer"
    assert worker_ids(server) == workers, "nobody asked to stop it at once"


def test_compare_plays_in_step_and_shows_what_differs(page: Page, tmp_path: Path) -> None:
    recipe = tmp_path / "coarse.toml"
    lines = ('title = "Coarse"', 'when = "always"', "[attention]", 'method = "top-blocks"')
    recipe.write_text("\n".join((*lines, "keep = 0.1", 'tile = "64x64"')))
    page.fill(width=64, height=64, frames=9, prompt="a red circle", seed=5, recipe="balanced")
    page.show("compare")
    page.fill(**{"recipe-1": recipe, "recipe-2": "of Generate"})
    page.press("compare-start")
    page.until(lambda: "dB" in page.text("compared"))
    told = page.text("compared")
    recipes = "dense", "top-blocks, changed", "balanced"
    for word in (*recipes, "denoise", "PSNR", "SSIM", "all three"):
        assert word in told
    cells = "[...document.querySelectorAll('.k-figures tr')].map(it => it.innerText)"
    psnr = next(it for it in page.tab.evaluate(cells) if it.startswith("PSNR"))
    assert "equal" in psnr, "balanced runs dense at this size, and the files are the same"
    videos = "[...document.querySelectorAll('.k-compare video')]"
    page.until(lambda: page.tab.evaluate(f"{videos}.every(it => it.readyState >= 2)"))

    def move(name: str, value: object) -> None:
        it = f"document.querySelector('.k-compare [name={name}]')"
        event = f"{it}.dispatchEvent(new Event('input', {{bubbles: true}}))"
        page.tab.evaluate(f"() => {{ {it}.value = {value}; {event} }}")

    move("frame", 4)
    times = f"{videos}.map(it => it.currentTime)"
    page.until(lambda: page.tab.evaluate(times) == pytest.approx([4.5 / 16] * 3, abs=1e-3))
    page.tab.evaluate("document.querySelector('.k-compare [value=difference]').click()")
    brightest = (
        "() => { const it = document.querySelector('.k-compare canvas');"
        "return Math.max(...it.getContext('2d').getImageData(0, 0, it.width, it.height).data"
        ".filter((_, k) => k % 4 < 3)) }"
    )
    page.until(lambda: page.tab.evaluate(brightest) > 40)
    move("other", 2)
    page.until(lambda: page.tab.evaluate(brightest) == 0)
    page.find(".k-compare [data-play]").click()
    apart: list[float] = []
    for _ in range(20):
        now = page.tab.evaluate(times)
        apart.append(max(now) - min(now))
        page.tab.wait_for_timeout(50)
    assert sorted(apart)[10] <= 2 / 16, "two frames, but where one of them begins anew"
    page.find(".k-compare [data-play]").click()
    page.until(lambda: "Play" in page.find(".k-compare [data-play]").inner_text())


def test_compare_refuses_in_one_line(page: Page) -> None:
    page.fill(frames=1)
    page.show("compare")
    page.press("compare-start")
    page.until(lambda: "a png cannot be compared: choose Format mp4 or webm" in status(page))
    page.show("generate")
    page.fill(frames=5)
    page.show("compare")
    for name in ("dense", "of Generate"):
        page.fill(**{"recipe-1": name})
        page.press("compare-start")
        page.until(lambda: "choose a recipe to compare with dense" in status(page))
        page.fill(**{"recipe-1": "no such"})
        page.press("compare-start")
        page.until(lambda: "there is no recipe" in status(page))
    page.fill(**{"recipe-1": "balanced"})
    page.show("generate")
    page.fill(**FOREVER)
    page.show("compare")
    page.press("compare-start")
    page.until(lambda: " of 1000" in status(page))
    page.press("compare-cancel")
    page.until(lambda: "Cancelled" in status(page))
    page.until(lambda: page.find("#k-compare-start").is_enabled())


def press_twice(page: Page, selector: str) -> Callable[[], None]:
    """The first half of a double click; what is returned is the other, wherever it falls now."""
    box = page.find(selector).bounding_box()
    mouse = page.tab.mouse
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def press(count: int) -> None:
        mouse.down(click_count=count)
        mouse.up(click_count=count)

    press(1)
    return lambda: press(2)


def status(page: Page) -> str:
    """What the tab Compare says."""
    return page.text("compare-status")
