"""The report of a comparison: whole in one file, escaped, worst first, bounded; and its plot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from kinora.eval.compare import compare
from kinora.eval.comparison import Comparison
from kinora.eval.page import page
from kinora.eval.plot import Point, plot, ticks

Film = Callable[..., Path]
PROMPTS = ("a red circle over a black background", "<b>& no prompt of the world")


@pytest.fixture
def found(film: Film, tmp_path: Path) -> Comparison:
    """Two prompts, dense and by a recipe that adds noise to the second."""
    told = {"recipe": {}, "strict": False, "steps": 30, "attention": None}
    stages = {"load": 0.0, "text": 0.5, "denoise": 9.0, "decode": 0.5}
    for name in ("dense", "fast"):
        for seed, prompt in enumerate(PROMPTS):
            frames: Any = np.full((4, 64, 64, 3), 20, np.uint8)
            if name == "fast":
                frames[:, ::2] += np.uint8(40 * seed)
            receipt = {**told, "stages_s": stages}
            film(tmp_path / name / f"{seed}.png", frames, prompt, seed,
                 request={"recipe": {}}, receipt=receipt)  # fmt: skip
    *_, last = compare({"dense": tmp_path / "dense", "fast": tmp_path / "fast"})
    assert isinstance(last, Comparison)
    return last


def test_the_page_needs_no_other_file_and_shows_the_worst_first(found: Comparison):
    html = page(found)
    assert html.count("<video") == 4 and html.count("data:video/mp4;base64,") == 4
    assert not re.search(r"""(src|href)=["']?(?!data:)\w""", html) and "http" not in html
    assert "&lt;b&gt;&amp; no prompt" in html and "<b>& no" not in html
    first, second = (html.index(it) for it in ("&lt;b&gt;&amp; no", "a red circle over"))
    assert first < second and html.count("<details open") == 1


def test_a_recipe_without_a_verdict_says_why(found: Comparison):
    html = page(found)
    assert found.status == "partial" and "no verdict" in html
    assert "1 of 2 pairs have no score" in html and "no plot: world.all_correct" in html


def test_videos_beyond_the_bound_are_named_instead(found: Comparison, tmp_path: Path):
    whole = page(found)
    size = sum(map(len, re.findall(r"<video.*?</video>", whole)))
    html = page(found, most_video_bytes=size - 1)
    assert html.count("<video") == 2 and "The page is full" in html
    assert str(tmp_path / "fast" / "0.png") in html and "1.png" not in html
    assert page(found, most_video_bytes=0).count("<video") == 0


def test_a_video_that_is_gone_is_told_in_its_place(found: Comparison, tmp_path: Path):
    (tmp_path / "fast" / "0.png").unlink()
    html = page(found)
    assert html.count("<video") == 3 and "cannot be read" in html


def test_the_plot_is_well_formed_and_has_every_point_inside():
    points = [Point("a<b", 1.0, 0.9, 0.8, 1.0), Point("fast", 2.5, 0.4, 0.3, 0.5)]
    root = ElementTree.fromstring(plot(points, score="x", rule=0.891))
    circles = root.findall(".//circle")
    at = [(float(it.attrib["cx"]), float(it.attrib["cy"])) for it in circles]
    assert at[0][0] < at[1][0] and at[0][1] < at[1][1], "faster is right, worse is below"
    assert all(64 <= x <= 520 and 16 <= y <= 276 for x, y in at)
    assert root.findall(".//*[@class='rule']") and "a<b" in [it.text for it in root.iter()]


def test_a_single_point_has_a_place_and_none_is_refused():
    ElementTree.fromstring(plot([Point("dense", 1, 0, 0, 0)], score="x", rule=None))
    with pytest.raises(ValueError, match="0 points"):
        plot([], score="x", rule=None)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.44, 1.11, [0.0, 0.5, 1.0]),
        (0.81, 1.01, [0.85, 0.9, 0.95, 1.0]),
        (0.98, 3.1, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (0.8999, 0.9001, [0.8999, 0.89995, 0.9, 0.90005, 0.9001]),
    ],
)
def test_an_axis_is_marked_at_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_every_axis_has_marks_within_it() -> None:
    generator = np.random.default_rng(0)
    for low, wide in zip(
        generator.normal(0, 3, 500), 10 ** generator.uniform(-4, 3, 500), strict=True
    ):
        found = ticks(low, low + wide)
        assert 2 <= len(found) <= 7
        assert low - 1e-9 <= found[0] and found[-1] <= low + wide + 1e-9


def test_in_a_browser_the_videos_of_a_case_are_in_step_and_those_of_others_stay(
    found: Comparison, tmp_path: Path, chromium: Any
):
    (tmp_path / "report.html").write_text(page(found), encoding="utf-8")
    said: list[str] = []
    tab = chromium.new_page()
    tab.on("console", lambda it: said.append(it.text))
    tab.on("pageerror", lambda it: said.append(str(it)))
    tab.goto((tmp_path / "report.html").as_uri())
    tab.evaluate("""() => {
        window.cases = [...document.forms].map(it => [...it.querySelectorAll('video')]);
        document.querySelectorAll('details').forEach(it => it.open = true);
    }""")
    tab.wait_for_function("cases.flat().every(it => it.readyState >= 2)")
    tab.evaluate("""() => {
        const it = document.forms[0].elements.frame; it.value = 2;
        it.dispatchEvent(new Event('input', {bubbles: true}));
    }""")
    tab.wait_for_function("cases[0].every(it => Math.abs(it.currentTime - 2.5 / 16) < 1e-3)")
    assert tab.evaluate("cases[1].every(it => it.currentTime === 0)")
    tab.evaluate("[...document.forms[0].elements.how][1].click()")
    assert tab.evaluate("document.forms[1].elements.how.value") == "wipe"
    tab.evaluate("""() => {
        window.ink = document.querySelector('canvas').getContext('2d');
        window.seen = () => ink.getImageData(0, 0, 64, 64).data.filter((_, k) => k % 4 < 3);
    }""")
    tab.wait_for_function("Math.max(...seen()) > 100")
    assert not said
    tab.close()
