"""`kinora eval`: from videos of kinora-tiny to a table, its exit status, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.app.cli import main

Cli = Callable[..., Any]
SMALL = ("--size", "64x64", "--frames", "5", "--keep-latents", "--num-videos", "2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos by the stock pipeline, without loss, and the same two in more steps."""
    root = tmp_path_factory.mktemp("videos")
    for folder, steps in (("dense", "2"), ("fast", "3")):
        given = ("generate", "a red circle over a black background", *SMALL, "--steps", steps)
        assert main([*given, "--format", "png", "-o", f"{root / folder}/"]) == 0
    return root


@pytest.fixture
def made(videos: Path, cli: Cli) -> None:
    """Those videos in the working folder."""
    shutil.copytree(videos, ".", dirs_exist_ok=True)


def test_videos_are_scored_against_dense_ones_and_known_the_next_time(made: None, cli: Cli):
    first = cli("eval", "fast", "--reference", "dense")
    assert first.status == 0, first.err
    rows = {line.split()[0]: line.split() for line in first.out.splitlines() if line.strip()}
    assert rows["psnr"][-4:] == ["2", "of", "2", "ok"] and rows["latent_cosine"][-1] == "ok"
    assert 0 < float(rows["ssim"][1]) < 1 and "lossy" not in first.out
    assert "scored 2/2" in first.err and "known" not in first.err
    second = cli("eval", "score", "fast", "--reference", "dense", "--json")
    assert "known 2/2" in second.err and "scored" not in second.err
    totals = second.last["totals"]
    assert f"{totals['ssim']['mean']:.4f}" == rows["ssim"][1]
    (one, _) = second.last["clips"]
    assert one["steps"] == 3 and one["seed"] == 0 and one["recipe"] == {}
    again = cli("eval", "fast", "--reference", "dense", "--again")
    assert again.out == first.out and "scored 2/2" in again.err
    same = cli("eval", "dense", "--reference", "dense", "-m", "psnr,latent_relative_l1", "--json")
    assert [it["mean"] for it in same.last["totals"].values()] == [100.0, 0.0]


def test_what_the_videos_show_is_judged_by_their_sidecars(made: None, cli: Cli):
    called = cli("eval", "dense", "--suite", "world", "--json")
    assert called.status == 0, called.err
    totals = called.last["totals"]
    assert totals["world.all_correct"]["n"] == 2 and totals["world.multiple_objects"]["asked"] == 0


def test_one_broken_video_is_told_and_the_rest_is_scored(made: None, cli: Cli):
    Path("fast/broken.mp4").write_bytes(b"no video")
    called = cli("eval", "fast", "--reference", "dense", "-m", "psnr")
    assert called.status == 1
    assert "has no reference for fast/broken.mp4" in called.complaint
    row = next(line for line in called.out.splitlines() if line.startswith("psnr "))
    assert row.split()[1:] == ["–", "2", "of", "3", "partial"]
    assert "the mean of the 2 is" in called.out


def test_metrics_by_networks_without_weights_are_skipped(
    made: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    Path("nothing").mkdir()
    asked = ("eval", "fast", "--reference", "dense", "--suite", "learned", "--clip", "nothing")
    called = cli(*asked, "-m", "psnr")
    assert called.status == 0, called.err
    rows = {line.split()[0]: line.split() for line in called.out.splitlines() if line.strip()}
    assert [rows[it][-1] for it in ("psnr", "lpips", "clip_score", "fid", "fvd")] == [
        "ok", *["skipped"] * 4
    ]  # fmt: skip
    assert called.out.count("curl -fL") == 3 and "hf download nothing" in called.out


def test_a_report_is_one_page(made: None, cli: Cli):
    called = cli("eval", "fast", "--reference", "dense", "--html", "report.html", "--json")
    assert called.status == 0, called.err
    html = Path("report.html").read_text("utf-8")
    mean = called.last["totals"]["psnr"]["mean"]
    assert html.count("<video") == 4 and f"{mean:.4f}" in html
    assert cli("eval", "dense", "--html", "report.html").status == 0
    assert "world.all_correct" in Path("report.html").read_text("utf-8")


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_names_and_prompts_that_are_no_unicode_are_in_the_report(made: None, cli: Cli):
    name = next(Path("dense").glob("*-s0.png"))
    odd = os.fsdecode(b"dense/b\xffd.png")
    name.rename(odd)
    Path("prompts.json").write_text(json.dumps({Path(odd).name: "a red circle \ud800"}))
    given = ("--prompts", "prompts.json", "--html", "report.html", "--json")
    called = cli("eval", "dense", "--suite", "flicker", *given)
    assert called.status == 0 and [it["path"] for it in called.last["clips"]].count(odd) == 1
    assert "b?d.png" in Path("report.html").read_text("utf-8")


def test_a_report_that_cannot_be_written_is_told_before_or_loses_nothing(
    made: None, cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    Path("away.html").symlink_to("gone/away.html")
    called = cli("eval", "dense", "--html", "away.html", "--json")
    assert called.status == 1 and len(called.last["clips"]) == 2
    assert "away.html cannot be written (No such file" in called.complaint
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(Path.cwd()))
    called = cli("eval", "dense", "--html", "report.html")
    assert called.status == 2 and "scored" not in called.err and not called.out
    assert "report.html cannot be written (Permission denied): name" in called.complaint


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("empty",), "empty holds no video"),
        (("notes.txt",), "notes.txt is no video"),
        (("gone.mp4",), "there is no video or folder gone.mp4"),
        (("a.mp4", "-m", "pnsr"), "did you mean psnr?"),
        (("a.mp4", "--suite", "fidelity"), "give --reference DIR"),
        (("a.mp4", "--reference", "gone"), "gone is no folder"),
        (("a.mp4", "--reference", "empty"), "empty holds no video"),
        (("a.mp4", "--prompts", "other.json"), "none for 'a.mp4'"),
        (("a.mp4", "--workers", "-1"), "--workers must be 0 or more"),
        (("a.mp4", "--cache", "empty"), "cannot keep scores"),
        (("a.mp4", "-m", "fid"), "fid compares with a reference"),
        (("a.mp4", "-m", "fid", "--reference", ".", "--metrics-python", "no"), "no interpreter"),
        (("a.mp4", "--html", "a.mp4"), "--html a.mp4 is no name for a page: end it with .html"),
        (("a.mp4", "--html", "gone/a.html"), "there is no folder"),
        (("a.mp4", "--html", "page.html"), "page.html is a folder"),
        (("a.mp4", "--html", "x" * 300 + ".html"), "cannot be written (File name too long)"),
        ((), "Missing argument"),
    ],
)
def test_what_is_refused(cli: Cli, arguments: tuple[str, ...], told: str):
    Path("empty").mkdir()
    Path("page.html").mkdir()
    Path("notes.txt").write_text("hello")
    Path("a.mp4").write_bytes(b"no video")
    Path("other.json").write_text(json.dumps({"b.mp4": "a red ring"}))
    called = cli("eval", "score", *arguments)
    assert called.status == 2 and told in called.complaint, called.err


def test_a_bare_call_shows_the_help(cli: Cli):
    called = cli("eval")
    assert called.status == 0 and "Usage: kinora eval" in called.out and "prompts" in called.out


def test_nothing_but_a_broken_video_is_a_failure(cli: Cli):
    Path("a.mp4").write_bytes(b"")
    called = cli("eval", "a.mp4", "--suite", "flicker", "--json")
    assert called.status == 1 and called.last["status"] == "failed"
    assert "a.mp4 cannot be read as a video" in called.complaint
