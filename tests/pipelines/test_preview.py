"""Previews show what a run is heading for, and change nothing of it."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kinora.pipelines import cards, models, preview
from kinora.pipelines.batch import making
from kinora.pipelines.errors import Cancelled
from kinora.pipelines.events import Progress
from kinora.pipelines.files import Destination
from kinora.pipelines.generate import generate
from kinora.pipelines.preview import Previewer
from kinora.pipelines.request import Request
from kinora.pipelines.run import Output, Run

SIZES = {"wan": (32, 32, 5), "cogvideox": (32, 32, 9), "flux": (32, 32, 1), "sdxl": (32, 32, 1)}
"""Family → a small (width, height, frames)."""
SHOWN = ("wan", "cogvideox", "sdxl")
"""Families; flux packs its latents into tokens."""


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of every step, however long it takes."""
    monkeypatch.setattr(preview, "_APART_S", 0.0)
    monkeypatch.setattr(preview, "_SHARE", float("inf"))


def request_of(family: str, folder: Path, output: Path, **fields: Any) -> Request:
    """A small run."""
    width, height, frames = SIZES[family]
    small = {"prompt": "a red circle", "model": str(folder), "steps": 4, "output": f"{output}/"}
    return Request.model_validate(
        {**small, "width": width, "height": height, "frames": frames, "device": "cpu", **fields}
    )


def made(request: Request, *, previews: bool) -> tuple[Output, list[Progress]]:
    """What came of it, and the progress that had a picture."""
    *told, run = generate(request, previews=previews)
    assert isinstance(run, Run)
    return run.outputs[0], [it for it in told if isinstance(it, Progress) and it.preview]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, ()) for family in SIZES),
        ("wan", ("attention.method=top-blocks", "attention.tile=64x64", "when=always")),
        ("wan", ("steps.policy=shadow",)),
    ],
)
def test_a_run_comes_to_the_same_bits_with_previews(
    family: str, settings: tuple[str, ...], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    steps = 14 if "steps.policy=shadow" in settings else 4
    asked = {"settings": settings, "steps": steps}
    plain, none = made(
        request_of(family, model_folders[family], tmp_path / "plain", **asked), previews=False
    )
    shown, told = made(
        request_of(family, model_folders[family], tmp_path / "shown", **asked), previews=True
    )
    assert not none
    assert (shown.latents_sha256, shown.frames_sha256) == (
        plain.latents_sha256,
        plain.frames_sha256,
    )
    if family not in SHOWN:
        assert not told
        return
    assert [it.step for it in told] == list(range(1, steps)), "of all but the last"
    for it in told:
        assert it.preview is not None
        with Image.open(io.BytesIO(it.preview)) as picture:
            assert (picture.format, picture.size) == ("JPEG", SIZES[family][:2])


@pytest.mark.parametrize("family", SHOWN)
def test_the_estimate_ends_at_what_the_run_comes_to(
    family: str, model_folders: dict[str, Path]
) -> None:
    folder = model_folders[family]
    weights = models.locate(cards.find(str(folder)))
    pipe: Any = models.load(weights, models.place(weights.card, "cpu", "auto")).pipe
    previewer, found = Previewer(pipe), list[torch.Tensor]()

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del pipe, step, timestep
        estimate = previewer._estimate()  # pyright: ignore[reportPrivateUsage]
        assert estimate is not None
        found.append(estimate)
        return tensors

    width, height, frames = SIZES[family]
    options: dict[str, Any] = {"num_frames": frames} if frames > 1 else {}
    with previewer.watching():
        result = pipe("a red circle", width=width, height=height, num_inference_steps=4,
                      output_type="latent", callback_on_step_end=on_step, **options)[0]  # fmt: skip
    end = result[0] if family == "wan" else result[0].transpose(0, 1) if frames > 1 else result[0]
    end = end if frames > 1 else end[:, None]
    near = [float((it - end).norm() / end.norm()) for it in found]
    assert len(near) == 4 and near[-1] < 1e-4 < near[0]
    assert "step" not in vars(pipe.scheduler), "nothing is left on it"


@pytest.mark.usefixtures("always")
def test_the_picture_is_the_first_frame_of_the_estimate(wan_folder: Path) -> None:
    weights = models.locate(cards.find(str(wan_folder)))
    vae: Any = models.load(weights, models.place(weights.card, "cpu", "auto")).pipe.vae
    torch.manual_seed(0)
    x0 = torch.randn(4, 2, 4, 4)
    picture = preview._decoded(vae, x0)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        whole = vae.decode(x0[None]).sample[0, :, 0].add(1).mul(127.5).clamp(0, 255)
    assert picture.shape == (32, 32, 3)
    assert np.abs(picture.numpy().astype(int) - whole.permute(1, 2, 0).numpy()).max() <= 1
    large = preview._decoded(vae, torch.randn(4, 1, 16, 96))  # pyright: ignore[reportPrivateUsage]
    assert large.shape == (80, 512, 3), "averaged to at most 64 latents a side"


def test_previews_take_a_twentieth_of_the_time(wan_folder: Path) -> None:
    weights = models.locate(cards.find(str(wan_folder)))
    pipe: Any = models.load(weights, models.place(weights.card, "cpu", "auto")).pipe
    now_s = 0.0
    pictures = list[float]()
    previewer = Previewer(pipe, lambda: now_s)

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal now_s
        now_s += 10.0
        if previewer.due:
            pictures.append(now_s)
            estimate = previewer._estimate  # pyright: ignore[reportPrivateUsage]

            def slow() -> Any:
                nonlocal now_s
                now_s += 3.0
                return estimate()

            previewer._estimate = slow  # pyright: ignore[reportPrivateUsage]
            assert previewer.picture()
            previewer._estimate = estimate  # pyright: ignore[reportPrivateUsage]
        return tensors

    with previewer.watching():
        pipe("a", width=32, height=32, num_frames=5, num_inference_steps=14, output_type="latent",
             callback_on_step_end=on_step)  # fmt: skip
    assert pictures == [10.0, 73.0, 136.0], "3 s, then none for 60"
    assert not previewer.due


@pytest.mark.usefixtures("always")
def test_a_run_can_be_stopped_while_it_is_shown(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, original = threading.Event(), preview._decoded  # pyright: ignore[reportPrivateUsage]

    def decoded(vae: Any, x0: torch.Tensor) -> torch.Tensor:
        stop.set()
        return original(vae, x0)

    monkeypatch.setattr(preview, "_decoded", decoded)
    steps: list[int] = []
    with pytest.raises(Cancelled):
        for event in generate(
            request_of("wan", wan_folder, tmp_path / "out", steps=50), stop=stop, previews=True
        ):
            if isinstance(event, Progress) and event.stage == "denoise":
                steps.append(event.step)
    assert steps == [0], "the decoder looks out for it too"
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("make", [making.Studio, making.with_previews])
def test_a_studio_shows_what_it_is_at_where_it_shall(
    make: making.Make, wan_folder: Path, tmp_path: Path
) -> None:
    told: list[Any] = []
    request = request_of("wan", wan_folder, tmp_path, recipe={})
    suffixes = (".mp4", ".json", ".latents.safetensors")
    make().make(request, Destination(tmp_path, "a", suffixes), threading.Event(), told.append)
    shown = [it for it in told if isinstance(it, Progress) and it.preview]
    assert bool(shown) == (make is making.with_previews)
