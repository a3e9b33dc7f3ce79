"""Manifests of four formats say the same, and each kind of malformed row is refused by its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines.batch import manifest, rows, table
from kinora.pipelines.batch.manifest import Entry, Refused
from kinora.pipelines.batch.rows import Reader, Row
from kinora.pipelines.errors import KinoraError, ManifestError

Write = Callable[..., Path]
ROWS = [
    {"prompt": "a red circle", "steps": 4, "guidance": 2.5, "strict": True},
    {"prompt": "a, \"blue\"\nsquare", "size": "128x96", "settings": ["attention.keep=0.3"],
     "recipe": "balanced"},
    {"prompt": "ein grünes Kreuz", "seed": 7, "recipe": {}, "keep_latents": False},
]  # fmt: skip


def read(path: Path, **defaults: Any) -> table.Table:
    return table.build(path, defaults, ())


def all_rows(found: table.Table) -> list[Row]:
    return [found.row(i) for i in range(len(found))]


def as_csv(rows: list[dict[str, Any]]) -> str:
    import csv
    import io

    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow(["; ".join(it) if isinstance(it, list) else json.dumps(it)
                         if isinstance(it, dict) else it for it in cells])  # fmt: skip
    return text.getvalue()


def test_three_formats_say_the_same(write: Write) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    expected = all_rows(read(write("a.jsonl", lines)))
    assert [row.line for row in expected] == [1, 2, 3]
    assert (
        expected[1].request.width == 128 and expected[1].request.recipe["attention"]["keep"] == 0.3
    )
    from_csv = all_rows(read(write("a.csv", as_csv(ROWS))))
    assert [row.id for row in from_csv] == [row.id for row in expected]
    assert [row.line for row in from_csv] == [2, 3, 5], "the second row spans two lines"
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    plain = [row for row in ROWS if row.get("recipe") != {}]  # Parquet has no empty table
    path = write("a.parquet", b"")
    empty = {name: None for row in ROWS for name in row}
    parquet.write_table(pyarrow.Table.from_pylist([{**empty, **row} for row in plain]), path)
    assert [row.id for row in all_rows(read(path))] == [row.id for row in expected[:2]]


def test_a_prompt_list_is_a_prompt_a_line(write: Write) -> None:
    found = read(write("a.txt", "\ufeffa red circle\r\n\n  a # b  \n"), steps=5)
    assert [(row.line, row.request.prompt) for row in all_rows(found)] == [
        (1, "a red circle"),
        (3, "a # b"),
    ]
    assert {row.request.steps for row in all_rows(found)} == {5}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a"', "it is no JSON (Expecting ',' delimiter: character 15)"),
        ("[1]", "it is no JSON object but [1]"),
        ("[" * 100_000, "it is no JSON"),
        ("{}", "prompt is missing"),
        ('{"prompt": ""}', "the prompt is empty"),
        ('{"prompt": 3}', "prompt must be text, not 3"),
        ('{"prompt": "a", "step": 3}', "'step' is no field of a row: did you mean steps?"),
        ('{"prompt": "a", "zzz": 3}', "a row can set prompt, negative_prompt, model"),
        ('{"prompt": "a", "steps": 0}', "steps must be 1 to 1000, not 0"),
        ('{"prompt": "a", "steps": true}', "steps must be a whole number"),
        ('{"prompt": "a", "steps": 2.5}', "steps must be a whole number"),
        ('{"prompt": "a", "guidance": NaN}', "guidance must be a finite number"),
        ('{"prompt": "a", "size": "64"}', "size must be WIDTHxHEIGHT"),
        ('{"prompt": "a", "size": "64x64", "width": 64}', "leave one out"),
        ('{"prompt": "a", "width": 63}', "the nearest is --size"),
        ('{"prompt": "a", "output": "b"}', "output cannot be set by a row"),
        ('{"prompt": "a", "device": "cpu"}', "device cannot be set by a row"),
        ('{"prompt": "a", "num_videos": 100000}', "num_videos must be 1 to 1000"),
        ('{"prompt": "a", "seed": -1}', "seed must be 0 to"),
        ('{"prompt": "a", "model": "kinora-tinny"}', "did you mean kinora-tiny"),
        ('{"prompt": "a", "recipe": "balancd"}', "balanced"),
        ('{"prompt": "a", "recipe": 3}', "recipe must be a name or a table, not 3"),
        ('{"prompt": "a", "settings": ["x=1"]}', "x"),
        ('{"prompt": "a", "settings": "x=1"}', 'settings must be a list, not "x=1"'),
        ('{"prompt": "a", "format": "avi"}', "format must be"),
        ('{"prompt": "a\\udcff"}', "no UTF-8"),
        (b'{"prompt": "\xff"}', "it is no UTF-8 text"),
        ('{"prompt": "%s"}' % ("a" * 2**20), "longer than"),
    ],
)  # fmt: skip
def test_malformed_rows_are_refused_with_their_line(
    write: Write, line: str | bytes, told: str
) -> None:
    raw = line.encode() if isinstance(line, str) else line
    found = read(write("a.jsonl", b'{"prompt": "first"}\n\n' + raw + b'\n{"prompt": "last"}\n'))
    assert [row.request.prompt for row in all_rows(found)] == ["first", "last"]
    assert [it.line for it in found.refused] == [3]
    assert told in found.refused[0].why and "\n" not in found.refused[0].why


def test_csv_rows_are_refused_with_their_line(write: Write) -> None:
    found = read(write("a.csv", "prompt,steps,recipe\na,3,\nb,3\n\nc,many,\nd,3,{\ne,3,\n"))
    assert [row.request.prompt for row in all_rows(found)] == ["a", "e"]
    assert [(it.line, it.why.partition(" ")[0]) for it in found.refused] == [
        (3, "it"),
        (5, "steps"),
        (6, "recipe"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.yaml", "a", "use .jsonl, .ndjson, .csv, .parquet, .txt"),
        ("a.json", "[]", "one JSON object a line is .jsonl"),
        ("manifest", "a", "no manifest by its ending"),
        ("a.jsonl", "", "has no rows"),
        ("a.txt", "\n\n", "has no rows"),
        ("a.csv", "", "has no column prompt"),
        ("a.csv", "promt\na\n", "has no column prompt"),
        ("a.csv", "prompt,prompt\na,b\n", "names 'prompt' twice"),
        ("a.csv", 'prompt\na\n"b\n', "line 3: the rest is no CSV"),
        ("a.csv", b"prompt\na\n\xff\n", "the rest is no CSV"),
    ],
)
def test_what_is_no_manifest(write: Write, name: str, content: str | bytes, told: str) -> None:
    with pytest.raises(ManifestError) as error:
        read(write(name, content))
    assert told in str(error.value)


def test_absent_and_unreadable_manifests(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, told in (("none.txt", "there is no manifest"), ("folder.jsonl", "is a folder")):
        with pytest.raises(ManifestError, match=told):
            read(tmp_path / name)


def test_parquet_without_pyarrow_names_the_extra(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ManifestError, match=r"pip install --editable \"\.\[parquet\]\""):
        read(write("a.parquet", b"PAR1"))


def test_a_damaged_parquet_file(write: Write) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        read(write("a.parquet", b"PAR1 and no more"))


def as_parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_are_refused_with_their_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    buffers = (None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"),
               pyarrow.py_buffer(b"a\xffc"))  # fmt: skip
    prompts = pyarrow.StringArray.from_buffers(3, *buffers[1:])
    years = pyarrow.array([1, 2, 2**62], pyarrow.timestamp("us"))
    found = read(as_parquet(tmp_path / "a.parquet", prompt=prompts))
    assert [row.request.prompt for row in all_rows(found)] == ["a", "c"]
    assert [it.line for it in found.refused] == [2]
    assert "prompt cannot be read ('utf-8' codec can't decode" in found.refused[0].why
    found = read(as_parquet(tmp_path / "b.parquet", prompt=["a", "b", "c"], seed=years))
    assert found.refused[2].line == 3 and "seed cannot be read" in found.refused[2].why


def test_columns_of_parquet_are_named_as_those_of_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    arrays = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=["prompt", "prompt"]), path)
    with pytest.raises(ManifestError, match="names 'prompt' twice"):
        read(path)
    with pytest.raises(ManifestError, match="has no column prompt"):
        read(as_parquet(path, seed=[1]))


def test_tables_of_parquet_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    """All rows of a column have the keys of any: what a row does not set is null there."""
    recipes = [{"attention": {"method": "top-blocks", "keep": 0.3}},
               {"attention": {"method": "threshold-blocks", "mass": 0.7}}]  # fmt: skip
    found = read(as_parquet(tmp_path / "a.parquet", prompt=["a", "a"], recipe=recipes))
    assert found.refused == []
    read_back = [row.request.recipe["attention"] for row in all_rows(found)]
    assert [it["method"] for it in read_back] == ["top-blocks", "threshold-blocks"]
    assert read_back[0]["keep"] == 0.3 and read_back[1]["mass"] == 0.7


def test_an_id_is_what_a_row_asks_for_and_nothing_else() -> None:
    def row(defaults: dict[str, Any] | None = None, **fields: Any) -> Row:
        return next(Reader(defaults or {}).rows(Entry(1, {"prompt": "a red circle", **fields})))

    first = row()
    assert first.name == f"a-red-circle-s0-{first.id}" and len(first.id) == 16
    # Spelled otherwise, by default or not, elsewhere in a manifest: the same video.
    assert first.id == row(steps=first.request.steps, seed=0, model="kinora-tiny").id
    assert (
        first.id == row({"steps": first.request.steps, "force": True}, prompt=" a red circle ").id
    )
    assert first.id == row(recipe="dense").id == row({"recipe": "balanced"}, recipe={}).id
    attention = {"attention": {"method": "blade"}}
    assert row(recipe=attention).id == row(recipe={**attention, "title": "called so"}).id
    others = [row(seed=1), row(steps=7), row(guidance=1.5), row(size="128x96"), row(fps=3),
              row(format="gif"), row(recipe="balanced"), row(keep_latents=True),
              row(prompt="a Red circle"), row(dtype="bfloat16"), row(strict=True)]  # fmt: skip
    assert len({it.id for it in (first, *others)}) == len(others) + 1
    assert first.id == identity_of(first) == "d6c5c42a478b502f", "an id must not change with Kinora"


def identity_of(row: Row) -> str:
    """The id once more, from what was written down of the row."""
    return rows.identity(Row.from_json(json.loads(json.dumps(row.to_json()))).request)


def test_seeds_multiply_rows_without_one(write: Write) -> None:
    path = write("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": 9}\n'
                 '{"prompt": "c", "num_videos": 2, "seed": 4}\n')  # fmt: skip
    found = table.build(path, {}, rows.seeds_of("0-2"))
    assert [(row.request.prompt, row.request.seed) for row in all_rows(found)] == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 9), ("c", 4), ("c", 5)]  # fmt: skip
    assert all(row.request.num_videos == 1 for row in all_rows(found))


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0-1, 7", [0, 1, 7])]
)
def test_seeds_as_text(text: str, seeds: list[int]) -> None:
    assert rows.seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", "4-0", "a", "-1", "0-", "0-99999999", "1,,2", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(KinoraError, match="--seeds"):
        rows.seeds_of(text)


def test_duplicates_are_refused_with_both_lines(write: Write) -> None:
    found = read(
        write("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": " a", "seed": 0}\n')
    )
    assert len(found) == 2
    assert found.refused == [Refused(3, "it asks for the same as line 1: leave it out")]
    twice = table.build(write("b.txt", "a\n"), {}, [1, 1])
    assert twice.refused == [Refused(1, "it asks for seed 1 twice: leave it out")]


def test_a_row_with_its_own_recipe_takes_no_settings_of_another(write: Write) -> None:
    path = write("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "recipe": "dense"}\n')
    made = all_rows(read(path, recipe="balanced", settings=("attention.keep=0.5",)))
    assert made[0].request.recipe["attention"]["keep"] == 0.5 and made[1].request.recipe == {}


def test_a_wrong_recipe_of_the_options_is_no_fault_of_a_row(write: Write) -> None:
    with pytest.raises(KinoraError) as error:
        read(write("a.txt", "a\n"), recipe="balancd")
    assert "line" not in str(error.value)


def test_fields_of_a_row_are_those_of_a_request() -> None:
    from kinora.pipelines.request import Request

    assert set(rows.FIELDS) == set(Request.model_fields) - {"output", "device", "force"} | {"size"}


def test_nulls_are_left_out(write: Write) -> None:
    assert list(manifest.entries(write("a.jsonl", '{"prompt": "a", "seed": null}'))) == [
        Entry(1, {"prompt": "a"})
    ]


def pictures(folder: Path) -> None:
    """Two files, red.png and blue.png."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(folder / f"{color}.png")


def test_of_an_image_the_content_is_what_a_row_is(
    write: Write, tmp_path: Path, from_image_folder: Path
) -> None:
    pictures(tmp_path / "in")
    path = write(
        "a.csv",
        "prompt,image\na,in/red.png\na,in/blue.png\n"
        f"a,{tmp_path}/in/../in/red.png\nb,none.png\nb,\nb,in\n",
    )
    found = read(path, model=str(from_image_folder))
    red, blue = all_rows(found)
    assert red.request.image == str(tmp_path / "in" / "red.png") and red.id != blue.id
    told = [it.why for it in found.refused]
    assert told[0] == "it asks for the same as line 2: leave it out"
    assert "there is no image" in told[1] and "makes a video from an image" in told[2]
    assert "is a folder" in told[3]
    # Elsewhere it is the same row, with another content another one.
    (tmp_path / "in").rename(tmp_path / "moved")
    write("a.csv", "prompt,image\na,moved/red.png\n")
    assert [it.id for it in all_rows(read(path, model=str(from_image_folder)))] == [red.id]
    (tmp_path / "moved" / "blue.png").replace(tmp_path / "moved" / "red.png")
    assert [it.id for it in all_rows(read(path, model=str(from_image_folder)))] == [blue.id]


def test_an_image_for_all_rows_is_where_the_command_is_run(
    write: Write, tmp_path: Path, from_image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path)
    found = read(Path("deep/a.jsonl"), model=str(from_image_folder), image="red.png")
    assert [it.request.image for it in all_rows(found)] == [str(tmp_path / "red.png")]
    image = {"prompt": "a", "image": 3}
    refused = read(write("b.jsonl", json.dumps(image)), model=str(from_image_folder)).refused
    assert "image must be text" in refused[0].why


def test_rows_without_an_image_have_the_ids_they_had() -> None:
    (row,) = Reader({}).rows(Entry(1, {"prompt": "a red circle"}))
    assert row.id == "d6c5c42a478b502f"
