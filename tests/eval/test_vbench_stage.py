"""VBench's prompts and names: the manifest, links by prompt and seed, and what would go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kinora.eval.clips import Clip, EvalError, find
from kinora.eval.vbench import prompts as vbench_prompts
from kinora.eval.vbench.prompts import dimensions_of, manifest
from kinora.eval.vbench.spec import DIMENSIONS
from kinora.eval.vbench.stage import check_names, readable, stage, stage_custom
from kinora.eval.vbench.suites import VBENCH

Film = Callable[..., Path]
INFO = [
    {"prompt_en": "a cat", "dimension": ["color", "scene"]},
    {"prompt_en": "a dog", "dimension": ["scene"]},
    {"prompt_en": "A cat", "dimension": ["human_action"]},
    {"prompt_en": "a dog", "dimension": ["human_action"]},
]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    file = tmp_path / "info.json"
    file.write_text(json.dumps(INFO))
    return file


def clip_frames() -> object:
    return np.zeros((2, 16, 16, 3), np.uint8)


def test_the_manifest_has_five_seeds_of_each_prompt_of_a_dimension(info: Path) -> None:
    known = vbench_prompts.read(info)
    assert known.of(["scene"]) == ["a cat", "a dog"] and known.of(["color"]) == ["a cat"]
    assert known.of(["scene", "human_action"]) == ["a cat", "a dog", "A cat"]  # each once
    rows = list(manifest(known, ["scene"], seed=7))
    assert rows[0] == {"prompt": "a cat", "seed": 7} and len(rows) == 10
    assert [it["seed"] for it in rows] == [7, 8, 9, 10, 11] * 2


def test_bad_prompt_lists_are_told(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    no_list = "is no VBench_full_info"
    for content, told in (("{", no_list), ("[]", "no prompts"), ('[{"a": 1}]', no_list)):
        file.write_text(content)
        with pytest.raises(EvalError, match=told):
            vbench_prompts.read(file)
    with pytest.raises(EvalError, match="cannot be read"):
        vbench_prompts.read(tmp_path / "gone")


def test_dimensions_are_known_before_anything_is_loaded() -> None:
    assert dimensions_of([]) == tuple(DIMENSIONS)
    assert dimensions_of(["scene", "color"]) == ("color", "scene")
    with pytest.raises(EvalError, match="no dimension 'sceen': did you mean scene"):
        dimensions_of(["sceen"])


def test_videos_are_linked_by_prompt_and_seed(film: Film, tmp_path: Path) -> None:
    for seed in (30, 4, 17):
        film(tmp_path / f"{seed}.mp4", clip_frames(), "a cat", seed)
    film(tmp_path / "other.mp4", clip_frames(), "a bird", 0)
    clips, _ = find([tmp_path])
    staged = stage(clips, ["a cat", "a dog"], tmp_path / "staged")
    links = {name: clip.seed for name, clip in staged.links.items()}
    assert links == {"a cat-0.mp4": 4, "a cat-1.mp4": 17, "a cat-2.mp4": 30}
    assert (tmp_path / "staged" / "a cat-1.mp4").resolve() == (tmp_path / "17.mp4").resolve()
    assert staged.expected == 10 and len(staged.missing) == 7
    assert [it.path.name for it in staged.unused] == ["other.mp4"]


def test_videos_named_as_vbench_does_are_taken_by_name(tmp_path: Path) -> None:
    clips = [Clip(tmp_path / f"a cat-{i}.mp4") for i in (0, 3)]
    staged = stage(clips, ["a cat"], tmp_path / "staged", samples=2)
    assert list(staged.links) == ["a cat-0.mp4", "a cat-1.mp4"] and not staged.missing
    assert list(stage_custom(clips, tmp_path / "custom").links) == ["000000.mp4", "000001.mp4"]


def test_more_samples_than_are_asked_for_are_left_out(tmp_path: Path) -> None:
    clips = [Clip(tmp_path / f"a cat-{i}.mp4") for i in range(7)]
    staged = stage(clips, ["a cat"], tmp_path / "staged")
    assert len(staged.links) == 5 and [it.path.stem[-1] for it in staged.unused] == ["5", "6"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a cat-0.mp4", "b-0.gif"], "one kind of file at a time"),
        (["x/a cat-0.mp4", "y/a cat-0.mp4"], "are both number 0 of 'a cat'"),
    ],
)
def test_what_cannot_be_staged_is_refused(tmp_path: Path, names: list[str], told: str) -> None:
    with pytest.raises(EvalError, match=told):
        stage([Clip(tmp_path / it) for it in names], ["a cat"], tmp_path / "staged")


def test_what_the_package_cannot_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a-0.mp4").touch()
    clips = [Clip(tmp_path / it) for it in ("a-0.mp4", "a-1.png", "a-2.webm", "gone.mp4")]
    fit, rejected = readable(clips, VBENCH)
    assert fit == clips[:1] and [it.path for it in rejected] == [it.path for it in clips[1:]]
    assert "VBench reads .mp4 and .gif, not " in rejected[1].reason
    assert "(No such file or directory)" in rejected[2].reason
    with pytest.raises(EvalError, match=r"reads .mp4 and .gif, not .*a-1.png: generate with"):
        readable(clips[1:], VBENCH)
    (tmp_path / "b-0.gif").touch()
    with pytest.raises(EvalError, match="one kind of file at a time"):
        readable([clips[0], Clip(tmp_path / "b-0.gif")], VBENCH)


def test_names_that_no_file_can_have_are_refused() -> None:
    check_names(["a cat-0.mp4", "A cat-0.mp4", "x" * 251 + ".mp4"], ignores_case=False)
    for names, ignores_case, told in (
        (["a cat-0.mp4", "A cat-0.mp4"], True, "are one file here"),
        (["é" * 126 + ".mp4"], False, "has 256 bytes"),
        (["a/b-0.mp4"], False, "is no name"),
    ):
        with pytest.raises(EvalError, match=told):
            check_names(names, ignores_case=ignores_case)
