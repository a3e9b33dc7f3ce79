"""`kinora compare`: makes, compares and reports; goes on where it was; what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kinora.app.compare import chosen, rounds
from kinora.pipelines.batch import Batch
from kinora.pipelines.batch.report import Failure, Summary

Cli = Callable[..., Any]
SMALL = ("--size", "64x64", "--frames", "5", "--steps", "12")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture(autouse=True)
def files(cli: Cli) -> None:
    """Prompts, and a recipe that skips steps, in the working folder."""
    Path("prompts.txt").write_text("a red circle over a black background\n")
    Path("skipping.toml").write_text('[steps]\npolicy = "pattern"\npattern = "sC"')


@pytest.mark.long
def test_it_makes_compares_and_goes_on_where_it_was(cli: Cli):
    asked = ("compare", "--recipes", "skipping.toml", "--prompts", "prompts.txt", "-o", "out")
    first = cli(*asked, "--seeds", "0", *SMALL)
    assert first.status in (0, 1), first.err
    assert "dense: 0 of 1 videos are there" in first.err
    row = next(line for line in first.out.splitlines() if line.startswith("skipping"))
    assert "/12" in row and "×" in row and "out/report.html" in first.out
    second = cli(*asked, "--seeds", "0-1", *SMALL, "--json")
    assert "dense: 1 of 2 videos are there" in second.err
    told = second.last
    assert told["provenance"]["seeds"] == [0, 1] and told["provenance"]["forms"] == ["png"]
    (recipe,) = told["recipes"]
    assert recipe["cost"]["runs"] == 2 and recipe["cost"]["evaluations"] < 12
    assert recipe["fidelity"]["psnr"]["n"] == 2 and not recipe["refused"]
    assert json.loads(Path("out/report.json").read_text())["cases"] == told["cases"]
    third = cli(*asked, "--seeds", "1", *SMALL, "--json")
    assert "skipping: 1 of 1 videos are there" in third.err
    assert third.last["provenance"]["seeds"] == [1], "other videos in the folder are not meant"


def test_recipes_take_turns_and_the_order_turns_too(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple[str, list[int]]] = []

    def run(batch: Batch) -> Iterator[Summary]:
        name = batch.store.path.name
        ran.append((name, batch.pending))
        lost = int(name == "skipping" and 3 in batch.pending)
        yield Summary(batch.rows, batch.before, 0, done=len(batch.pending) - lost, failed=lost,
                      failures=[Failure(1, "torn", "x")] * lost)  # fmt: skip

    monkeypatch.setattr("kinora.pipelines.batch.run", run)
    asked = ("compare", "--recipes", "skipping.toml", "--prompts", "prompts.txt", "-o", "out")
    called = cli(*asked, "--seeds", "0-7", *SMALL)
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    names = ["dense", "skipping", "skipping", "dense"] * 2
    assert ran == [(name, pairs[k // 2]) for k, name in enumerate(names)]
    assert "kinora: skipping: 1 of 8 videos were not made; line 1, x: torn" in called.err
    assert called.status == 2 and "dense has no videos" in called.err


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 100])
def test_rounds_hold_every_row_once_and_two_at_least(count: int):
    found = rounds(count)
    assert [it for part in found for it in part] == list(range(count))
    assert all(len(it) >= min(2, count) for it in found) and len(found) <= 4
    assert len(found) == 4 or count < 8


def test_dense_runs_are_made_by_each_kernel():
    assert list(chosen(["balanced", "fast"])) == ["dense", "dense-fastest", "balanced", "fast"]
    assert chosen(["balanced"])["dense-fastest"] == {"dense_kernel": "fastest"}
    assert list(chosen(["dense", "exact", "fast"])) == ["dense", "exact", "fast"]
    assert list(chosen(["skipping.toml"])) == ["dense", "skipping"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--recipes", "dense"), "--recipes must name one beside dense"),
        (("--recipes", "blanced"), "did you mean balanced?"),
        (("--recipes", "fast,fast"), "cannot be called 'fast' here"),
        (("--recipes", "fast", "--prompts", "gone.txt"), "there is no manifest gone.txt"),
        (("--recipes", "fast", "--seeds", "4-0"), "--seeds must be such as"),
        (("--recipes", "fast", "--format", "avi"), "--format must be"),
        (("--recipes", "fast", "--prompts", "own.jsonl"), "line 1: it sets a recipe"),
        (("--recipes", "fast", "--prompts", "twice.jsonl"), "line 1 has its prompt and seed too"),
        (("--recipes", "skipping.toml", "--steps", "4"), "skipping: prompts.txt, line 1: step pol"),
        (("--recipes", "fast", "-o", "used"), "holds files that are of no batch"),
        ((), "Missing option '--recipes'"),
    ],
)
def test_what_is_refused(cli: Cli, arguments: tuple[str, ...], told: str):
    Path("own.jsonl").write_text('{"prompt": "a red circle", "recipe": "fast"}\n')
    rows = [{"prompt": "a red circle", "guidance": it} for it in (1.0, 2.0)]
    Path("twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("used/dense").mkdir(parents=True)
    Path("used/dense/notes.txt").write_text("hello")
    given = {"--prompts": "prompts.txt", "-o": "out"}
    rest = [it for pair in given.items() if pair[0] not in arguments for it in pair]
    called = cli("compare", *arguments, *rest)
    assert called.status == 2 and told in called.complaint, called.err
    assert not Path("out").exists()
