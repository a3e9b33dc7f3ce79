"""Bad input: one clear line, exit status 2, no traceback, nothing lost, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import cards, files, memory
from kinora.pipelines.request import Request, resolve

Cli = Callable[..., Any]
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")


def everything(folder: Path) -> list[str]:
    """All files below `folder`, also hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([""], ["the prompt is empty", "red circle"]),
        (["  "], ["the prompt is empty"]),
        ([], ["no PROMPT"]),
        (["a", "--size", "33x32"], ["33x32", "multiples of 16", "--size 32x32"]),
        (["a", "--size", "3x900000"], ["--size 16x8192"]),
        (["a", "--size", "big"], ["WIDTHxHEIGHT", "'big'"]),
        (["a", "--size", "١٢٨x64"], ["WIDTHxHEIGHT"]),
        (["a", "--frames", "6"], ["4k+1", "--frames 5"]),
        (["a", "--frames", "0"], ["--frames 1"]),
        (["a", "--frames", "many"], ["--frames", "valid integer"]),
        (["a", "--steps", "0"], ["steps must be 1 to 1000, not 0"]),
        (["a", "--steps", "1001"], ["steps must be 1 to 1000, not 1001"]),
        (["a", "--guidance", "nan"], ["guidance"]),
        (["a", "--guidance", "-1"], ["guidance"]),
        (["a", "--fps", "0"], ["fps"]),
        (["a", "--fps", "1e-9"], ["fps must be 0.1 to 240"]),
        (["a", "--seed", "-1"], ["seed"]),
        (["a", "--num-videos", "0"], ["num_videos"]),
        (["a", "--device", "gpu"], ["device", "'gpu'"]),
        (["a", "--device", "cuda:99"], ["no device cuda:99", "cpu"]),
        (["a", "--dtype", "float"], ["float32", "did you mean"]),
        (["a", "--format", "mp5"], ["did you mean mp4"]),
        (["a", "--output", "x.avi"], [".avi", ".mp4", "end a folder's name with /"]),
        (["a", "--output", "x.gif", "--format", "mp4"], ["disagree"]),
        (["a", "--output", ".mp4"], ["--output .mp4", "without a name", "video.mp4"]),
        (["a", "--output", "new/.GIF"], ["without a name"]),
        (["a", "--output", "..png"], ["without a name"]),
        (["a", "--output", "x" * 300 + ".mp4"], ["too long"]),
        (["a", "--output", "x" * 300], ["too long"]),
        (["a", "--output", "~nobody-here/x/"], ["~nobody-here is nobody here"]),
        (["a", "--output", "\udcff.mp4"], ["the output is no UTF-8"]),
        (["a red \udcff circle"], ["the prompt is no UTF-8", r"\udcff"]),
        (["a", "--negative-prompt", "\udcff"], ["the negative prompt is no UTF-8"]),
        (["a\0"], ["the prompt has the control character '\\x00': leave it out"]),
        (["a", "--negative-prompt", "\x1b"], ["the negative prompt has the control character"]),
        (["a", "--nonsense"], ["--nonsense", "kinora generate --help"]),
    ],
)
def test_requests_that_no_run_could_fulfil(
    cli: Cli, wan_folder: Path, args: list[str], told: list[str]
) -> None:
    called = cli("generate", *args, "--model", wan_folder, "--json")
    assert called.status == 2
    assert all(part in called.complaint for part in told), called.complaint
    assert called.last["status"] == "error" and called.last["error"] in called.complaint
    assert everything(Path.cwd()) == []


def test_lines_and_tabs_are_no_mistake_in_a_prompt() -> None:
    request = Request(prompt="a red circle\r\n\tand\na blue one")
    assert resolve(request, cards.find("kinora-tiny")).prompt == request.prompt


def test_an_image_model_offers_one_frame(cli: Cli, model_folders: dict[str, Path]) -> None:
    called = cli("generate", "a", "--model", model_folders["flux"], "--frames", 9)
    assert called.status == 2 and "--frames 1" in called.complaint


@pytest.mark.parametrize("frames", ["1" + "0" * 400, "1" * 31, "-1" + "0" * 400])
def test_huge_numbers_are_refused_and_not_repeated(
    cli: Cli, model_folders: dict[str, Path], frames: str
) -> None:
    model = model_folders["cogvideox"]
    called = [
        cli("generate", "a", "--model", model, "--frames", frames, "--force"),
        cli("plan", "--model", model, "--frames", frames),
        cli("generate", "a", "--model", model, "--steps", frames),
        cli("generate", "a", "--model", model, "--num-videos", frames),
        cli("generate", "a", "--model", model, "--seed", frames),
    ]
    for it in called:
        assert it.status == 2 and "about 10^" in it.complaint and len(it.complaint) < 400
    most = "1" if frames.startswith("-") else "999993"
    assert all(f"the nearest is --frames {most}" in it.complaint for it in called[:2])


def test_a_negative_prompt_is_refused_where_it_would_be_ignored(
    cli: Cli, model_folders: dict[str, Path]
) -> None:
    called = cli("generate", "a", "--model", model_folders["flux"], "--negative-prompt", "b")
    assert called.status == 2 and "takes no negative prompt" in called.complaint


def test_unknown_words_are_a_warning_with_the_nearest_known_ones(
    cli: Cli, wan_folder: Path
) -> None:
    called = cli("generate", "a redd cirlce, Moving left", "--model", wan_folder, *SMALL)
    assert called.status == 0
    assert "'redd' (nearest: red" in called.err and "'cirlce' (nearest: circle" in called.err
    assert "','" not in called.err and "Moving" not in called.err and "more" not in called.err
    shown = cli("models", "show", wan_folder)
    assert "a black blue circle left moving over red right square" in shown.out


@pytest.mark.parametrize("prompt", ["...", "🎈 , ?!"])
def test_a_prompt_without_a_word_is_a_warning(cli: Cli, wan_folder: Path, prompt: str) -> None:
    called = cli("generate", prompt, "--model", wan_folder, *SMALL)
    assert called.status == 0 and "finds no word in" in called.err
    assert "no word" not in cli("generate", "red.", "--model", wan_folder, *SMALL).err


def test_many_and_long_unknown_words_make_a_short_warning(cli: Cli, wan_folder: Path) -> None:
    words = [f"word{index}" for index in range(20)]
    called = cli("generate", " ".join(["x" * 5000, *words]), "--model", wan_folder, *SMALL)
    (notice,) = [line for line in called.err.splitlines() if line.startswith("note: ")]
    assert "'word2'" in notice and "and 17 more" in notice and len(notice) < 400


def test_too_much_memory_is_refused_with_an_estimate_and_force_goes_on(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little() -> int:
        return 10_000_000

    monkeypatch.setattr(memory, "host_free_bytes", little)
    ask = ("generate", "a red circle", "--model", wan_folder, *SMALL)
    refused = cli(*ask)
    assert refused.status == 2
    assert all(part in refused.complaint for part in ("predicted", "10 MB free", "--force"))
    assert everything(Path.cwd()) == []
    forced = cli(*ask, "--force")
    assert forced.status == 0 and "as --force asks" in forced.err


def test_a_huge_request_is_refused_before_loading(cli: Cli, wan_folder: Path) -> None:
    called = cli("generate", "a", "--model", wan_folder, "--size", "8192x8192", "--frames", 801)
    assert called.status == 2 and "predicted peak memory" in called.complaint


def test_names_and_folders_that_are_no_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    told = {
        "kinora-tyni": ["did you mean kinora-tiny"],
        "wan": ["did you mean wan2.1-1.3b or wan2.1-14b"],
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": ["did you mean wan2.1-14b"],
        "qqqq": ["unknown model", "kinora models"],
        tmp_path / "nowhere": ["no model folder"],
        "~nobody-here/x": ["no model folder"],
        "x" * 300: ["too long"],
        "x" * 100_000: ["too long"],
        "y/" * 50_000: ["too long"],
        tmp_path / "empty": ["no model_index.json"],
        tmp_path / "file": ["is a file"],
    }
    for model, parts in told.items():
        called = cli("generate", "a", "--model", model)
        assert called.status == 2 and len(called.complaint) < 700
        assert all(part in called.complaint for part in parts), called.complaint


def test_an_unwritable_output_is_refused_before_loading(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("kinora.pipelines.models.load", forbidden)
    Path("file").write_text("")
    for output in ("file/x.mp4", "file/folder", "/proc/kinora/x.mp4"):
        called = cli("generate", "a", "--model", wan_folder, *SMALL, "--output", output)
        assert called.status == 2 and "is not writable" in called.complaint, called.complaint
    assert everything(Path.cwd()) == ["file"]


def test_a_disk_that_fills_while_writing_keeps_the_latents(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(descriptor: int, data: bytes) -> None:
        if b"kinora.latents" in data[:4000]:
            return written(descriptor, data)
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    written = files.write_all
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_all", half)
        called = cli("generate", "a", "--model", wan_folder, *SMALL, "--output", "out", "--json")
    assert called.status == 2
    assert "the disk is full" in called.complaint and "kinora decode" in called.complaint
    kept = called.last["latents"]
    assert everything(Path("out")) == [Path(kept).name]
    assert cli("decode", kept, "--output", "out").status == 0
    assert everything(Path("out")) == ["a-s0.json", Path(kept).name, "a-s0.mp4"]


def test_latents_that_do_not_fit_are_rescued_elsewhere(
    cli: Cli, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    rescue = tmp_path / "rescue"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_all", full)
        called = cli("generate", "a", "--model", wan_folder, *SMALL, "--output", "out", "--json")
    assert called.status == 2 and "the disk is full" in called.complaint
    kept = Path(called.last["latents"])
    assert everything(rescue) == [kept.name] and everything(Path.cwd()) == []
    assert cli("decode", kept, "--output", "out").status == 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_truly_full_disk(cli: Cli, wan_folder: Path, tiny_disk: Path) -> None:
    filler = tiny_disk / "filler"
    filler.write_bytes(bytes(52 * 1024))
    ask = ("generate", "a", "--model", wan_folder, *SMALL, "--output", tiny_disk / "out", "--json")
    early = cli(*ask)
    assert early.status == 2 and "of disk free" in early.complaint
    assert everything(tiny_disk) == ["filler"]
    late = cli(*ask, "--force", "--format", "png")
    assert late.status == 2 and "the disk is full" in late.complaint, late.err
    kept = Path(late.last["latents"])
    assert everything(tiny_disk) == ["filler", str(kept.relative_to(tiny_disk))]
    filler.unlink()
    assert cli("decode", kept, "--output", tiny_disk / "out").status == 0


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.json", "{", "no readable record"),
        ("x.json", "[1]", "no Kinora sidecar"),
        (
            "x.json",
            '{"schema": "kinora.run/9"}',
            "a newer Kinora (kinora.run/9): update",
        ),
        ("x.json", '{"schema": "kinora.run/0"}', "its schema is 'kinora.run/0'"),
        ("x.json", '{"schema": "kinora.run/1", "request": {}}', "request.prompt is missing"),
        ("x.json", '{"schema": "kinora.run/1", "request": 1}', "request must be a JSON object"),
        ("x.json", "\udcff", "cannot be read"),
        ("x.json", "[" * 200_000, "no readable record"),
        ("x.mp4", "no video", "is no video or image that can be read"),
        ("x.mp4", "", "is no video or image that can be read"),
        ("x.png", "no image", "is no video or image that can be read"),
        ("x.txt", "text", "neither a sidecar"),
    ],
)
def test_malformed_sidecars(cli: Cli, name: str, text: str, told: str) -> None:
    Path(name).write_bytes(text.encode("utf-8", "surrogateescape"))
    called = cli("generate", "--from", name)
    assert called.status == 2 and told in called.complaint, called.complaint
    assert everything(Path.cwd()) == [name]


def test_sidecars_with_one_wrong_value(cli: Cli, wan_folder: Path) -> None:
    made = cli("generate", "a", "--model", wan_folder, *SMALL, "--json").last["outputs"][0]
    path = Path(made["sidecar"])
    content = json.loads(path.read_text())
    for field, value, told in (
        ("steps", "two", 'must be a whole number, not "two"'),
        ("steps", 2.5, "must be a whole number, not 2.5"),
        ("guidance", 10**4000, "must be a number, not 1000"),
        ("guidance", [1], "must be a number, not [1]"),
        ("frames", True, "must be a whole number, not true"),
        ("prompt", None, "must be text, not null"),
        ("prompt", list(range(1000)), "14, 15, 16, 1…"),
        ("force", "maybe", 'must be true or false, not "maybe"'),
        ("format", "avi", "must be 'mp4', 'gif', 'webm' or 'png', not \"avi\""),
        ("colour", "red", "is no field that Kinora knows"),
    ):
        request = {**content["request"], field: value}
        path.write_text(json.dumps({**content, "request": request}))
        called = cli("generate", "--from", path)
        assert called.status == 2 and f"request.{field} " in called.complaint
        assert told in called.complaint and "nput should" not in called.complaint
    for changes, told in (
        (
            {"stages_s": {"denoise": float("nan")}},
            ".denoise must be a finite number, not NaN",
        ),
        ({"receipt": {**content["receipt"], "skipped": True}}, "must be a whole number, not true"),
        ({"machine": {**content["machine"], "threads": True}}, "must be a whole number, not true"),
    ):
        path.write_text(json.dumps({**content, **changes}))
        assert told in cli("generate", "--from", path).complaint
    path.write_text(json.dumps({**content, "request": {**content["request"], "frames": 10**4000}}))
    assert "cannot make about 10^4000 frames" in cli("generate", "--from", path).complaint


def test_a_sidecar_with_a_byte_order_mark_is_read(cli: Cli, wan_folder: Path) -> None:
    made = cli("generate", "a", "--model", wan_folder, *SMALL, "--json").last["outputs"][0]
    path = Path(made["sidecar"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert cli("generate", "--from", path).status == 0


def test_from_something_that_is_not_there_or_with_a_prompt(cli: Cli) -> None:
    assert "no file" in cli("generate", "--from", "nowhere.json").complaint
    assert "leave it out" in cli("generate", "a", "--from", "nowhere.json").complaint
    Path("folder.json").mkdir()
    assert "is a folder" in cli("generate", "--from", "folder.json").complaint
    assert "is a folder" in cli("decode", "folder.json").complaint
