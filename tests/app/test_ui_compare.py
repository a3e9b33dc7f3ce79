"""What a comparison says: nearness to the dense video, speed by stage, the judge's verdict."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from kinora.accel.receipt import AttentionReceipt, Receipt
from kinora.app.ui import compare
from kinora.pipelines import cards
from kinora.pipelines.errors import KinoraError
from kinora.pipelines.media import encode
from kinora.pipelines.request import Request, resolve
from kinora.pipelines.sidecar import Machine, ModelRecord, Record

PROMPT = "a red <circle>"
BALANCED = {"title": "x", "attention": {"method": "blade"}}


def attention(**kernels: int) -> AttentionReceipt:
    """Eight calls, those dense that no kernel has."""
    dense = {"because": 8 - sum(kernels.values())} if sum(kernels.values()) < 8 else {}
    return AttentionReceipt(
        asked="blade", layers=1, calls=8, kernels=kernels, dense=dense, fallbacks=[], density=0.5,
        density_by_layer=[0.5],
    )  # fmt: skip


def record(recipe: dict[str, Any], **stages_s: float) -> Record:
    """What a sidecar says of a video that took so long."""
    request = resolve(Request(prompt=PROMPT, width=96, height=96), cards.find("kinora-tiny"))
    receipt = Receipt(
        recipe=recipe, strict=False, steps=2, attention=attention(cpu=8) if recipe else None,
        stages_s=stages_s,
    )  # fmt: skip
    model = ModelRecord(name="m", pipeline="p", repo=None, fingerprint="f", vae_dtype="float32")
    return Record(
        request=request.model_copy(update={"recipe": recipe}), model=model,
        machine=Machine(device="cpu", threads=1, versions={}), created="today",
        latents_sha256="l", receipt=receipt,
    )  # fmt: skip


def videos(folder: Path, *levels: int) -> tuple[Any, list[Any]]:
    """Files of one grey each, as jobs that are done."""
    seen: list[Any] = []
    for number, level in enumerate(levels):
        frames = np.full((5, 96, 96, 3), level, np.uint8)
        path = folder / f"{number}.png"
        path.write_bytes(encode(frames, "png", 16, ""))
        kept = record(BALANCED if number else {}, text=0.01, denoise=8.0 / (1 + number), decode=1.0)
        seen.append(SimpleNamespace(name=f"video_{number}", job=path, record=kept))
    return SimpleNamespace(media=lambda job: job), seen


def test_videos_are_measured_against_the_first(tmp_path: Path) -> None:
    jobs, seen = videos(tmp_path, 100, 100, 110)
    first, same, other = compare.measure(jobs, seen)
    assert first.fidelity == {} and first.correct is None, "the prompt is none of the world's"
    assert (same.fidelity["psnr"].score, same.fidelity["ssim"].score) == (100.0, 1.0)
    assert other.fidelity["psnr"].score == pytest.approx(20 * np.log10(255 / 10))
    assert (other.fidelity["ssim"].score or 1) < 1


def test_figures_say_how_fast_and_how_near(tmp_path: Path) -> None:
    html = compare.shown(compare.measure(*videos(tmp_path, 100, 100, 110)))
    assert "<td>8.00 s</td><td>4.00 s <b>2.00×</b></td><td>2.67 s <b>3.00×</b></td>" in html
    assert "<td>9.01 s</td><td>5.01 s <b>1.80×</b></td>" in html, "of all three stages"
    assert "<td>0.01 s</td><td>0.01 s</td>" in html, "too short for a ratio"
    assert "<td>–</td><td>equal</td><td>28.13 dB</td>" in html
    assert html.count("<video") == 3 and 'data-frames="33"' in html
    assert "<circle>" not in html and "shows what was asked" not in html
    assert "since the model was loaded" not in html


def test_what_ran_dense_has_no_ratio(tmp_path: Path) -> None:
    jobs, seen = videos(tmp_path, 100, 100, 110)
    dense = seen[1].record.receipt.model_copy(update={"attention": attention()})
    seen[1].record = seen[1].record.model_copy(update={"receipt": dense})
    html = compare.shown(compare.measure(jobs, seen))
    assert "<td>8.00 s</td><td>4.00 s</td><td>2.67 s <b>3.00×</b></td>" in html
    assert "ran: all 8 attention calls dense" in html


def test_that_the_model_was_loaded_is_told(tmp_path: Path) -> None:
    jobs, seen = videos(tmp_path, 1, 1)
    seen[0].record = record({}, load=3.0, text=0.1, denoise=1.0, decode=1.0)
    assert "since the model was loaded" in compare.shown(compare.measure(jobs, seen))


def test_a_sidecar_that_is_gone_is_one_line(tmp_path: Path) -> None:
    jobs, seen = videos(tmp_path, 1, 1)
    seen[1].record = None
    with pytest.raises(KinoraError, match="video_1 has no sidecar any more"):
        compare.measure(jobs, seen)
