"""The page of an evaluation: whole in one file, escaped, worst first, bounded."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from kinora.eval.clips import Clip
from kinora.eval.evaluate import evaluate
from kinora.eval.report import Report
from kinora.eval.result import failed, ok, skipped
from kinora.eval.scorepage import Line, page, vbench_page, worst_first
from kinora.eval.vbench.suite import VBenchReport
from kinora.eval.vbench.suites import VBENCH

Film = Callable[..., Path]
PROMPTS = ("a red circle", "<b>& no prompt", "a blue star")


@pytest.fixture
def found(film: Film, tmp_path: Path) -> Report:
    """Three videos with more and more noise, beside their references, and one that is broken."""
    rng = np.random.default_rng(0)
    for seed, prompt in enumerate(PROMPTS):
        frames: Any = np.full((4, 32, 32, 3), 90, np.uint8)
        film(tmp_path / "dense" / f"{seed}.png", frames, prompt, seed)
        noise = rng.integers(0, 1 + 20 * seed, frames.shape, np.uint8)
        film(tmp_path / "fast" / f"{seed}.png", frames + noise, prompt, seed)
    (tmp_path / "fast" / "<i>.mp4").write_bytes(b"no video")
    (tmp_path / "dense" / "<i>.mp4").write_bytes(b"no video")
    events = evaluate(
        [tmp_path / "fast"], reference=tmp_path / "dense", metrics=("psnr", "relative_l1")
    )
    *_, last = events
    assert isinstance(last, Report)
    return last


def text_of(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)>.*?</\1>", "", html)))


def test_the_page_needs_no_other_file_and_shows_the_worst_first(found: Report) -> None:
    html = page(found)
    assert html.count("data:video/mp4;base64,") == 8
    assert not re.search(r"""(src|href)=["']?(?!data:)\w""", html) and "http" not in html
    assert "&lt;b&gt;&amp; no prompt" in html and "<b>&" not in html and "<i>" not in html
    heads = re.findall("<summary>(.*?)</summary>", html)
    for head, part in zip(heads, ("&lt;i&gt;", "a blue", "&lt;b&gt;", "a red"), strict=True):
        assert part in head
    assert html.count("<details open") == 1


def test_the_page_tells_totals_coverage_reasons_and_every_value(found: Report) -> None:
    text = " ".join(text_of(page(found)).split())
    assert "psnr – 3 of 4 partial" in text and "less is better" in text
    assert "1 of 4 have none" in text and "cannot be read as a video" in text
    for one in found.clips:
        for result in one.results.values():
            assert result.score is None or f"{result.score:.4g}" in text
    for name in ("prompts_sha256", "versions", "samplers", "coverage"):
        assert name in text


def test_values_by_frame_are_a_line_that_lies_inside(found: Report) -> None:
    lines = re.findall(r"<svg class=\"k-line\".*?</svg>", page(found))
    assert len(lines) == 6
    for line in lines:
        (drawn,) = ElementTree.fromstring(line).iter("polyline")
        points = [tuple(map(float, it.split(","))) for it in drawn.attrib["points"].split()]
        assert len(points) == 4 and all(0 <= x <= 160 and 0 <= y <= 28 for x, y in points)


def test_videos_beyond_the_bound_are_only_in_the_table(found: Report) -> None:
    html = page(found)
    broken, worst = (sum(map(len, re.findall(r"<video.*?</video>", it)))
                     for it in html.split("<details")[1:3])  # fmt: skip
    spare = 500  # packed again, a video may differ by some bytes; the next has thousands
    bounded = page(found, most_video_bytes=broken + worst + spare)
    assert bounded.count("<details") == 2 and "2 more are in the table below" in bounded
    assert "0.png" in bounded
    assert page(found, most_video_bytes=0).count("<video") == 0


def line(name: str, **scores: Any) -> Line:
    results = {key: it if not isinstance(it, int | float) else ok(it) for key, it in scores.items()}
    return Line(name, Clip(Path(name)), None, results)


def test_the_order_is_by_places_over_metrics() -> None:
    lines = [
        line("good", a=3.0, b=0.1),
        line("bad", a=1.0, b=0.9),
        line("broken", a=9.0, b=failed("broken")),
        line("fair", a=2.0, b=0.5),
        line("unknown", a=skipped("no prompt")),
    ]
    names = [it.name for it in worst_first(lines, {"b"})]
    assert names[:2] == ["broken", "bad"] and names[2] == "fair"
    assert worst_first([line("x", a=1.0), line("y", a=1.0)], ())[0].name == "x"


def test_videos_without_a_record_play_by_themselves(tmp_path: Path, film: Film) -> None:
    frames: Any = np.full((3, 16, 16, 3), 9, np.uint8)
    for name in ("a.mp4", "b.gif"):
        film(tmp_path / "made" / name, frames, "x", 0)
        (tmp_path / name).write_bytes((tmp_path / "made" / name).read_bytes())
        with (tmp_path / name).open("r+b") as file:  # without the record inside
            content = file.read().replace(b"kinora", b"xxxxxx")
            file.seek(0)
            file.write(content)
    *_, last = evaluate([tmp_path], suites=("flicker",))
    assert isinstance(last, Report) and all(it.clip.record is None for it in last.clips)
    html = page(last)
    assert " controls></video>" in html and "data:image/gif" in html


def test_the_page_of_vbench(film: Film, tmp_path: Path) -> None:
    frames: Any = np.full((3, 16, 16, 3), 9, np.uint8)
    clips = {
        f"a <cat>-{k}.mp4": Clip(film(tmp_path / f"{k}.mp4", frames, "a <cat>", k)) for k in (0, 1)
    }
    by_video = {"a <cat>-0.mp4": 0.9, "a <cat>-1.mp4": 0.2}
    results = {
        "temporal_flickering": ok(0.55, "a note", videos=2, expected=2, by_video=by_video),
        "dynamic_degree": ok(0.5, videos=2, expected=2,
                             by_video={"a <cat>-0.mp4": True, "a <cat>-1.mp4": False}),
        "scene": skipped("scene needs weights"),
    }  # fmt: skip
    report = VBenchReport(
        results, VBENCH.totals({}), dict.fromkeys(results, clips), (), (), 0, VBENCH,
        {"suite": "VBench", "version": "0.1.5", "mode": "standard"},
    )  # fmt: skip
    html = vbench_page(report)
    text = " ".join(text_of(html).split())
    assert "temporal_flickering 55.00 2 of 2 ok" in text and "scene – skipped" in text
    assert "total –" in text and "scene needs weights" in text and "note: a note" in text
    assert html.count("<video") == 2 and html.index("1.mp4") < html.index("0.mp4")
    assert "<cat>" not in html and "http" not in html


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_long_names_stay_in_their_place_and_no_prompt_is_run(
    film: Film, tmp_path: Path, chromium: Any, width: int
) -> None:
    name = "a-red-circle-moving-left-over-a-black-background-and-" * 3 + "s0.png"
    prompt = "</form></script><script>document.title = 'run'</script> \"'<img src=x onerror=run()>"
    frames: Any = np.full((4, 32, 32, 3), 90, np.uint8)
    for part in ("fast", "dense"):
        film(tmp_path / part / name, frames, prompt, 0)
    *_, found = evaluate([tmp_path / "fast"], reference=tmp_path / "dense", metrics=("psnr",))
    assert isinstance(found, Report)
    (tmp_path / "page.html").write_text(page(found), "utf-8")
    said: list[str] = []
    tab = chromium.new_page(viewport={"width": width, "height": 900})
    tab.on("console", lambda it: said.append(it.text))
    tab.on("pageerror", lambda it: said.append(str(it)))
    tab.goto((tmp_path / "page.html").as_uri())
    assert tab.title() == "Scores of 1 video"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    stage, canvas, figures = tab.evaluate(
        "['.k-stage', '.k-stage canvas', '.k-stage + div']"
        ".map(it => document.querySelector(it).getBoundingClientRect().toJSON())"
    )
    tab.close()
    assert not said
    assert canvas["right"] <= stage["right"]
    assert stage["right"] <= figures["left"] or stage["bottom"] <= figures["top"]
