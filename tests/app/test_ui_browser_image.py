"""The field for an image in headless Chromium: shown where the model takes one, kept, restored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from browsing import SMALL, Page, Server

from kinora.pipelines import images, sidecar

pytestmark = pytest.mark.long

SHOWN = "#k-image-shown img.k-image"


def test_a_video_is_made_from_a_dropped_image_and_restored(
    page: Page, server: Server, wan_folder: Path, from_image_folder: Path, tmp_path: Path
) -> None:
    assert not page.count("#k-image:visible")
    page.fill(model=from_image_folder)
    page.until(lambda: page.count("#k-image:visible"))
    page.until(lambda: page.value("steps") == "50")
    page.fill(**SMALL, prompt="a red circle", seed=4)
    page.generate("failed")
    assert "makes a video from an image: say which by Image" in page.text("status")
    bad, good = tmp_path / "<b>bad.png", tmp_path / "good.png"
    bad.write_text("<svg/>")
    values = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(values).save(good)
    page.drop(bad, "image-dropped")
    page.until(lambda: "is no image that can be read" in page.text("image-shown"))
    page.drop(good, "image-dropped")
    page.until(lambda: page.count(SHOWN))
    page.generate("done")
    made = server.path("a-red-circle-s4.json")
    assert sidecar.read(made).request.image_sha256 == images.sha256(good.read_bytes())
    page.fill(model=wan_folder)
    page.until(lambda: not page.count("#k-image:visible"))
    page.find("#k-restore > button").click()
    page.drop(made)
    page.until(lambda: page.count(SHOWN) and page.value("seed") == "4")
    page.fill(seed=5)
    page.press("generate")
    page.until(lambda: "a-red-circle-s5.json" in server.files())
    again = sidecar.read(server.path("a-red-circle-s5.json")).request
    assert again.image_sha256 == images.sha256(good.read_bytes())
