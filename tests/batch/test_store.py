"""The folder of a batch: whose it is, what is done, a status that survives crashes, drafts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from placing import Place

from kinora.pipelines.batch.engines import find
from kinora.pipelines.batch.report import status
from kinora.pipelines.batch.run import shard_of
from kinora.pipelines.batch.schedule import Schedule
from kinora.pipelines.batch.store import Store
from kinora.pipelines.errors import KinoraError, OutputError, RequestError


def claimed(place: Place, *prompts: str) -> Store:
    """The folder of a batch that began and made nothing."""
    place.write(*prompts)
    batch = place.prepare()
    batch.store.claim(place.manifest, batch.table)
    return batch.store


def test_an_edited_manifest_keeps_its_folder(place: Place) -> None:
    place.write("a", "b")
    assert place.run().done == 2
    place.write("b", "c")
    summary = place.run()
    assert (summary.before, summary.done) == (1, 1)
    assert status(place.output).others == 1, "the video of a row that is gone"
    assert place.run(defaults={"steps": 4}).done == 2, "all rows changed, the file is the same"


def test_a_folder_of_another_manifest_is_refused(place: Place) -> None:
    claimed(place, "a", "b")
    before = (place.output / "rows.jsonl").read_bytes()
    place.manifest = place.root / "others.txt"
    place.write("c")
    with pytest.raises(OutputError, match=r"belongs to another manifest, .*prompts\.txt"):
        place.prepare()
    assert (place.output / "rows.jsonl").read_bytes() == before
    place.write("c", "b")
    assert len(place.prepare().pending) == 2, "moved, copied or longer: it has a row in common"


def test_a_folder_of_something_else_is_refused(place: Place) -> None:
    place.write("a")
    place.output.mkdir()
    (place.output / ".hidden").touch()
    place.prepare()
    (place.output / "holiday.mp4").touch()
    with pytest.raises(OutputError, match=r"files that are of no batch, such as holiday\.mp4"):
        place.prepare()
    (place.output / "rows.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="of no batch"):
        place.prepare()


def test_rows_that_were_cut_off_are_told_and_written_anew(place: Place) -> None:
    claimed(place, "a", "b")
    rows = place.output / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-20])
    with pytest.raises(OutputError, match=r"rows\.jsonl is damaged: .* writes it anew"):
        status(place.output)
    manifest, place.manifest = place.manifest, place.root / "others.txt"
    place.write("c")
    with pytest.raises(OutputError, match=r"rows\.jsonl is damaged"):
        place.prepare()
    place.manifest = manifest
    assert place.run().complete and status(place.output).done == 2


@pytest.mark.parametrize("path", ["prompts.txt", "prompts.txt/out"])
def test_a_file_is_no_folder(place: Place, path: str) -> None:
    place.write("a")
    place.output = place.root / path
    with pytest.raises(OutputError, match="Not a directory"):
        place.prepare()


def test_done_is_a_video_and_a_sidecar_that_are_not_empty(place: Place) -> None:
    store = claimed(place, "a", "b", "c", "d", "e")
    names = [row["name"] for row in store.rows()]
    for name, suffixes in zip(names, [".mp4 .json", ".mp4", ".json", ".mp4 .json",
                              ".latents.safetensors .json"], strict=True):  # fmt: skip
        for suffix in suffixes.split():
            (place.output / f"{name}{suffix}").write_text("" if name == names[3] else "content")
    assert place.prepare().pending == [1, 2, 3, 4]
    assert store.has(names[0], ".mp4") and not store.has(names[1], ".mp4")
    assert not store.has(names[3], ".mp4")
    assert place.run().done == 4 and place.prepare().pending == []


def test_a_torn_last_line_loses_nothing_else(place: Place) -> None:
    store = claimed(place, "a", "b")
    store.append({"id": "1", "status": "failed", "reason": "first"})
    with (place.output / "status.jsonl").open("a") as file:
        file.write('{"id": "2", "status": "fai')
    assert [line["id"] for line in store.statuses()] == ["1"]
    store.append({"id": "3", "status": "done"})
    assert [line["id"] for line in store.statuses()] == ["1", "3"]
    assert status(place.output).left == 2


def test_lines_of_many_processes_do_not_mix(place: Place) -> None:
    store = claimed(place, "a")
    code = (
        "import sys; from pathlib import Path; from kinora.pipelines.batch.store import Store\n"
        "for i in range(300): Store(Path(sys.argv[1])).append("
        "{'id': sys.argv[2], 'status': 'failed', 'reason': 'x' * i * 20})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(place.output), str(number)])
               for number in range(4)]  # fmt: skip
    assert [it.wait() for it in writers] == [0] * 4
    lines = list(store.statuses())
    assert len(lines) == len((place.output / "status.jsonl").read_bytes().splitlines()) == 1200


def test_a_full_disk_leaves_no_half_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = claimed(place, "a")
    store.append({"id": "1", "status": "done"})
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left"):
        store.append({"id": "2", "status": "done"})
    monkeypatch.undo()
    assert (place.output / "status.jsonl").read_text() == '{"id": "1", "status": "done"}\n'


def test_drafts_of_the_dead_are_swept_and_those_of_the_living_are_not(place: Place) -> None:
    store = claimed(place, "a")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from kinora.pipelines.batch.store import Store\n"
        "with Store(Path(sys.argv[1])).drafting() as drafts:\n"
        "    (drafts.own('w') / 'draft').touch(); print(drafts.folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(place.output)], text=True,
                          stdout=subprocess.PIPE) as other:  # fmt: skip
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with store.drafting() as mine:
            assert theirs.is_dir() and mine.folder.is_dir()
        assert theirs.is_dir() and not mine.folder.exists()
        other.kill()
    store.sweep()
    assert sorted(it.name for it in place.output.iterdir()) == ["rows.jsonl"]


def test_a_lock_that_was_swept_is_not_held(place: Place) -> None:
    store = claimed(place, "a")
    with store.drafting() as drafts:
        drafts.lock.unlink()
        with pytest.raises(FileNotFoundError):
            drafts.hold()


def test_the_status_of_a_folder(place: Place) -> None:
    place.write("a", "boom b", "c")
    place.manifest.write_text("a\nboom b\nc\na\n")
    place.run(retries=0, keep_going=True)
    found = status(place.output)
    assert (found.rows, found.done, found.failed, found.left, found.refused) == (3, 2, 1, 0, 1)
    assert [(it.line, it.reason[:12]) for it in found.failures] == [
        (4, "it asks for "), (2, "ZeroDivision")]  # fmt: skip
    json.dumps(found.to_json())
    for path in (place.root, place.root / "nothing", place.manifest):
        with pytest.raises(OutputError, match="is no folder of a batch"):
            status(path)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_shards_are_disjoint_and_together_all(place: Place, n: int) -> None:
    place.manifest = place.root / "rows.jsonl"
    sizes = ["32x32", "64x64", "48x48"]
    rows = [{"prompt": f"row {i}", "size": sizes[i % 3]} for i in range(20)]
    place.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = [place.prepare(shard=(i + 1, n)).pending for i in range(n)]
    assert sorted(it for shard in shards for it in shard) == list(range(20))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert shards == [place.prepare(shard=(i + 1, n)).pending for i in range(n)]


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "8", "a/b", "-1/8", "1/8/2", ""])
def test_shards_out_of_range(text: str) -> None:
    with pytest.raises(RequestError, match=r"--shard must be .*shards count from 1"):
        shard_of(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"engine": "locl"}, "did you mean local"),
        ({"engine": "slurm"}, "--engine must be local"),
        ({"shard": (3, 2)}, "1/2 to 2/2"),
        ({"retries": -1}, "--retries must be 0 to"),
        ({"workers": 0}, "--workers must be 1 to"),
    ],
)
def test_options_out_of_range(place: Place, options: dict[str, Any], told: str) -> None:
    place.write("a")
    with pytest.raises(KinoraError, match=told):
        place.prepare(**options)
    assert not place.output.exists()


def test_engines_are_found_by_name() -> None:
    assert hasattr(find("local"), "run")


def schedule(place: Place, models: str, retries: int = 1) -> Schedule:
    """Rows of these groups: a letter is a size, upper case one of another number of steps."""
    place.manifest = place.root / "rows.jsonl"
    sizes = {"a": "32x32", "b": "48x48", "c": "64x64"}
    place.manifest.write_text("".join(
        json.dumps({"prompt": f"row {i}", "size": sizes[it]}) + "\n"
        for i, it in enumerate(models)))  # fmt: skip
    batch = place.prepare()
    return Schedule(batch.table, batch.pending, retries)


def sizes_taken(schedule: Schedule, *workers: int) -> list[int]:
    taken = [schedule.take(worker) for worker in workers]
    return [turn.row.request.width for turn in taken if turn is not None]


def test_workers_stay_with_a_group_and_share_the_last(place: Place) -> None:
    found = schedule(place, "abcabcabc")
    assert sizes_taken(found, 0, 1, 2) == [64, 48, 32], "one each, of the most work first"
    assert sizes_taken(found, 0, 0, 1, 2) == [64, 64, 48, 32]
    assert sorted(sizes_taken(found, 0, 0)) == [32, 48], "then it helps the others"
    assert found.take(1) is None and found.left == 0


def test_a_failing_row_is_tried_a_bounded_number_of_times(place: Place) -> None:
    found = schedule(place, "a", retries=2)
    for number in (1, 2, 3):
        turn = found.take(0)
        assert turn is not None and turn.attempt == number
        assert found.failed(turn) is (number < 3)
    assert found.take(0) is None


def test_suspects_are_made_alone_and_it_costs_them_no_attempt(place: Place) -> None:
    found = schedule(place, "aaa", retries=0)
    first, second = found.take(0), found.take(0)
    assert first is not None and second is not None
    found.lost(first, suspected=True)
    found.lost(second, suspected=True)
    other = found.take(1, idle=False)
    assert other is not None and not other.alone, "a busy worker gets no suspect"
    again = [found.take(1), found.take(1)]
    assert [(it.index, it.attempt, it.alone) for it in again if it] == [(0, 1, True), (1, 1, True)]
