"""Images that videos begin with: what is read, what is refused, and how one fits a size."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from kinora.pipelines import images
from kinora.pipelines.errors import RequestError


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (width, height), (255, 0, 0))
    picture.paste((0, 0, 255), (width // 2, 0, width, height))
    return picture


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def why(raw: bytes) -> str:
    with pytest.raises(RequestError) as caught:
        images.decode(raw, named="given")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGB", "WEBP"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG")]
)
def test_what_is_read_is_rgb(mode: str, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    picture = halves().convert(mode)
    found = images.decode(encoded(picture, kind, **options), named="given")
    assert found.mode == "RGB" and found.size == (40, 20)
    assert (np.asarray(found) == np.asarray(picture.convert("RGB"))).all()


def test_transparency_of_a_palette_is_dropped() -> None:
    raw = encoded(halves().convert("P"), transparency=bytes([0, 255]))
    assert (np.asarray(images.decode(raw, named="given")) == np.asarray(halves())).all()


def test_sixteen_bits_of_grey_become_eight() -> None:
    ramp = np.arange(0, 2**16, 256, dtype=np.uint16).reshape(16, 16)
    found = images.decode(encoded(Image.fromarray(ramp)), named="given")
    assert (np.asarray(found)[..., 0] == ramp >> 8).all()


def test_a_turned_photograph_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = images.decode(encoded(halves(), exif=exif.tobytes()), named="given")
    assert found.size == (20, 40)
    assert found.getpixel((10, 5)) == (255, 0, 0) and found.getpixel((10, 35)) == (0, 0, 255)


def test_of_an_animation_the_first_frame_counts() -> None:
    raw = encoded(halves(), save_all=True, append_images=[Image.new("RGB", (40, 20))])
    assert images.decode(raw, named="given").getpixel((0, 0)) == (255, 0, 0)


def test_another_aspect_is_cut_in_the_middle_and_not_squashed() -> None:
    picture = Image.new("RGB", (300, 100))
    ImageDraw.Draw(picture).ellipse((130, 30, 170, 70), fill=(255, 255, 255))
    for size in ((64, 64), (64, 32), (32, 64), (96, 32)):
        found = np.asarray(images.fitted(picture, size))[..., 0] > 127
        rows, columns = np.nonzero(found)
        assert found.shape == size[::-1] and abs(np.ptp(rows) - np.ptp(columns)) <= 1
        assert abs(rows.mean() - size[1] / 2) < 1 and abs(columns.mean() - size[0] / 2) < 1


@pytest.mark.parametrize("size", [(16, 16), (48, 16), (16, 48)])
def test_an_image_of_the_size_is_taken_as_it_is(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert (np.asarray(images.fitted(Image.fromarray(values), size)) == values).all()


@pytest.mark.parametrize(("width", "height"), [(10_000, 5_001), (12_000, 9_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    assert "50,000,000 are the most" in why(bomb(width, height))


def test_what_is_too_long_is_refused() -> None:
    assert why(bytes(images.MOST_BYTES + 1)) == "the image given is larger than 32 MiB"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b"<!DOCTYPE html><html><body>hello</body></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encoded(halves(), "GIF"),
        encoded(halves(), "TIFF"),
        encoded(halves(), "BMP"),
    ],
    ids=["empty", "svg", "html", "eps", "gif", "tiff", "bmp"],
)
def test_other_formats_are_refused_whatever_they_are_called(raw: bytes) -> None:
    assert why(raw) == "given is no image that can be read: use PNG, JPEG or WebP"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    raw = encoded(Image.fromarray(noise), kind)
    told = why(raw[: len(raw) // 2])
    assert told.startswith(("the image given is damaged: ", "given is no image that can be read"))


def test_damaged_bytes_are_refused_or_read_and_never_a_fault() -> None:
    random = np.random.default_rng(0)
    for kind in images.FORMATS:
        raw = bytearray(encoded(halves(), kind))
        for _ in range(200):
            changed = bytearray(raw)
            for at in random.integers(0, len(raw), 4):
                changed[at] = random.integers(0, 256)
            try:
                images.decode(bytes(changed), named="given")
            except RequestError as error:
                assert "\n" not in str(error)


def test_a_name_says_nothing_of_the_format(tmp_path: Path) -> None:
    (tmp_path / "photo.txt").write_bytes(encoded(halves(), "JPEG"))
    raw = (tmp_path / "photo.txt").read_bytes()
    assert images.check(str(tmp_path / "photo.txt")) == images.sha256(raw)
    assert images.ending(raw) == ".jpg"


def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(halves()))
    before = images.check(str(file))
    file.write_bytes(encoded(halves(60, 20)))
    assert images.check(str(file)) == images.sha256(file.read_bytes()) != before


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, told in (
        ("none.png", r"there is no image .*none\.png: give --image the path of one"),
        ("none.png/deeper", "there is no image .*deeper: give"),
        (".", "is a folder: give a PNG, JPEG or WebP file"),
        ("pipe.png", "is no regular file: give"),
        ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(RequestError) as caught:
            images.check(str(tmp_path / name))
        assert re.search(told, str(caught.value)), str(caught.value)
