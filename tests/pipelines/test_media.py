"""Media files: what goes in comes out, with the record, at any size."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from kinora.pipelines import media
from kinora.pipelines.errors import SidecarError
from kinora.pipelines.request import FORMATS, Format

COMMENT = '{"prompt": "größe × 円 \\" \\n"}' * 200
TOLERANCE: dict[str, float] = {"mp4": 5.0, "webm": 5.0, "gif": 3.0, "png": 0.0}


def clip(frames: int, height: int, width: int) -> np.ndarray:
    """A red disc that moves right over blue."""
    y, x = np.mgrid[:height, :width]
    pictures = np.zeros((frames, height, width, 3), dtype=np.uint8)
    pictures[:] = (20, 40, 200)
    for index in range(frames):
        pictures[index, (y - height / 2) ** 2 + (x - 8 - 2 * index) ** 2 < 36] = (220, 30, 30)
    return pictures


@pytest.mark.parametrize("media_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32, 48), (9, 32, 48), (9, 33, 47), (2, 16, 16)])
def test_frames_and_record_survive(
    tmp_path: Path, media_format: Format, shape: tuple[int, int, int]
) -> None:
    frames = clip(*shape)
    path = tmp_path / f"clip.{media_format}"
    path.write_bytes(media.encode(frames, media_format, 16.0, COMMENT))
    assert media.read_comment(path) == COMMENT
    back = media.read_frames(path)
    assert len(back) == shape[0]
    padded = media_format in ("mp4", "webm")
    expected = (shape[1] + shape[1] % 2, shape[2] + shape[2] % 2) if padded else shape[1:]
    assert back.shape[1:3] == expected
    # The median: halved colour planes blur the disc's edge, which is much of so small a picture.
    error = np.median(np.abs(back[:, : shape[1], : shape[2]].astype(float) - frames))
    assert error <= TOLERANCE[media_format]


@pytest.mark.parametrize("media_format", FORMATS)
def test_the_same_frames_make_the_same_file(media_format: Format) -> None:
    frames = clip(9, 32, 48)
    assert media.encode(frames, media_format, 16.0, "{}") == media.encode(
        frames, media_format, 16.0, "{}"
    )


@pytest.mark.parametrize("media_format", FORMATS)
def test_frames_that_repeat_are_kept(tmp_path: Path, media_format: Format) -> None:
    """Pillow would merge them: a clip in which something stands still would lose its length."""
    moving = clip(3, 32, 48)
    frames = np.concatenate([moving[:1]] * 4 + [moving] + [moving[2:]] * 5)
    for given in (frames, frames[:4]):
        path = tmp_path / f"{len(given)}.{media_format}"
        path.write_bytes(media.encode(given, media_format, 10.0, COMMENT))
        back = media.read_frames(path)
        assert len(back) == len(given) and media.read_comment(path) == COMMENT
        error = np.median(np.abs(back.astype(float) - given))
        assert error <= TOLERANCE[media_format]
        with av.open(path) as container:  # what others see
            times = [float(frame.time or 0) for frame in container.decode(video=0)]
        assert np.allclose(np.diff(times), 0.1) and len(times) == len(given)


@pytest.mark.parametrize(("media_format", "rate"), [("mp4", 16.0), ("webm", 23.976), ("mp4", 8.0)])
def test_the_frame_rate_is_in_the_file(tmp_path: Path, media_format: Format, rate: float) -> None:
    import imageio.v3 as iio

    path = tmp_path / f"clip.{media_format}"
    path.write_bytes(media.encode(clip(12, 32, 32), media_format, rate, "{}"))
    assert iio.immeta(path, plugin="pyav")["fps"] == pytest.approx(rate, rel=1e-3)


def test_the_encoder_takes_the_quality_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """imageio's pyav plugin drops encoder options silently; ours must reach the encoder."""
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    good = len(media.encode(noise, "mp4", 8.0, "{}"))
    monkeypatch.setitem(media.ENCODERS, "mp4", ("libx264", {"crf": "45"}))
    assert len(media.encode(noise, "mp4", 8.0, "{}")) < good / 2


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 8, 3), (2, 8, 8, 4)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames must be"):
        media.encode(np.zeros(shape, dtype=np.uint8), "png", 8.0, "{}")


def test_files_without_a_record(tmp_path: Path) -> None:
    import imageio.v3 as iio

    iio.imwrite(tmp_path / "plain.png", np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(SidecarError, match="carries no record"):
        media.read_comment(tmp_path / "plain.png")
