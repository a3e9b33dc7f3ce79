"""`kinora bench attention`: what it times, that it compares first, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from kinora.app.bench import attention, peers
from kinora.app.bench.attention import Wanted, rows
from kinora.app.bench.cases import PATTERNS, Case, Shape, by_means, first, random
from kinora.app.cli import main
from kinora.kernels.plan import Tile
from kinora.pipelines.errors import RequestError

SHAPE, TILE = Shape(2, 300, 16), Tile(64, 32)
SMALL = ("--shape", "2x300x16", "--tile", "64x32", "--density", "0.3", "--repeats", "1")


@pytest.mark.parametrize("pattern", ["random", "local"])
def test_patterns_keep_what_was_asked(pattern: str):
    case = PATTERNS[pattern](SHAPE, TILE, 0.3, "cpu", torch.float32)
    assert [x.shape for x in case.tensors] == [(1, 2, 300, 16)] * 3
    assert case.tensors[0].stride(2) > case.tensors[0].stride(1), "[B, L, H, D] in memory"
    case.plan.check()
    assert bool((case.plan.counts == 3).all())


def test_local_rows_keep_their_own_tile():
    plan = PATTERNS["local"](Shape(1, 512, 16), Tile(32, 32), 0.2, "cpu", torch.float32).plan
    assert bool(plan.mask()[0, 0].diagonal().all())


def test_means_find_the_keys_that_are_alike():
    q = torch.eye(4).repeat_interleave(32, 0)[None, None] * 5
    plan = by_means(q, q, Tile(32, 32), 0.25)
    assert plan.indices[0, 0, :, 0].tolist() == [0, 1, 2, 3]


def test_what_is_compared_is_small_and_leaves_tiles_out():
    case = first(random(SHAPE, TILE, 0.3, "cpu", torch.float32), 200)
    case.plan.check()
    assert case.tensors[0].shape == (1, 2, 200, 16)
    assert 0.3 < float(case.plan.density().max()) < 0.8


def test_kernels_that_read_a_list_for_each_head_get_one():
    case = PATTERNS["local"](SHAPE, TILE, 0.3, "cpu", torch.float32)
    assert case.plan.indices.shape[1] == 1
    indices, counts = peers.of_each_head(case.plan, case.tensors[0])
    assert indices.shape[:2] == counts.shape[:2] == (1, SHAPE.heads)
    assert indices.is_contiguous() and bool((indices == case.plan.indices).all())


def test_a_kernel_that_breaks_the_device_ends_the_table(monkeypatch: pytest.MonkeyPatch):
    def broken() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    still_there = attention._still_there  # pyright: ignore[reportPrivateUsage]
    still_there("cpu", "a mistake", "cpu")
    with pytest.raises(RequestError, match=r"fastvideo broke the device \(an address\).*--peer"):
        still_there("fastvideo", "an address", "cuda")


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "rows.jsonl"
    given = (*SMALL, "--tail", "none", "--tail", "complement", "--peer", "sage", "--peer", "flash4",
             "--peer", "sdpa")  # fmt: skip
    assert main(["bench", "attention", *given, "--json", str(file)]) == 0
    heading, *told = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["shape", "kernel", "tile"]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(told) == len(found)
    dense, chosen, sage, *others = found
    assert dense["name"] == "sdpa-flash" and dense["density"] == 1
    assert max(dense["e"], chosen["e"]) == 1
    assert chosen["name"] == "sdpa" and chosen["e"] == dense["dense_ms"] / chosen["ms"] <= 1
    assert sage["refused"] == "it is for CUDA devices"
    own = [row for row in others if row["name"] == "cpu"]
    assert [row["tail"] for row in own] == ["none", "complement"]
    for row in own:
        assert row["ms"] > 0 and row["plan_ms"] > 0 and row["error"] < 1e-5
        assert row["e"] == pytest.approx(row["density"] * row["dense_ms"] / row["ms"])
        assert row["machine"]["torch"] == torch.__version__
    assert [row["refused"] for row in others if row["name"] == "flash4"]
    for line, row in zip(told, found, strict=True):
        for name, key in (("ms", "ms"), ("E", "e"), ("plan ms", "plan_ms")):
            end = heading.index(f" {name}") + 1 + len(name)
            assert key not in row or line[:end].endswith(f" {row[key]:.3f}")


def test_without_a_part_it_says_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert main(["bench"]) == 0
    told = capsys.readouterr()
    assert "Usage: kinora bench" in told.out and "attention" in told.out and not told.err
    assert "`kinora bench attention --help`" in told.out


def test_no_time_where_it_errs(monkeypatch: pytest.MonkeyPatch):
    def wrong(case: Case) -> peers.Call:
        return lambda: case.tensors[2] * 1.5

    def broken(case: Case) -> peers.Call:
        raise RuntimeError("no such device\nand more")

    monkeypatch.setitem(peers.PEERS, "flex", peers.Peer(wrong))
    monkeypatch.setitem(peers.PEERS, "fastvideo", peers.Peer(broken))
    wanted = Wanted([SHAPE], [TILE], [0.3], peers=["flex", "fastvideo"], repeats=1)
    found = {row.name: row for row in rows(wanted)}
    assert found["flex"].refused.startswith("it errs by") and found["flex"].ms is None
    assert found["fastvideo"].refused == "no such device"


def test_no_number_stays_out_of_json(monkeypatch: pytest.MonkeyPatch):
    def nothing(case: Case) -> peers.Call:
        return lambda: case.tensors[2] * torch.nan

    monkeypatch.setitem(peers.PEERS, "flex", peers.Peer(nothing))
    *_, row = rows(Wanted([SHAPE], [TILE], [0.3], peers=["flex"], repeats=1))
    assert row.refused == "it errs by nan"
    assert "error" not in json.loads(json.dumps(row.to_json(), allow_nan=False))


def test_a_slower_dense_kernel_is_told_by_how_much(monkeypatch: pytest.MonkeyPatch):
    right = peers.PEERS["sdpa-flash"].prepare

    def slow(case: Case) -> peers.Call:
        call = right(case)

        def twice() -> torch.Tensor:
            time.sleep(0.05)
            return call()

        return twice

    monkeypatch.setitem(peers.PEERS, "sage", peers.Peer(slow, dense=True))
    fast, slower = rows(Wanted([SHAPE], [TILE], [], peers=["sage"], repeats=1))
    assert fast.ms and slower.ms and fast.e == 1
    assert slower.dense_ms == fast.ms and slower.e == pytest.approx(fast.ms / slower.ms)
    assert fast.ms < slower.ms


def test_a_precision_that_a_backend_lacks_is_told(capsys: pytest.CaptureFixture[str]):
    for precision in ("int8.fp8", "input.int8"):
        given = (*SMALL, "--peer", "sage", "--precision", precision)
        assert main(["bench", "attention", *given]) == 0
        told = capsys.readouterr().out
        assert "no time: it rounds no weights, as " in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--shape", "2x300"), "--shape: '2x300'; 3 whole numbers with x between them"),
        (("--tile", "0x64"), "--tile: '0x64'; 2 whole numbers"),
        (("--tail", "long"), "--tail: 'long'; there are none, complement"),
        (("--pattern", "locl"), "'locl', did you mean local?"),
        (("--backend", "cuda"), "--backend: 'cuda'; there are cpu, hopper, triton, reference"),
        (("--peer", "flx"), "'flx', did you mean flex?"),
        (("--precision", ""), "--precision: ''; qk ''; it can be input, int8, int4"),
        (("--precision", "int8.int3"), "pv 'int3'; it can be input, int8, int4, fp8"),
        (("--precision", "int3.input"), "qk 'int3'; it can be input, int8, int4"),
        (("--density", "1.5"), "--density"),
        (("--repeats", "0"), "--repeats"),
        (("--json", "/nowhere/rows.jsonl"), "--json: '/nowhere/rows.jsonl'; No such file"),
    ],
)
def test_bad_input(given: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "attention", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and line.endswith("`kinora bench attention --help` tells more")
