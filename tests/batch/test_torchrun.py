"""Ranks of torchrun share the rows of one folder, and say together how it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from placing import Place

from kinora.pipelines.batch.report import status
from kinora.pipelines.errors import RequestError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_ranks_make_all_rows_once(wan_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "rows.jsonl"
    rows: list[dict[str, object]] = [
        {"prompt": f"a {it} circle"} for it in ("red", "blue", "black")
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*TORCHRUN, "-m", "kinora.app", "batch", str(manifest), "--engine", "torchrun",
               "--model", str(wan_folder), "--size", "32x32", "--frames", "5", "--steps", "2",
               "--device", "cpu", "--output", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "out").done == 3
    counts = sorted(it for it in done.stdout.splitlines() if " rows: " in it)
    assert counts == ["1 rows: 1 done", "2 rows: 2 done"]
    # One rank's failure is that of both, told when both have made what they can.
    manifest.write_text(
        manifest.read_text() + '{"prompt": "a", "recipe": "balanced", "strict": true}'
    )
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    assert status(tmp_path / "out").failed == 1


def test_parts_of_ranks_within_parts_of_an_array(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write(*(f"row {i}" for i in range(10)))
    found: list[int] = []
    for shard in (1, 2):
        for rank in range(3):
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
                monkeypatch.setenv(name, str(value))
            batch = place.prepare(engine="torchrun", shard=(shard, 2))
            assert batch.options.workers == 1
            found += batch.pending
    assert sorted(found) == list(range(10))
    with pytest.raises(RequestError, match="each rank is one worker"):
        place.prepare(engine="torchrun", workers=2)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(RequestError, match="finds no WORLD_SIZE in the environment"):
        place.prepare(engine="torchrun")
