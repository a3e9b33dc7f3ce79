"""Fidelity: what scikit-image says, equal clips, and damage that grows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import skimage.metrics

from kinora.eval import fidelity
from kinora.eval.fidelity import FRAME_METRICS, compare
from kinora.eval.registry import METRICS
from kinora.eval.world.corruptions import VIDEO_CORRUPTIONS

Clips = list[tuple[Any, Any]]
ORACLE: Any = skimage.metrics


@pytest.fixture(scope="module")
def clip(truth: Clips) -> Any:
    return truth[1][1][:4]


def noisy(clip: Any, strength: float, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return np.clip(clip + rng.normal(0, strength, clip.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [(128, 128), (11, 64), (33, 12)])
@pytest.mark.parametrize("strength", [1, 20, 90])
def test_psnr_and_ssim_are_those_of_scikit_image(clip: Any, side: Any, strength: float) -> None:
    height, width = side
    a, b = noisy(clip, strength)[:, :height, :width], clip[:, :height, :width]
    pairs = list(zip(b, a, strict=True))
    expected = [ORACLE.peak_signal_noise_ratio(*it, data_range=255) for it in pairs]
    np.testing.assert_allclose(fidelity.psnr(a, b), expected, rtol=1e-12)
    window: dict[str, Any] = {
        "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False,
    }  # fmt: skip
    expected = [
        ORACLE.structural_similarity(*it, channel_axis=-1, data_range=255, **window) for it in pairs
    ]
    np.testing.assert_allclose(fidelity.ssim(a, b), expected, atol=1e-12)


def slow_ms_ssim(a: Any, b: Any, weights: list[float]) -> float:
    """One frame, from the definition, by scipy's filter."""
    means: list[float] = []
    for channel in range(a.shape[-1]):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        product = 1.0
        for index, weight in enumerate(weights):

            def blur(image: Any) -> Any:
                return scipy.ndimage.gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

            mx, my = blur(x), blur(y)
            vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
            term = (2 * cov + 58.5225) / (vx + vy + 58.5225)
            if index == len(weights) - 1:
                term = term * (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025)
            product *= max(term.mean(), 0.0) ** weight
            rows, columns = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
            x, y = (
                it[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2).mean((1, 3))
                for it in (x, y)
            )
        means.append(product)
    return float(np.mean(means))


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (175, 4), (128, 4), (45, 3), (11, 1)])
def test_ms_ssim_is_its_definition(clip: Any, side: int, scales: int) -> None:
    b = np.tile(clip[:1], (1, 2, 2, 1))[:, 30 : 30 + side, 20 : 20 + side]
    a = noisy(b, 12)
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales]
    weights = [it / sum(weights) for it in weights]
    assert fidelity.scales(a) == scales
    assert fidelity.ms_ssim(a, b)[0] == pytest.approx(slow_ms_ssim(a[0], b[0], weights), abs=1e-12)
    notes = compare(a, b, "ms_ssim").notes
    assert [f"ms_ssim of {scales} of its 5 scales" in it for it in notes] == [True] * (scales < 5)


def test_a_clip_is_equal_to_itself(truth: Clips) -> None:
    equal = {"psnr": 100.0, "ssim": 1.0, "ms_ssim": 1.0, "relative_l1": 0.0, "cosine": 1.0}
    for _, video in (*truth[:3], (None, np.zeros_like(truth[0][1]))):
        for name, value in equal.items():
            result = compare(video, video.copy(), name)
            assert result.status == "ok" and result.score == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("name", FRAME_METRICS)
@pytest.mark.parametrize(
    ("damage", "strengths"),
    [("noise", (2, 6, 18, 50)), ("blur", (0.6, 1.2, 2.4)), ("h264", (10, 28, 40))],
)
def test_more_damage_is_a_worse_score(
    truth: Clips, name: str, damage: str, strengths: tuple[float, ...]
) -> None:
    hurt: Callable[..., Any] = VIDEO_CORRUPTIONS[damage]
    for _, video in truth[:2]:
        clip = video[:6]
        scores = [compare(clip, clip, name).score]
        scores += [compare(hurt(clip, it), clip, name).score for it in strengths]
        sign = 1 if METRICS[name].better == "more" else -1
        assert all(a is not None and b is not None for a, b in pairwise(scores))
        assert all(sign * (a or 0) > sign * (b or 0) for a, b in pairwise(scores)), (damage, scores)


def test_eight_bits_do_not_wrap() -> None:
    black, grey = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 200, np.uint8)
    expected = 10 * np.log10(255**2 / 200**2)
    for pair in itertools.permutations((black, grey)):
        assert fidelity.psnr(*pair)[0] == pytest.approx(expected)
    assert fidelity.relative_l1(black, grey)[0] == 1.0


def test_what_cannot_be_compared_says_why(clip: Any) -> None:
    assert compare(clip, clip[:3], "psnr").status == "failed"
    assert "4 frames of 128x128" in compare(clip, clip[:3], "psnr").reason
    small = clip[:, :10]
    assert compare(small, small, "ssim").status == "skipped"
    with pytest.raises(ValueError, match="at least 11 px, not 4 frames of 128x10"):
        fidelity.ssim(small, small)
    black = np.zeros_like(clip)
    told = compare(clip, black, "relative_l1")
    assert told.status == "skipped" and "frame 0 of the reference is all black" in told.reason
    assert compare(clip, black, "cosine").score == 0.0


def test_values_by_frame_are_told(clip: Any) -> None:
    other = clip.copy()
    other[2] = noisy(clip[2:3], 20)[0]
    frames = compare(other, clip, "psnr").details["frames"]
    assert frames[0] == frames[1] == frames[3] == 100.0 and 10 < frames[2] < 40
