"""Media files: frames to bytes and back, with Kinora's record inside the container.

png goes through imageio's pillow plugin, and all reading through imageio. mp4 and webm are encoded
with av itself, because imageio's pyav plugin passes no options to the encoder: with it, crf 0 and
crf 45 give the same bytes (imageio 2.38, av 18.1). gif is put together from Pillow's parts, because
Pillow merges equal frames into one, and a clip in which something stands still would be shorter.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import SidecarError
from .request import FORMATS, Format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Frames = NDArray[np.uint8]
    """RGB frames `[F, height, width, 3]`."""

_PNG_KEY = "kinora"
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": ("libx264", {"crf": "18"}),
    # For VP9, constant quality needs the bit rate set to none.
    "webm": ("libvpx-vp9", {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1"}),
}


def encode(frames: Frames, media: Format, fps: float, comment: str) -> bytes:
    """One complete media file of `frames` `[F, height, width, 3]`, carrying `comment`.

    mp4 is H.264 (crf 18) and webm VP9, both yuv420p and BT.709; an odd side is padded by repeating
    its last line. gif rounds the time of a frame to 10 ms. png is lossless, animated if F > 1. The
    same frames and comment give the same bytes.
    """
    if frames.dtype != "uint8" or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 [F, height, width, 3], not {frames.shape}")
    if media in ENCODERS:
        return _encode_video(frames, media, fps, comment)
    return (
        _encode_gif(frames, fps, comment) if media == "gif" else _encode_png(frames, fps, comment)
    )


def read_frames(path: Path) -> Frames:
    """All frames of a media file, `[F, height, width, 3]`, as they decode."""
    import imageio.v3 as iio
    import numpy as np

    if path.suffix.lower() in (".png", ".gif"):
        frames = iio.imread(path, plugin="pillow", mode="RGB", index=None)
    else:
        frames = iio.imread(path, plugin="pyav", format="rgb24")
    array = np.asarray(frames, dtype=np.uint8)
    return array if array.ndim == 4 else array[None]


def read_first_frame(path: Path) -> NDArray[np.uint8]:
    """The first frame of a media file, `[height, width, 3]`. Raises `OSError` or `ValueError`."""
    import imageio.v3 as iio
    import numpy as np

    if path.suffix.lower() in (".png", ".gif"):
        frame = iio.imread(path, plugin="pillow", mode="RGB", index=0)
    else:
        frame = iio.imread(path, plugin="pyav", format="rgb24", index=0)
    return np.asarray(frame, dtype=np.uint8)


def read_comment(path: Path) -> str:
    """The text embedded by `encode`. Raises `SidecarError` if there is none."""
    import imageio.v3 as iio

    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise SidecarError(f"{path} is no media file of ours: {', '.join(FORMATS)}")
    try:
        if path.suffix.lower() in (".gif", ".png"):
            found = iio.immeta(path, plugin="pillow")
            text = found.get("comment" if path.suffix.lower() == ".gif" else _PNG_KEY)
        else:
            with cast("Any", iio.imopen(path, "r", plugin="pyav")) as file:
                tags = {key.lower(): value for key, value in file.container_metadata.items()}
            text = tags.get("comment")
    except (OSError, ValueError, IndexError) as error:
        # Of what is no media file the libraries say only which of them it was.
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise SidecarError(f"{path} is no video or image that can be read{why}") from error
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if not isinstance(text, str):
        raise SidecarError(f"{path} carries no record: not made by Kinora, or re-encoded since")
    return text


def _encode_video(frames: Frames, media: str, fps: float, comment: str) -> bytes:
    import av
    import numpy as np
    from av.video.reformatter import ColorRange, Colorspace

    even = np.pad(
        frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge"
    )
    codec, options = ENCODERS[media]
    buffer = io.BytesIO()
    # Without it, webm files get random numbers for names of the file and its track.
    exact = {"fflags": "bitexact"}
    with av.open(buffer, "w", format=media, container_options=exact) as container:
        container.metadata["comment"] = comment
        rate = Fraction(fps).limit_denominator(65535)
        stream = cast("Any", container.add_stream(codec, rate, options=options))
        stream.height, stream.width, stream.pix_fmt = even.shape[1], even.shape[2], "yuv420p"
        context = stream.codec_context
        # Say what the numbers mean, or players guess from the size: BT.709 throughout.
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries = context.color_trc = 1
        for picture in even:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def _encode_png(frames: Frames, fps: float, comment: str) -> bytes:
    import imageio.v3 as iio
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt(_PNG_KEY, comment, zip=True)
    options: dict[str, Any] = {"duration": 1000 / fps, "pnginfo": text}
    buffer = io.BytesIO()
    with cast("Any", iio.imopen(buffer, "w", plugin="pillow", extension=".png")) as file:
        if len(frames) == 1:
            file.write(frames[0], is_batch=False, **options)
        else:
            # Without transparency both ways of blending mean the same, but Pillow merges equal
            # frames only where they also agree in this.
            blend = [index % 2 for index in range(len(frames))]
            file.write(frames, is_batch=True, blend=blend, **options)
    return buffer.getvalue()


def _encode_gif(frames: Frames, fps: float, comment: str) -> bytes:
    from PIL import Image
    from PIL.GifImagePlugin import getdata, getheader

    duration_ms = max(10, round(100 / fps) * 10)
    parts: list[bytes] = []
    for index, frame in enumerate(frames):
        top, bottom, left, right = _changed_box(frames, index)
        picture = Image.fromarray(frame[top:bottom, left:right])
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
        if index == 0:
            parts += getheader(picture, info={"loop": 0, "comment": comment.encode()})[0]
        parts += getdata(picture, (left, top), duration=duration_ms, include_color_table=index > 0)
    return b"".join([*parts, b";"])


def _changed_box(frames: Frames, index: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what differs from the frame before; one pixel at least."""
    import numpy as np

    if index == 0:
        return 0, frames.shape[1], 0, frames.shape[2]
    rows, columns = np.nonzero((frames[index] != frames[index - 1]).any(axis=-1))
    if not len(rows):
        return 0, 1, 0, 1
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
