"""Evaluations asked for on the page: their process, what is compared, what is shown, by id only."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

import gradio as gr
from fastapi import FastAPI
from fastapi.testclient import TestClient
from filming import BALANCED, HOSTILE, WORLDLY, film

from kinora.app.ui import api, evaluate, scores
from kinora.app.ui.evaluate import Evaluate, Reports
from kinora.app.ui.gallery import Gallery
from kinora.app.ui.scoring import Scoring, ScoringError

ASKER: Any = SimpleNamespace(session_hash="me")


pytestmark = pytest.mark.usefixtures("closed_loops")


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No score of another test is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two dense videos and a balanced one, of two seeds."""
    made = tmp_path / "made"
    film(made, "dense-0", seed=0)
    film(made, "dense-1", seed=1)
    film(made / "other", "fast-0", seed=0, recipe=BALANCED, level=30)
    return made


def tab(folder: Path) -> Evaluate:
    """The tab alone."""
    page: Any = SimpleNamespace(told=str)
    with gr.Blocks(analytics_enabled=False), gr.Tabs():
        return Evaluate(page, Gallery(folder), Reports())


def ids(folder: Path) -> dict[str, str]:
    """Names of the videos there → their ids."""
    return {it.path.stem: it.id for it in Gallery(folder).items()}


def ask(it: Evaluate, chosen: object, suite: str = "world", reference: str = "dense") -> list[Any]:
    """Every update of an evaluation: its status, and the result where there is one."""

    async def run() -> list[Any]:
        given = chosen if isinstance(chosen, str) else json.dumps(chosen)
        return [update async for update in it.evaluate(given, suite, reference, ASKER)]

    named = {it._status: "status", it._result: "result"}  # pyright: ignore[reportPrivateUsage]
    return [
        {named[key]: value for key, value in update.items() if key in named}
        for update in asyncio.run(run())
    ]


def drain(scoring: Scoring) -> list[dict[str, Any]]:
    """All that a process tells."""
    found = [scoring.told()]
    while not {"report", "error"} & set(found[-1]):
        found.append(scoring.told())
    return found


def test_the_judge_scores_what_is_chosen_in_another_process(folder: Path) -> None:
    *doing, last = ask(tab(folder), [ids(folder)["dense-0"], ids(folder)["dense-1"]])
    assert any("scoring dense-" in it["status"] and 'max="2"' in it["status"] for it in doing)
    html = last["result"]
    assert "<th>all correct<small>" in html and "everything that is asked holds" in html
    assert "2 of 2" in html and 'data-state="ok"' in html and 'data-state="skipped"' in html
    assert f"{WORLDLY} · seed 0 · dense" in html


def test_nearness_is_to_the_video_of_the_same_prompt_and_seed(folder: Path) -> None:
    it = tab(folder)
    *_, last = ask(it, [ids(folder)["fast-0"]], "fidelity")
    row = re.search(r"<tr><th>psnr.*?</tr>", last["result"])
    assert row and "1 of 1" in row[0] and 'data-state="ok"' in row[0]
    assert "latent cosine" in last["result"] and "skipped" in last["result"]
    *_, last = ask(it, [ids(folder)["dense-1"]], "fidelity", "blade, changed")
    assert "has no reference for dense-1.mp4" in last["result"]
    assert 'data-state="failed"' in last["result"]


def test_a_report_is_fetched_by_its_id_and_names_no_folder(folder: Path) -> None:
    it = tab(folder)
    *_, last = ask(it, [ids(folder)["fast-0"]], "fidelity")
    app = FastAPI()
    evaluate.add(app, it._reports)  # pyright: ignore[reportPrivateUsage]
    app.add_exception_handler(api.HTTPException, api._missing)  # pyright: ignore
    (link,) = re.findall(r'href="(/evaluations/[0-9a-f]{16})"', last["result"])
    with TestClient(app) as client:
        answer = client.get(link)
        report = answer.json()
        assert answer.headers["content-disposition"].startswith("attachment")
        assert [one["path"] for one in report["clips"]] == ["other/fast-0.mp4"]
        assert report["clips"][0]["reference"] == "dense-0.mp4"
        assert str(folder) not in answer.text
        for name in ("0" * 16, "..%2f..%2fetc%2fpasswd", "x" * 5000):
            assert client.get(f"/evaluations/{name}").status_code == 404


@pytest.mark.parametrize(
    ("chosen", "suite", "complaint"),
    [
        ([], "world", "no video is chosen"),
        ("", "world", "no video is chosen"),
        ("{", "world", "must be a list of ids"),
        ("[" * 100_000, "world", "must be a list of ids"),
        ({"a": 1}, "world", "must be a list of ids"),
        ([1], "world", "must be a list of ids"),
        (["../../etc/passwd"], "world", "there is no video &#x27;../../etc/passwd&#x27; any more"),
        (["/etc/passwd"], "fidelity", "there is no video"),
        (["<b>x</b>"], "world", "&lt;b&gt;x&lt;/b&gt;"),
        ([f"{k:x}" for k in range(501)], "world", "501 videos are chosen, 500 are the most"),
    ],
)
def test_what_is_no_choice_is_refused_in_a_line(
    folder: Path, chosen: object, suite: str, complaint: str
) -> None:
    *_, last = ask(tab(folder), chosen, suite)
    assert complaint in last["status"] and 'data-phase="failed"' in last["status"]


def test_a_suite_that_is_none_is_refused(folder: Path) -> None:
    *_, last = ask(tab(folder), [ids(folder)["dense-0"]], "<i>")
    assert "there is no suite" in last["status"] and "<i>" not in last["status"]


def test_a_broken_video_is_a_result_of_its_own(folder: Path) -> None:
    film(folder, "broken", content=b"\x00\x00\x00\x18ftypmp42 and nothing more", prompt=HOSTILE)
    *_, last = ask(tab(folder), list(ids(folder).values()))
    assert (
        'data-state="partial"' in last["result"] and "cannot be read as a video" in last["result"]
    )
    assert "<b>bold" not in last["result"] and "<img" not in last["result"]
    assert str(folder) not in last["result"]


def test_vbench_says_why_it_cannot_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINORA_VBENCH_PYTHON", "/no/python")
    *_, last = ask(tab(folder), [ids(folder)["dense-0"]], "vbench")
    assert "/no/python is no interpreter" in last["status"]


def test_a_process_that_is_killed_is_told_and_the_next_works(folder: Path) -> None:
    videos = [folder / "dense-0.mp4"]
    scoring = Scoring("world", videos, [], folder)
    os.kill(scoring._process.pid, signal.SIGKILL)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ScoringError, match="ended by SIGKILL, as by a system that is out of memo"):
        drain(scoring)
    scoring.close()
    again = Scoring("world", videos, [], folder)
    assert drain(again)[-1]["report"]["status"] == "ok"
    again.close()


def test_it_ends_when_it_is_cancelled_or_its_page_is_gone(folder: Path) -> None:
    for end in ("end", "close", "eof"):
        scoring = Scoring("world", [folder / "dense-0.mp4"], [], folder)
        process = scoring._process  # pyright: ignore[reportPrivateUsage]
        if end == "eof":
            assert process.stdin is not None
            process.stdin.close()
        else:
            getattr(scoring, end)()
        assert process.wait(20) in (130, -signal.SIGINT), end
        scoring.close()


def test_cancel_stops_it_and_says_so(folder: Path) -> None:
    it = tab(folder)
    stopping = threading.Timer(0.1, it.cancel, [ASKER])
    stopping.start()
    *_, last = ask(it, list(ids(folder).values()))
    assert "Cancelled" in last["status"] and 'data-phase="cancelled"' in last["status"]
    *_, last = ask(it, [ids(folder)["dense-0"]])
    assert "1 of 1" in last["result"]


def test_pictures_to_tick_hold_ids_and_escaped_prompts(folder: Path) -> None:
    film(folder, "hostile", prompt=HOSTILE)
    html = evaluate.choices(Gallery(folder).items(), "", "")
    assert set(re.findall('value="([0-9a-f]{16})"', html)) == set(ids(folder).values())
    assert "<b>bold" not in html and "<img src=x" not in html and str(folder) not in html
    assert evaluate.choices(Gallery(folder).items(), "another", "").count("<input") == 0


def test_a_report_by_vbench_is_a_table_of_dimensions() -> None:
    results = {
        "color": {"status": "skipped", "score": None, "reason": "color <asks> its own prompts"},
        "imaging_quality": {"status": "ok", "score": 0.5123},
        "scene": {"status": "failed", "score": None, "reason": "it crashed"},
    }
    totals = {"total": None, "quality": None, "why": "two are missing"}
    html = scores.shown({"dimensions": results, "totals": totals, "rejected": []}, {})
    assert "imaging quality</th><td>51.23" in html and "No total: two are missing" in html
    assert "color &lt;asks&gt; its own prompts" in html and 'data-state="failed"' in html


def test_a_mean_of_some_is_not_shown_as_the_mean() -> None:
    names = ("psnr", "ssim", "ms_ssim", "relative_l1", "cosine", "latent_cosine")
    part: dict[str, Any] = {"status": "partial", "n": 2, "asked": 3, "mean": None, "low": None}
    part |= {"high": None, "partial_mean": 0.25, "reason": "one is <gone>", "notes": []}
    known = {name: {"version": 1, "what": "x"} for name in (*names, "other")}
    totals = {**dict.fromkeys(names, part), "other": {**part, "reason": "another"}}
    report = {"provenance": {"metrics": known}, "totals": totals, "clips": [], "rejected": []}
    html = scores.shown(report, {})
    assert "<td>–</td><td>0.25 of those 2</td><td>2 of 3</td>" in html
    assert "<b>psnr, ssim, ms ssim, relative l1 and 2 more</b>: one is &lt;gone&gt;" in html
