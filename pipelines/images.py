"""Images that videos begin with: read with care, known by their content, fitted to a size.

Of a file, what its first bytes say counts and not its name: only the decoders of `FORMATS` look at
it. The number of pixels is checked before any is decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RequestError, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

    from .request import Resolved

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
"""Formats that are read, with the ending that they get where they are kept."""
MOST_BYTES = 32 * 2**20
MOST_PIXELS = 50_000_000


def check(path: str) -> str:
    """The SHA-256 of the image file at `path`, of which all is read and decoded.

    Raises `RequestError` in one line where it is no image that can be used.
    """
    with _reading(path) as file:
        it = os.fstat(file.fileno())
    return _checked(path, (it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns))


@lru_cache(maxsize=1024)
def _checked(path: str, stamp: tuple[int, ...]) -> str:
    """`check` of the file that has this `stamp`: rows of a batch often share one."""
    del stamp
    raw = read(path)
    decode(raw, named=path)
    return sha256(raw)


def first_frame(request: Resolved) -> Image:
    """The image of a request, RGB, of the size of its video.

    Raises `RequestError` where the file has changed since the request was resolved.
    """
    path = request.image or ""
    raw = read(path)
    if sha256(raw) != request.image_sha256:
        raise RequestError(changed(path))
    return fitted(decode(raw, named=path), (request.width, request.height))


def changed(path: str) -> str:
    """What is said of a file that is not the one it was."""
    return (
        f"the image {shortened(path)} is not the one that this was asked for with: its content has "
        "changed; give --image the one that is meant"
    )


def sha256(raw: bytes) -> str:
    """The hash by which an image is known, of the bytes of its file."""
    return hashlib.sha256(raw).hexdigest()


def decode(raw: bytes, *, named: str) -> Image:
    """The picture in the bytes of a file, RGB, upright as its EXIF says.

    Transparency is dropped, as by diffusers' `load_image`; of an animation the first frame counts.
    Raises `RequestError` in one line, calling the file as it is `named`.
    """
    from PIL import Image, ImageOps

    named = shortened(named)
    if len(raw) > MOST_BYTES:
        raise RequestError(_too_long(named))
    try:
        picture = Image.open(io.BytesIO(raw), formats=tuple(FORMATS))
        if picture.width * picture.height > MOST_PIXELS:
            raise RequestError(
                f"the image {named} has {picture.width}x{picture.height} pixels: "
                f"{MOST_PIXELS:,} are the most"
            )
        return _rgb(ImageOps.exif_transpose(picture))
    except RequestError:
        raise
    except Image.UnidentifiedImageError:
        raise RequestError(f"{named} is no image that can be read: use PNG, JPEG or WebP") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(
            f"the image {named} has too many pixels: {MOST_PIXELS:,} are the most"
        ) from None
    except Exception as error:  # decoders of damaged files raise kinds of their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RequestError(f"the image {named} is damaged: {reason}") from None


def ending(raw: bytes) -> str:
    """The ending for an image that `decode` could read."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=tuple(FORMATS)) as picture:
        return FORMATS[str(picture.format)]


def fitted(picture: Image, size: tuple[int, int]) -> Image:
    """`picture` scaled to fill (width, height); what is beyond it is cut off evenly."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def _rgb(picture: Image) -> Image:
    if picture.mode == "P":  # whose transparency Pillow drops by way of RGBA alone
        picture = picture.convert("RGBA")
    if picture.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip at 255
        picture = picture.point(lambda value: value * (1 / 256)).convert("L")
    return picture.convert("RGB")


def read(path: str) -> bytes:
    """The bytes of a regular file that is no larger than an image. Raises `RequestError`."""
    with _reading(path) as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise RequestError(_too_long(shortened(path)))
    return raw


def _reading(path: str) -> io.BufferedReader:
    """A regular file, opened. Raises `RequestError`."""
    file = Path(path)
    named = shortened(path)
    try:
        mode = file.stat().st_mode
        if stat.S_ISREG(mode):
            return file.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError(f"there is no image {named}: give --image the path of one") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"the image {named} cannot be read ({reason})") from None
    what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise RequestError(f"the image {named} is {what}: give a PNG, JPEG or WebP file")


def _too_long(named: str) -> str:
    return f"the image {named} is larger than {MOST_BYTES // 2**20} MiB"
