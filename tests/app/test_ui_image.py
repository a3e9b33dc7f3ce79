"""Images that videos begin with: sent to the jobs by OpenAI's client, and dropped on the page."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')
pytest.importorskip("openai", reason="the client is tested: pip install openai")

import gradio as gr
import openai
from jobserver import Served

from kinora.app.ui import spelling
from kinora.app.ui.image_field import ImageField
from kinora.pipelines import cards, images
from kinora.pipelines.errors import OutputError, RequestError
from kinora.pipelines.jobs import Uploads
from kinora.pipelines.request import Request

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
MODEL = "wan2.1-i2v-14b-480p"


def encoded(kind: str = "PNG", seed: int = 0) -> bytes:
    """An image file of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it has 60,000 times 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + (struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
        + (struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
    )


BAD = {
    "bomb.png": (bomb(), "too many pixels: 50,000,000 are the most"),
    "drawing.png": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "is no image that can be read: use PNG, JPEG or WebP",
    ),
    "page.jpg": (b"<!DOCTYPE html><html></html>", "is no image that can be read"),
    "animation.png": (encoded("GIF"), "is no image that can be read"),
    "cut.png": (encoded()[:1000], "is damaged: "),
    "cut.jpg": (encoded("JPEG")[:600], "is damaged: "),
    "large.png": (encoded() + bytes(images.MOST_BYTES), "is larger than 32 MiB"),
    "empty.png": (b"", "is no image that can be read"),
}


def uploaded(served: Served) -> list[str]:
    """What is kept of uploads."""
    folder = served.jobs.folder / ".kinora-jobs" / "images"
    return sorted(it.name for it in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(("kind", "ending"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_a_video_begins_with_what_was_sent(
    client: Any, served: Served, kind: str, ending: str
) -> None:
    raw = encoded(kind)
    # Whatever it is called: no name goes anywhere.
    for name in ("a.png", "../../x.svg", "a" * 300):
        asked = client.videos.create(prompt="a", model=MODEL, input_reference=(name, raw))
        done = client.videos.poll(asked.id, poll_interval_ms=20)
        assert done.status == "completed" and done.kinora["image_sha256"] == images.sha256(raw)
    request = served.jobs.jobs()[0].row.request
    assert uploaded(served) == [f"{images.sha256(raw)}{ending}"]
    assert request.image is not None and Path(request.image).read_bytes() == raw
    assert str(served.jobs.folder) not in str(done)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_image_is_refused_in_a_line(client: Any, served: Served, name: str) -> None:
    raw, told = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="a", model=MODEL, input_reference=(name, raw))
    assert told in caught.value.message and "\n" not in caught.value.message
    assert "input_reference" in caught.value.message
    assert served.jobs.jobs() == [] and uploaded(served) == []


def test_a_missing_and_a_needless_image_are_refused(client: Any, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="send one as input_reference, a file in a"):
        client.videos.create(prompt="a", model=MODEL)
    with pytest.raises(openai.BadRequestError, match="kinora-tiny takes no image"):
        client.videos.create(prompt="a", model="kinora-tiny", input_reference=("a.png", encoded()))
    assert served.jobs.jobs() == [] and uploaded(served) == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"input_reference": "/etc/passwd"}, "input_reference must be a file, in a form"),
        ({"input_reference": {"image_url": "http://x"}}, "input_reference must be a file"),
        ({"image": "/etc/passwd"}, "image cannot be set: send the file as input_reference"),
        ({"image_sha256": "0" * 64}, "image_sha256 cannot be set"),
        ({"image": None}, "image cannot be set"),
    ],
)
def test_no_path_comes_from_a_client(served: Served, fields: dict[str, Any], told: str) -> None:
    answer = served.ask("/v1/videos", {"prompt": "a", "model": MODEL, **fields})
    assert answer.status == 400 and told in answer.complaint


def test_a_form_takes_one_image_and_no_other_file(client: Any, served: Served) -> None:
    part = "--x\r\nContent-Disposition: form-data; name={}; filename=a.png\r\n\r\n{}\r\n"
    for names, told in (
        (("image",), "image is a file, which only input_reference is"),
        (("input_reference", "input_reference"), "input_reference is given twice"),
    ):
        body = "".join(part.format(it, "x") for it in names) + "--x--\r\n"
        headers = {"content_type": "multipart/form-data; boundary=x"}
        answer = served.ask("/v1/videos", body.encode(), **headers)
        assert answer.status == 400 and told in answer.complaint


def test_a_retry_has_the_image_still_and_one_that_was_changed_is_refused(
    client: Any, served: Served
) -> None:
    first = encoded(seed=1)
    asked = client.videos.create(prompt="flaky", model=MODEL, input_reference=("a.png", first))
    assert client.videos.poll(asked.id, poll_interval_ms=20).status == "failed"
    served.ask(f"/v1/videos/{asked.id}/retry", method="POST")
    assert client.videos.poll(asked.id, poll_interval_ms=20).status == "completed"
    request = served.jobs.jobs()[0].row.request.request()
    Path(str(request.image)).write_bytes(encoded(seed=2))
    with pytest.raises(RequestError, match="its content has changed"):
        served.jobs.resolve(request)


def test_ids_are_hashes_and_lead_nowhere_else(tmp_path: Path) -> None:
    kept = Uploads(tmp_path / "images")
    id = kept.keep(encoded(), named="a")
    (tmp_path / "images" / "x.png").write_bytes(encoded())
    (tmp_path / f"{id}.png").write_bytes(encoded())
    assert kept.fields(id) == {
        "image": str(tmp_path / "images" / f"{id}.png"), "image_sha256": id
    }  # fmt: skip
    for other in ("", "x", f"../{id}", f"{id}.png", id.upper(), f"{id}\n", "0" * 64, None):
        assert kept.find(other) is None
    with pytest.raises(RequestError, match="there is no such image any more"):
        kept.fields("/etc/passwd")


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kinora.pipelines.jobs.uploads.write_all", full)
    with pytest.raises(OutputError, match="the disk is full"):
        Uploads(tmp_path / "images").keep(encoded(), named="a")
    assert list((tmp_path / "images").iterdir()) == []


@pytest.fixture
def field(tmp_path: Path, closed_loops: None) -> ImageField:
    """The field of a page, with nothing in it."""
    del closed_loops
    with gr.Blocks(analytics_enabled=False):
        field = ImageField(cards.find(MODEL))
        field.wire(Uploads(tmp_path / "images"))
    return field


def dropped(field: ImageField, path: Path) -> tuple[str, str]:
    """The id and what the field shows once a file was dropped there."""
    update = field.take(str(path))
    assert not path.exists(), "it is forgotten"
    return update[field.id], next(it for it in update.values() if it and "<" in it)


def test_the_field_keeps_what_is_dropped_and_shows_it(field: ImageField, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    id, shown = dropped(field, tmp_path / "a.png")
    assert id == images.sha256(encoded()) and 'src="data:image/jpeg;base64,' in shown
    assert "48x32" in shown and str(tmp_path) not in shown
    assert field.standing(cards.find(MODEL), id)[field.id] == id
    assert field.standing(cards.find(MODEL), "0" * 64)[field.id] == ""
    assert field.standing(cards.find("kinora-tiny"), id)[field.id] == ""


@pytest.mark.parametrize("name", BAD)
def test_the_field_says_what_is_wrong_with_a_file(
    field: ImageField, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name][0])
    id, shown = dropped(field, path)
    assert id == "" and BAD[name][1] in shown and str(tmp_path) not in shown


def test_the_name_of_a_file_is_no_html(field: ImageField, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    path.write_bytes(b"")
    assert "<img" not in dropped(field, path)[1]


def test_the_field_shows_where_the_model_takes_an_image(field: ImageField) -> None:
    for model, expected in ((MODEL, True), ("kinora-tiny", False)):
        column = next(iter(field.standing(cards.find(model)).values()))
        assert column.visible is expected


def test_the_command_names_the_image_that_was_kept() -> None:
    request = Request(prompt="a", model=MODEL, image="/out/x.png", image_sha256="0" * 64)
    told = spelling.arguments(request)
    assert told[told.index("--image") + 1] == "/out/x.png"
    assert "--image" in spelling.inspection(request, None, None, Path("plan.png"))
    assert "image-sha256" not in " ".join(told)
