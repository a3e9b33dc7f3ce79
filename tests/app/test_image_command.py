"""Videos from an image as a user asks for them: one, again, and all rows of a manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinora.pipelines import sidecar

Cli = Callable[..., Any]
SMALL = ("--size", "32x32", "--frames", "5", "--steps", "2")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a.png and b.jpg, of noise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        values = random.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / name)
    return folder


def test_a_video_is_made_and_made_again(cli: Cli, from_image_folder: Path, photos: Path) -> None:
    given = ("generate", "a red circle", "--model", from_image_folder, *SMALL, "--json")
    made = cli(*given, "--image", photos / "a.png").last["outputs"][0]
    again = cli("generate", "--from", made["path"], "--json")
    assert again.last["outputs"][0]["identical"] is True, again.err
    (photos / "a.png").rename(photos / "moved.png")
    gone = cli("generate", "--from", made["path"])
    assert gone.status == 2 and "there is no image" in gone.complaint
    moved = cli("generate", "--from", made["path"], "--image", photos / "moved.png", "--json")
    assert moved.last["outputs"][0]["identical"] is True, moved.err
    (photos / "b.jpg").rename(photos / "a.png")
    changed = cli("generate", "--from", made["path"])
    assert changed.status == 2 and "its content has changed" in changed.complaint
    other = cli("generate", "--from", made["path"], "--image", photos / "a.png", "--json")
    assert other.last["outputs"][0]["frames_sha256"] != made["frames_sha256"]
    assert other.last["outputs"][0]["identical"] is None


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_missing_and_a_needless_image_are_refused_in_one_line(
    cli: Cli, from_image_folder: Path, wan_folder: Path, photos: Path, command: str
) -> None:
    without = cli(command, "a", "--model", from_image_folder)
    assert without.status == 2 and "say which by --image" in without.complaint
    needless = cli(command, "a", "--model", wan_folder, "--image", photos / "a.png")
    assert needless.status == 2 and "leave --image out" in needless.complaint


def test_a_plan_needs_no_image(cli: Cli, from_image_folder: Path) -> None:
    assert cli("plan", "--model", from_image_folder, "--size", "32x32").status == 0


@pytest.mark.long
def test_a_batch_of_two_images(
    cli: Cli, from_image_folder: Path, photos: Path, tmp_path: Path
) -> None:
    manifest = photos / "rows.jsonl"
    manifest.write_text(
        '{"prompt": "a red circle", "image": "a.png"}\n'
        '{"prompt": "a red circle", "image": "b.jpg"}\n'
    )
    out = tmp_path / "batch"
    asked = ("batch", manifest, "-o", out, "--model", from_image_folder, *SMALL, "--json")
    assert cli(*asked).last["done"] == 2
    records = [sidecar.read(it) for it in out.glob("a-red-circle-*.json")]
    assert len({it.frames_sha256 for it in records}) == 2
    assert {it.request.image for it in records} == {str(photos / it) for it in ("a.png", "b.jpg")}
    assert cli(*asked, "--dry-run").last["left"] == 0
    Image.new("RGB", (32, 32)).save(photos / "a.png")
    assert cli(*asked, "--dry-run").last["left"] == 1
