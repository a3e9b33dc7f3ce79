"""Clips on disk: which are found, what is known of them, and which reference each gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
import pytest

from kinora.eval.clips import Clip, EvalError, References, find, with_prompts
from kinora.pipelines.media import read_frames

Film = Callable[..., Path]


def frames(value: int = 90, count: int = 3) -> Any:
    return np.full((count, 16, 24, 3), value, np.uint8)


def frame_folder(folder: Path, values: list[int], pattern: str = "frame_{:02d}.png") -> Path:
    folder.mkdir(parents=True)
    for index, value in enumerate(values):
        iio.imwrite(folder / pattern.format(index), frames(value, 1)[0])
    return folder


def test_files_sidecars_and_folders_name_clips(film: Film, tmp_path: Path) -> None:
    a = film(tmp_path / "a.mp4", frames(), "a red circle", 1)
    b = film(tmp_path / "b.png", frames(), "a blue ring", 2, sidecar=False)
    c = frame_folder(tmp_path / "c", [0, 255])
    for given in ([tmp_path], [a, b, c], [a.with_suffix(".json"), b, c, a]):
        clips, rejected = find(given)
        assert {it.path for it in clips} == {a, b, c} and not rejected
        told = {it.path.name: (it.identity, it.lossless) for it in clips}
        assert told["a.mp4"] == (("a red circle", 1), False)
        assert told["b.png"] == (("a blue ring", 2), True)
        assert told["c"] == (None, True)


def test_a_folder_of_numbered_frames_is_one_clip(film: Film, tmp_path: Path) -> None:
    order = frame_folder(tmp_path / "frames", list(range(0, 120, 10)), "{}.png")
    ((clip,), _) = find([order])
    assert [int(it[0, 0, 0]) for it in clip.frames()] == list(range(0, 120, 10))
    before = clip.sha256()
    iio.imwrite(order / "3.png", frames(7, 1)[0])
    assert clip.sha256() != before
    # Images that Kinora made end in numbers too.
    for seed in (0, 1):
        film(tmp_path / "made" / f"a-red-ring-s{seed}.png", frames(90, 1), "a red ring", seed)
    assert len(find([tmp_path / "made"])[0]) == 2
    for count in (1, 3):  # without sidecars
        for name in ("a1.png", "a2.png"):
            film(tmp_path / f"bare{count}" / name, frames(90, count), "a", 1, sidecar=False)
        assert len(find([tmp_path / f"bare{count}"])[0]) == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("empty", "holds no video"),
        ("notes.txt", "is no video: give .mp4"),
        ("gone.mp4", "there is no video or folder"),
        ("other.json", "is no Kinora sidecar"),
        ("lost.json", "is gone"),
    ],
)
def test_what_is_no_clip_is_told(film: Film, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "other.json").write_text("{}")
    film(tmp_path / "lost.mp4", frames(), "a red circle", 0).unlink()
    clips, (rejected,) = find([tmp_path / name])
    assert not clips and told in rejected.reason and "\n" not in rejected.reason


def test_a_missing_video_is_told_with_the_nearest_name(film: Film, tmp_path: Path) -> None:
    film(tmp_path / "circle.mp4", frames(), "a red circle", 0)
    _, (rejected,) = find([tmp_path / "circel.mp4"])
    assert rejected.reason.endswith(f"did you mean {tmp_path / 'circle.mp4'}?")


def test_broken_videos_are_told_in_a_line(tmp_path: Path, film: Film) -> None:
    whole = film(tmp_path / "whole.mp4", frames(), "a", 0).read_bytes()
    for name, content in (("noise.mp4", b"no video"), ("empty.mp4", b""), ("cut.mp4", whole[:300])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EvalError, match=rf"{name} cannot be read as a video") as error:
            Clip(tmp_path / name).frames()
        assert "\n" not in str(error.value)


def test_a_video_of_which_a_part_is_left_is_not_scored_as_whole(film: Film, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    path = film(tmp_path / "a.webm", noise, "noise", 0)
    ((clip,), _) = find([path])
    assert len(clip.frames()) == 16
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert 0 < len(read_frames(path)) < 16
    with pytest.raises(
        EvalError, match=r"a\.webm is not whole: \d+ frames, its record tells of 16"
    ):
        clip.frames()


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.png"])
def test_what_is_wrong_with_a_file_is_told_in_words(tmp_path: Path, name: str) -> None:
    for content, told in ((b"", "it is empty"), (b"no video", "it is damaged, cut short, or")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EvalError, match=rf"cannot be read as a video \({told}"):
            Clip(tmp_path / name).frames()


def test_a_link_to_a_video_that_is_gone_does_not_go_unsaid(tmp_path: Path) -> None:
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    (tmp_path / "folder.mp4").mkdir()
    ((clip,), rejected) = find([tmp_path])
    assert clip.path.name == "gone.mp4" and not rejected
    with pytest.raises(EvalError, match=r"gone\.mp4 cannot be read"):
        clip.sha256()


def test_a_video_without_frames_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.mp4"
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", 16)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    with pytest.raises(EvalError, match=r"none.mp4 (cannot be read as a video|has no frames)"):
        Clip(path).frames()


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path, *__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    _, (rejected,) = find([tmp_path])
    assert rejected.reason == f"{tmp_path} cannot be read (Permission denied)"
    _, (rejected,) = find([tmp_path / ("x" * 300)])
    assert "File name too long" in rejected.reason


def test_frames_of_several_sizes_are_no_clip(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "c", [0, 1])
    iio.imwrite(folder / "frame_02.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(EvalError, match="several sizes: 8x8 and 24x16"):
        Clip(folder).frames()


def test_references_are_found_by_prompt_and_seed_before_names(film: Film, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    same = film(dense / "x.png", frames(), "a red ring", 5)
    film(dense / "mine.png", frames(), "a red ring", 6)
    named = frame_folder(dense / "plain", [1])
    references = References(dense)
    (mine, plain), _ = find(
        [
            film(tmp_path / "mine.mp4", frames(), "a red ring", 5),
            film(tmp_path / "plain.mp4", frames(), "a green star", 9),
        ]
    )
    assert references.of(mine).path == same
    assert references.of(plain).path == named


def test_a_reference_of_another_prompt_is_none(film: Film, tmp_path: Path) -> None:
    film(tmp_path / "dense" / "a.mp4", frames(), "a red ring", 5)
    references = References(tmp_path / "dense")
    ((other,), _) = find([film(tmp_path / "a.mp4", frames(), "a red ring", 6)])
    with pytest.raises(EvalError, match="none of its prompt and seed, nor of its name"):
        references.of(other)


def test_several_references_are_told_apart_by_name_or_not_at_all(
    film: Film, tmp_path: Path
) -> None:
    for name in ("a.mp4", "b.mp4"):
        film(tmp_path / "dense" / name, frames(), "a red ring", 5)
    references = References(tmp_path / "dense")
    clips, _ = find([film(tmp_path / n, frames(), "a red ring", 5) for n in ("b.mp4", "c.mp4")])
    assert references.of(clips[0]).path.name == "b.mp4"
    with pytest.raises(EvalError, match=r"2 references in .* fit .*c\.mp4: a\.mp4, b\.mp4"):
        references.of(clips[1])


def test_bad_references_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one = frame_folder(tmp_path / "one", [1, 2])
    for folder, told in (
        (tmp_path / "gone", "is no folder"),
        (tmp_path / ("x" * 300), r"x cannot be read \(File name too long\)"),
        (tmp_path / "empty", "holds no video"),
        (one, "holds one clip's frames"),
    ):
        with pytest.raises(EvalError, match=told):
            References(folder)


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    clips = [Clip(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    file = tmp_path / "prompts.json"
    file.write_text('{"a.mp4": "a red ring", "c.mp4": "a star"}')
    given, unmatched = with_prompts(clips, file)
    assert [it.prompt for it in given] == ["a red ring", None] and unmatched == ["c.mp4"]
    for content, told in (
        ('{"z.mp4": "a"}', "prompts for 1 files, such as 'z.mp4', and none for 'a.mp4'"),
        ("[1]", "must be a JSON object"),
        ("{", "is no JSON"),
    ):
        file.write_text(content)
        with pytest.raises(EvalError, match=told):
            with_prompts(clips, file)
    with pytest.raises(EvalError, match="cannot be read"):
        with_prompts(clips, tmp_path / "none.json")
