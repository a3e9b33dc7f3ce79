"""Videos that begin with an image, through `generate`: what is needed, kept and repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinora.pipelines import cards, images, memory, models, planning, sidecar
from kinora.pipelines.calibrate import calibrate
from kinora.pipelines.decode import decode
from kinora.pipelines.errors import ModelError, RequestError, SidecarError
from kinora.pipelines.folder import takes_image
from kinora.pipelines.generate import generate
from kinora.pipelines.inspection import inspect
from kinora.pipelines.media import read_frames
from kinora.pipelines.request import Request, resolve
from kinora.pipelines.run import Output, Run, StageClock

Ask = Callable[..., Request]
SPARSE = ("attention.tile=64x64", "attention.keep=0.3", "when=always")


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (48, 32)) -> str:
    """A file of noise."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


@pytest.fixture
def ask(from_image_folder: Path, tmp_path: Path) -> Ask:
    """A request for 2 steps from an image of noise; keywords change it."""

    def make(**fields: Any) -> Request:
        small: dict[str, Any] = {"prompt": "a red circle", "model": str(from_image_folder)}
        small |= {"width": 32, "height": 32, "frames": 5, "steps": 2}
        small |= {"output": str(tmp_path / "out"), "image": str(tmp_path / "a.png")}
        return Request.model_validate({**small, **fields})

    picture(tmp_path / "a.png")
    return make


def finish(request: Request, **options: Any) -> tuple[Output, ...]:
    *_, last = generate(request, **options)
    assert isinstance(last, Run)
    return last.outputs


def test_the_frames_depend_on_the_image_and_on_nothing_else_of_its_file(
    ask: Ask, tmp_path: Path
) -> None:
    (first,) = finish(ask())
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.jpg")
    (copied,) = finish(ask(image=str(tmp_path / "copy.jpg")))
    (other,) = finish(ask(image=picture(tmp_path / "b.png", 1)))
    hashes = [it.frames_sha256 for it in (first, copied, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert first.latents_sha256 != other.latents_sha256


def test_the_image_is_what_stock_diffusers_is_given(ask: Ask, tmp_path: Path) -> None:
    import torch

    request = ask(format="png")
    (made,) = finish(request)
    with Image.open(tmp_path / "a.png") as file:
        given = images.fitted(file, (32, 32))
    resolved = resolve(request, cards.find(request.model))
    weights = models.locate(cards.find(request.model))
    pipe = models.load(weights, models.place(weights.card, "cpu", "float32")).pipe
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        image=given, prompt=request.prompt, width=32, height=32, num_frames=5,
        num_inference_steps=2, guidance_scale=resolved.guidance, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames[0]  # fmt: skip
    assert np.abs(read_frames(made.path) - frames * 255.0).max() <= 0.5 + 1e-3


def test_a_repeat_from_the_record_is_equal_bit_for_bit(ask: Ask, tmp_path: Path) -> None:
    large = {"width": 128, "height": 128, "recipe": "balanced", "settings": SPARSE}
    (made,) = finish(ask(**large, seed=3))
    record = sidecar.read(made.path)
    assert record.request.image == str(tmp_path / "a.png")
    assert record.request.image_sha256 == images.sha256((tmp_path / "a.png").read_bytes())
    again = record.request.model_copy(update={"output": str(tmp_path / "again")}).request()
    (repeated,) = finish(again, original=record)
    assert repeated.identical is True


def test_each_of_several_videos_begins_with_it(ask: Ask) -> None:
    both = finish(ask(num_videos=2))
    (second,) = finish(ask(seed=1))
    hashes = [it.frames_sha256 for it in (*both, second)]
    assert hashes[0] != hashes[1] == hashes[2]


@pytest.mark.parametrize("gone", [True, False])
def test_a_record_whose_image_is_gone_or_changed_is_refused(
    ask: Ask, tmp_path: Path, gone: bool
) -> None:
    (made,) = finish(ask())
    if gone:
        (tmp_path / "a.png").unlink()
    else:
        picture(tmp_path / "a.png", 5)
    with pytest.raises(RequestError) as caught:
        finish(sidecar.read(made.sidecar).request.request())
    told = "there is no image" if gone else "its content has changed"
    assert told in str(caught.value) and "--image" in str(caught.value)


def test_an_image_that_changes_while_it_waits_is_refused(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = models.load

    def slow(*args: Any) -> Any:
        picture(tmp_path / "a.png", 5)
        return load(*args)

    monkeypatch.setattr(models, "load", slow)
    with pytest.raises(RequestError, match="its content has changed"):
        finish(ask())
    assert not list((tmp_path / "out").glob("*"))


def test_what_an_image_cannot_be_for_is_refused_before_anything_loads(
    ask: Ask, wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "page.png").write_text("<svg/>")
    for fields, told in (
        (
            {"image": None},
            "(WanImageToVideoPipeline) makes a video from an image: say which by --image",
        ),
        ({"model": str(wan_folder)}, "(WanPipeline) takes no image: leave --image out"),
        ({"image": str(tmp_path / "none.png")}, "there is no image"),
        ({"image": str(tmp_path / "page.png")}, "is no image that can be read"),
        ({"image_sha256": "0" * 64}, "its content has changed"),
        ({"image": None, "image_sha256": "0" * 64}, "stands without an image"),
        ({"image": "\ud800.png"}, "is no UTF-8 text"),
    ):
        with pytest.raises(RequestError) as caught:
            finish(ask(**fields))
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_latents_are_decoded_without_the_image(ask: Ask, tmp_path: Path) -> None:
    (made,) = finish(ask(keep_latents=True))
    assert made.latents is not None
    (tmp_path / "a.png").unlink()
    *_, run = decode(made.latents, output=str(tmp_path / "decoded.mp4"))
    assert isinstance(run, Run)
    before, after = sidecar.read(made.sidecar), sidecar.read(run.outputs[0].sidecar)
    assert before.frames_sha256 == after.frames_sha256
    assert after.request.image_sha256 == before.request.image_sha256 is not None


def test_encoding_the_image_is_no_part_of_denoising(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    switch = StageClock.switch
    monkeypatch.setattr(
        StageClock, "switch", lambda clock, stage: (seen.append(stage), switch(clock, stage))[1]
    )
    finish(ask())
    # The prompt (and none, for guidance), the image, and the clip that begins with it.
    assert seen[: seen.index("save")].count("text") == 3


def test_sparse_attention_runs_as_without_an_image(ask: Ask, tmp_path: Path) -> None:
    large = {"width": 128, "height": 128, "steps": 5, "recipe": "balanced", "settings": SPARSE}
    (sparse,) = finish(ask(**large))
    assert sparse.receipt is not None and sparse.receipt.attention is not None
    assert sparse.receipt.attention.kernels == {"cpu": 4 * 2 * 2}
    (other,) = finish(ask(**large, image=picture(tmp_path / "b.png", 1)))
    hashes = [it.frames_sha256 for it in (sparse, other)]
    assert hashes[0] != hashes[1]


def test_a_step_policy_runs_too(ask: Ask) -> None:
    settings = ("steps.policy=pattern",)
    (made,) = finish(ask(steps=12, recipe="dense", settings=settings))
    assert made.receipt is not None and made.receipt.policy is not None


def test_a_plan_can_be_made_and_a_run_looked_at(ask: Ask, tmp_path: Path) -> None:
    fields = {"width": 128, "height": 128, "steps": 2, "recipe": "balanced", "settings": SPARSE}
    predicted = planning.plan(ask(**fields, image=None))
    assert [it.verdict for it in predicted.parts] == ["ok"]
    asked = ask(**fields, device="cpu")
    assert inspect(asked, step=1, report=lambda _: None).view.site.step == 1
    with pytest.raises(RequestError, match="makes a video from an image"):
        inspect(ask(**fields, image=None), report=lambda _: None)
    made = calibrate(asked, tmp_path / "paro.npz", keep=0.4, report=lambda _: None)
    assert made.path.is_file()


def test_the_image_encoder_counts_in_predictions(from_image_folder: Path) -> None:
    weights = models.locate(cards.find(str(from_image_folder)))
    encoder = weights.numel["image_encoder"]
    assert encoder > 0

    def peak(numel: dict[str, int]) -> int:
        grid = weights.card.grid(32, 32, 5)
        return memory.estimate(
            weights.folder, numel, grid, pixels=(5, 32, 32), dtype="float32",
            vae_dtype="float32", resident=False,
        ).peak  # fmt: skip

    without = {part: count for part, count in weights.numel.items() if part != "image_encoder"}
    assert peak(weights.numel) - peak(without) == 4 * encoder
    registered = models.outline(cards.find("wan2.1-i2v-14b-480p")).numel
    assert registered["image_encoder"] == 631_000_000


def test_which_pipelines_take_an_image_agrees_with_what_they_accept() -> None:
    """Of all text-to-something classes of diffusers that report their steps and can be loaded."""
    import diffusers

    found: list[str] = []
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None) if takes_image(name) else None
        accepted = models.call_parameters(kind) if isinstance(kind, type) else set[str]()
        if {"prompt", "callback_on_step_end"} <= accepted and "video" not in accepted:
            assert "image" in accepted, name
            found.append(name)
    known = {"WanImageToVideoPipeline", "CogVideoXImageToVideoPipeline", "LTXImageToVideoPipeline"}
    assert known | {"HunyuanVideoImageToVideoPipeline", "Kandinsky5I2VPipeline"} <= set(found)
    assert not any(map(takes_image, ("WanPipeline", "LTXPipeline", "FluxKontextPipeline")))


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "FluxKontextPipeline"])
def test_pipelines_that_change_images_are_still_refused(
    from_image_folder: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "model"
    shutil.copytree(from_image_folder, path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    weights = models.locate(cards.find(str(path)))
    with pytest.raises(ModelError, match="neither from text alone nor from text and one image"):
        models.pipeline_class(weights.folder)


def test_a_record_with_an_image_of_the_wrong_kind_is_malformed(ask: Ask, tmp_path: Path) -> None:
    (made,) = finish(ask())
    content = json.loads(made.sidecar.read_text())
    content["request"]["image"] = 5
    made.sidecar.write_text(json.dumps(content))
    with pytest.raises(SidecarError, match="image must be text"):
        sidecar.read(made.sidecar)
