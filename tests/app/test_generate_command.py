"""`kinora generate` and `kinora decode` as a user calls them, on four families of pipelines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinora.pipelines import media, sidecar

Cli = Callable[..., Any]
SMALL = ("--size", "32x32", "--steps", "2")
FRAMES = {"wan": 5, "cogvideox": 9, "flux": 1, "sdxl": 1}


@pytest.mark.parametrize("family", FRAMES)
def test_every_family_through_the_same_command(
    cli: Cli, model_folders: dict[str, Path], family: str
) -> None:
    called = cli("generate", "a red circle", "--model", model_folders[family], *SMALL,
                 "--frames", FRAMES[family], "--json")  # fmt: skip
    assert called.status == 0, called.err
    output = called.last["outputs"][0]
    frames = media.read_frames(Path(output["path"]))
    assert frames.shape == (FRAMES[family], 32, 32, 3)
    assert "where" not in called.err
    assert frames.std() > 1, "a random model makes noise, not one colour"
    assert set(called.last["stages_s"]) == {"load", "text", "denoise", "decode", "save"}
    assert called.last["total_s"] == pytest.approx(sum(called.last["stages_s"].values()), abs=0.01)
    again = cli("generate", "--from", output["path"], "--json")
    assert again.last["outputs"][0]["identical"] is True, again.err


def test_paths_and_times_go_to_stdout_and_progress_to_stderr(cli: Cli, wan_folder: Path) -> None:
    called = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5)
    path, *table = called.out.splitlines()
    assert Path(path).is_file()
    assert [line.split()[:2] for line in table[:1]] == [["load", "text"]]
    assert "step 2/2" in called.err and path not in called.err
    stages = [line.partition(" (")[0] for line in called.err.splitlines() if "step" not in line]
    assert stages[-3:] == ["saving the latents", "decoding", "saving"]


@pytest.mark.parametrize("media_format", ["mp4", "gif", "webm", "png"])
def test_the_record_is_in_the_file_and_beside_it(
    cli: Cli, wan_folder: Path, media_format: str
) -> None:
    called = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5,
                 "--format", media_format, "--seed", 3, "--json")  # fmt: skip
    output = called.last["outputs"][0]
    beside = sidecar.read(Path(output["sidecar"]))
    inside = sidecar.read(Path(output["path"]))
    assert output["path"].endswith("." + media_format)
    assert beside.request.seed == 3 and beside.request.guidance == 5.0
    assert "save" in beside.stages_s and "save" not in inside.stages_s
    assert beside.timed({}) == inside.timed({})
    written = json.loads(Path(output["sidecar"]).read_text())
    assert written["receipt"]["stages_s"] == beside.stages_s == output["receipt"]["stages_s"]
    assert "stages_s" not in written


def test_from_a_sidecar_or_its_media_repeats_bit_for_bit(cli: Cli, wan_folder: Path) -> None:
    first = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5,
                "--seed", 7, "--num-videos", 2, "--json").last["outputs"][1]  # fmt: skip
    for source in (first["sidecar"], first["path"]):
        again = cli("generate", "--from", source, "--output", "again", "--json")
        repeated = again.last["outputs"][0]
        assert repeated["identical"] is True
        assert repeated["frames_sha256"] == first["frames_sha256"]
        assert repeated["latents_sha256"] == first["latents_sha256"]
        assert np.array_equal(
            media.read_frames(Path(repeated["path"])), media.read_frames(Path(first["path"]))
        )
    other = cli("generate", "--from", first["path"], "--output", "other.gif", "--json")
    assert other.last["outputs"][0]["path"] == "other.gif", other.err
    assert other.last["outputs"][0]["identical"] is True
    changed = cli("generate", "--from", first["path"], "--seed", 9, "--json").last["outputs"][0]
    assert changed["identical"] is None and changed["frames_sha256"] != first["frames_sha256"]


def test_a_changed_model_is_named_when_repeating(cli: Cli, wan_folder: Path) -> None:
    first = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5, "--json")
    path = Path(first.last["outputs"][0]["sidecar"])
    content = json.loads(path.read_text())
    content["model"]["fingerprint"] = "sha256:0"
    content["frames_sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    again = cli("generate", "--from", path)
    assert "the model's weights" in again.err and "differs from the original" in again.out


def test_a_repeat_is_compared_with_what_it_repeats_only(cli: Cli, wan_folder: Path) -> None:
    made = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5, "--json")
    path = Path(made.last["outputs"][0]["sidecar"])
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "frames_sha256": None}))
    assert cli("generate", "--from", path, "--json").last["outputs"][0]["identical"] is None
    content["request"]["num_videos"] = 3
    path.write_text(json.dumps(content))
    outputs = cli("generate", "--from", path, "--json").last["outputs"]
    assert [output["identical"] for output in outputs] == [True, None, None]


def test_a_model_given_by_a_relative_path_is_found_from_elsewhere(
    cli: Cli, wan_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(wan_folder.parent)
    made = cli("generate", "a red circle", "--model", "wan", *SMALL, "--frames", 5,
               "--output", tmp_path / "x.mp4", "--json").last["outputs"][0]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--model", os.path.relpath(wan_folder))):
        again = cli("generate", "--from", made["sidecar"], *options, "--json")
        assert again.last["outputs"][0]["identical"] is True, again.err


def test_a_set_of_files_is_refused_as_one(cli: Cli, wan_folder: Path) -> None:
    ask = ("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5, "--output")
    assert cli(*ask, "X.MP4").status == 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["X.MP4", "X.json"]
    refused = cli(*ask, "X.gif")
    assert refused.status == 2 and "X.json exists already" in refused.complaint
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["X.MP4", "X.json"]


def test_nothing_is_ever_overwritten(cli: Cli, wan_folder: Path) -> None:
    ask = ("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 5, "--json")
    paths = [cli(*ask).last["outputs"][0]["path"] for _ in range(3)]
    assert [Path(path).stem for path in paths] == [
        "a-red-circle-s0", "a-red-circle-s0-2", "a-red-circle-s0-3"]  # fmt: skip
    before = Path(paths[0]).read_bytes()
    refused = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--output", paths[0])
    assert refused.status == 2 and "never overwritten" in refused.complaint
    assert Path(paths[0]).read_bytes() == before


def test_latents_can_be_kept_and_decoded_to_the_same_frames(
    cli: Cli, model_folders: dict[str, Path]
) -> None:
    for family, frames in FRAMES.items():
        made = cli("generate", "a red circle", "--model", model_folders[family], *SMALL,
                   "--frames", frames, "--output", family,
                   "--keep-latents", "--json").last["outputs"][0]  # fmt: skip
        finished = cli("decode", made["latents"], "--output", family, "--json")
        assert finished.status == 0, finished.err
        decoded = finished.last["outputs"][0]
        assert decoded["frames_sha256"] == made["frames_sha256"], family
        assert decoded["path"] != made["path"] and Path(made["latents"]).is_file()


def test_one_frame_of_a_video_model_is_an_image(cli: Cli, wan_folder: Path) -> None:
    called = cli("generate", "a red circle", "--model", wan_folder, *SMALL, "--frames", 1, "--json")
    path = Path(called.last["outputs"][0]["path"])
    assert path.suffix == ".png" and media.read_frames(path).shape == (1, 32, 32, 3)
