"""`generate` as a library call: events, cancelling, repeatability, and what is left on the pipe."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinora.pipelines import cards, files, frames, media, models, sidecar
from kinora.pipelines.chatter import relayed
from kinora.pipelines.decode import decode
from kinora.pipelines.errors import Cancelled, GenerationError, KinoraError, OutputError
from kinora.pipelines.events import STAGES, Notice, Progress
from kinora.pipelines.generate import generate
from kinora.pipelines.request import Request
from kinora.pipelines.run import Output, Run
from kinora.pipelines.saving import Kept
from kinora.pipelines.worker import Event


@pytest.fixture
def ask(wan_folder: Path, tmp_path: Path) -> Callable[..., Request]:
    """A small request for the tiny Wan pipeline; keywords change it."""

    def make(**fields: Any) -> Request:
        small = {"prompt": "a red circle", "model": str(wan_folder), "width": 32, "height": 32}
        small |= {"frames": 5, "steps": 3, "output": str(tmp_path / "out")}
        return Request.model_validate({**small, **fields})

    return make


@pytest.fixture
def shelf(wan_folder: Path) -> models.Shelf:
    """A shelf on which the tiny Wan pipeline lies already."""
    held = models.Shelf()
    weights = models.locate(cards.find(str(wan_folder)))
    held.take(weights, models.place(weights.card, "cpu", "auto"))
    return held


def pipe_of(shelf: models.Shelf, wan_folder: Path) -> Any:
    """The pipeline on the shelf."""
    weights = models.locate(cards.find(str(wan_folder)))
    return shelf.take(weights, models.place(weights.card, "cpu", "auto")).pipe


def finish(request: Request, **options: Any) -> Run:
    """Run to the end and return the run."""
    *_, last = generate(request, **options)
    assert isinstance(last, Run)
    return last


def state_of(pipe: Any) -> list[Any]:
    """What a run could leave behind on a pipeline's instances."""
    found: list[Any] = [dict(vars(pipe))]
    for module in (pipe.vae, pipe.transformer, pipe.text_encoder):
        found.append(sorted(vars(module)))
        found.append([len(part._forward_pre_hooks) for part in module.modules()])
        found.append([len(part._forward_hooks) for part in module.modules()])
    return found


def test_events_come_in_order_and_end_with_the_run(ask: Callable[..., Request]) -> None:
    events = list(generate(ask(num_videos=2)))
    run = events[-1]
    assert isinstance(run, Run)
    progress = [event for event in events if isinstance(event, Progress)]
    for video in (1, 2):
        steps = [(e.step, e.steps) for e in progress if e.video == video and e.stage == "denoise"]
        assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    order = [event.stage for event in progress if event.video == 1]
    assert order == ["load", "text", *["denoise"] * 4, "save", "decode", "save"]
    elapsed = [event.elapsed_s for event in progress]
    assert elapsed == sorted(elapsed) and elapsed[-1] <= run.total_s
    assert progress[-4].eta_s is not None


def test_stage_times_add_up_to_the_wall_time(ask: Callable[..., Request]) -> None:
    from time import perf_counter

    began = perf_counter()
    run = finish(ask())
    wall_s = perf_counter() - began
    assert set(run.stages_s) == set(STAGES)
    assert all(seconds > 0 for seconds in run.stages_s.values())
    assert run.total_s == pytest.approx(wall_s, abs=0.1)


def test_video_k_equals_the_single_video_of_seed_plus_k(
    ask: Callable[..., Request], shelf: models.Shelf
) -> None:
    many = finish(ask(num_videos=3, seed=5), shelf=shelf)
    assert [output.seed for output in many.outputs] == [5, 6, 7]
    assert len({output.frames_sha256 for output in many.outputs}) == 3
    for output in many.outputs:
        single = finish(ask(seed=output.seed), shelf=shelf).outputs[0]
        assert single.frames_sha256 == output.frames_sha256
        assert single.latents_sha256 == output.latents_sha256
        assert sidecar.read(output.sidecar).request.num_videos == 1


def test_a_fresh_model_gives_the_same_bits_as_a_used_one(
    ask: Callable[..., Request], shelf: models.Shelf
) -> None:
    used = [finish(ask(), shelf=shelf).outputs[0].frames_sha256 for _ in range(2)]
    assert finish(ask()).outputs[0].frames_sha256 == used[0] == used[1]


def test_frames_equal_those_of_the_stock_pipeline(
    ask: Callable[..., Request], shelf: models.Shelf, wan_folder: Path
) -> None:
    made = finish(ask(format="png"), shelf=shelf).outputs[0]
    stock = pipe_of(shelf, wan_folder)(
        prompt="a red circle", width=32, height=32, num_frames=5, num_inference_steps=3,
        guidance_scale=5.0, generator=torch.Generator("cpu").manual_seed(0), output_type="np",
    )  # fmt: skip
    expected = (stock.frames[0] * 255).round().astype(np.uint8)
    assert np.array_equal(media.read_frames(made.path), expected)
    assert frames.sha256(expected) == made.frames_sha256


def closed(run: Generator[Event, None, None], _: threading.Event) -> None:
    """End a run as Ctrl-C does."""
    run.close()


def stopped(run: Generator[Event, None, None], stop: threading.Event) -> None:
    """End a run as another thread does, which has no hold of the generator."""
    stop.set()
    with pytest.raises(Cancelled):
        list(run)


End = Callable[[Generator[Event, None, None], threading.Event], None]
both_ends = pytest.mark.parametrize("end", [closed, stopped])


@both_ends
@pytest.mark.parametrize("stage", ["load", "text", "denoise", "decode"])
def test_ending_early_leaves_nothing_but_latents_that_are_whole(
    ask: Callable[..., Request],
    shelf: models.Shelf,
    wan_folder: Path,
    tmp_path: Path,
    stage: str,
    end: End,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish(ask(output=str(tmp_path / "warm")), shelf=shelf)  # diffusers adds notes of its own
    vae = pipe_of(shelf, wan_folder).vae
    decode = vae.decode

    def slow_decode(*args: Any, **options: Any) -> Any:
        time.sleep(2)  # longer than the test may be kept from closing
        return decode(*args, **options)

    if stage == "decode":
        monkeypatch.setattr(vae, "decode", slow_decode)
    before = state_of(pipe_of(shelf, wan_folder))
    stop = threading.Event()
    kept = list[Kept]()
    request = ask(steps=200 if stage != "decode" else 3)
    run = generate(request, shelf=shelf, stop=stop, unfinished=kept)
    steps = 0
    for event in run:
        assert isinstance(event, Progress | Notice)
        if isinstance(event, Progress) and event.stage == stage:
            steps = event.step
            break
    end(run, stop)
    assert steps < 3
    if stage == "decode":
        assert list((tmp_path / "out").iterdir()) == [kept[0].path]
    else:
        assert not kept and not (tmp_path / "out").exists()
    after = state_of(pipe_of(shelf, wan_folder))
    changed = {"_current_timestep", "_num_timesteps", "_guidance_scale", "_guidance_scale_2"}
    changed |= {"_attention_kwargs", "_interrupt"}  # diffusers' own notes of its last call
    for state in (before, after):
        state[0] = {key: it for key, it in state[0].items() if key not in changed}
    assert before == after
    assert finish(ask(), shelf=shelf).outputs[0].path.is_file()


@both_ends
def test_cancelling_takes_effect_within_one_step(
    ask: Callable[..., Request], shelf: models.Shelf, wan_folder: Path, end: End
) -> None:
    pipe = pipe_of(shelf, wan_folder)
    calls: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        stop = threading.Event()
        run = generate(ask(steps=200, guidance=1.0), shelf=shelf, stop=stop)
        for event in run:
            if isinstance(event, Progress) and event.step == 5:
                at_end = len(calls)
                end(run, stop)
                assert len(calls) <= at_end + 1
                break
    finally:
        hook.remove()
    assert 5 <= len(calls) < 200


@both_ends
@pytest.mark.parametrize("keep_latents", [False, True])
def test_the_second_video_cancelled_keeps_the_first(
    ask: Callable[..., Request], shelf: models.Shelf, tmp_path: Path, end: End, keep_latents: bool
) -> None:
    stop, finished = threading.Event(), list[Output]()
    request = ask(num_videos=2, steps=50, keep_latents=keep_latents)
    run = generate(request, shelf=shelf, finished=finished, stop=stop)
    next(event for event in run if isinstance(event, Progress) and event.video == 2)
    end(run, stop)
    made = finished[0].path, finished[0].sidecar, finished[0].latents
    assert len(finished) == 1 and (finished[0].latents is not None) == keep_latents
    assert set((tmp_path / "out").iterdir()) == set(filter(None, made))


def test_a_stop_that_comes_before_the_start_or_after_the_end(
    ask: Callable[..., Request], shelf: models.Shelf, tmp_path: Path
) -> None:
    stop = threading.Event()
    assert finish(ask(), shelf=shelf, stop=stop).outputs[0].path.is_file()
    assert finish(ask(), shelf=shelf, stop=stop), "a run that has ended leaves the event alone"
    before = set((tmp_path / "out").iterdir())
    stop.set()
    with pytest.raises(Cancelled):
        list(generate(ask(), shelf=shelf, stop=stop))
    assert set((tmp_path / "out").iterdir()) == before


def test_a_failed_decode_keeps_the_latents_and_decode_finishes_it(
    ask: Callable[..., Request],
    shelf: models.Shelf,
    wan_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    intact = finish(ask(output=str(tmp_path / "intact")), shelf=shelf).outputs[0]
    vae = pipe_of(shelf, wan_folder).vae

    def broken(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory for the decoder")

    with monkeypatch.context() as patched:
        patched.setattr(vae.decoder, "forward", broken)
        with pytest.raises(GenerationError) as caught:
            list(generate(ask(), shelf=shelf))
    kept = caught.value.latents
    assert kept is not None and kept.is_file()
    assert f"kinora decode {kept}" in str(caught.value)
    assert "while decoding" in str(caught.value) and "no memory" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [kept.name]
    *_, run = decode(kept, output=str(tmp_path / "out"))
    assert isinstance(run, Run)
    assert run.outputs[0].frames_sha256 == intact.frames_sha256
    assert run.outputs[0].latents_sha256 == intact.latents_sha256
    assert sidecar.read(run.outputs[0].path).request.prompt == "a red circle"


def test_a_failing_denoiser_is_one_line_and_leaves_nothing(
    ask: Callable[..., Request],
    shelf: models.Shelf,
    wan_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(pipe_of(shelf, wan_folder).transformer, "forward", broken)
    with pytest.raises(GenerationError, match="while denoising: RuntimeError: first line second"):
        list(generate(ask(), shelf=shelf))
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_an_error(
    ask: Callable[..., Request],
    shelf: models.Shelf,
    wan_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformer = pipe_of(shelf, wan_folder).transformer
    monkeypatch.setattr(transformer.proj_out.bias, "data", torch.full((4,), torch.nan))
    with pytest.raises(GenerationError, match="not finite"):
        list(generate(ask(), shelf=shelf))


def test_a_length_that_the_pipeline_changes_is_told(
    ask: Callable[..., Request], model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CogVideoX makes 8 frames of 2 latent frames; its card therefore does not allow 5."""
    folder = str(model_folders["cogvideox"])
    with pytest.raises(KinoraError, match="8k\\+1"):
        list(generate(ask(model=folder)))

    def lenient(self: cards.Card, count: int) -> int:
        return count

    monkeypatch.setattr(cards.Card, "nearest_frames", lenient)
    notices = [event.text for event in generate(ask(model=folder)) if isinstance(event, Notice)]
    assert any("made 8 frames" in text and "5 of 32x32" in text for text in notices)


def test_the_disk_is_asked_for_all_videos(
    ask: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(folder: Path) -> int:
        return 100_000

    monkeypatch.setattr(files, "free_disk_bytes", free)
    finish(ask(num_videos=2))
    with pytest.raises(OutputError, match="1000 videos may need"):
        list(generate(ask(num_videos=1000)))


def test_styled_warnings_lose_their_style() -> None:
    said: list[str] = []
    with relayed(said.append):
        logging.getLogger("transformers").warning("\x1b[1mbold\x1b[0m text")
    assert said == ["transformers: bold text"]


def test_library_warnings_become_notices(
    ask: Callable[..., Request], model_folders: dict[str, Path]
) -> None:
    long = "red circle " * 40
    request = ask(model=str(model_folders["sdxl"]), prompt=long, frames=1)
    notices = [event.text for event in generate(request) if isinstance(event, Notice)]
    assert any("truncated" in text for text in notices), notices


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_half_precision_autoencoders_decode_to_the_same_frames(
    ask: Callable[..., Request], model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """SDXL raises its autoencoder to float32 for decoding; `decode` must do the same."""
    for dtype in ("float16", "bfloat16"):
        request = ask(model=str(model_folders["sdxl"]), dtype=dtype, keep_latents=True, frames=1)
        made = finish(request).outputs[0]
        assert made.latents is not None
        *_, run = decode(made.latents, output=str(tmp_path / "again"))
        assert isinstance(run, Run)
        assert run.outputs[0].frames_sha256 == made.frames_sha256, dtype


def test_a_shelf_loads_once_and_changes_models(
    ask: Callable[..., Request],
    shelf: models.Shelf,
    model_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[str] = []
    load = models.load

    def counting(weights: models.Weights, *rest: Any) -> models.Loaded:
        loaded.append(weights.folder.path.name)
        return load(weights, *rest)

    monkeypatch.setattr(models, "load", counting)
    flux = ask(model=str(model_folders["flux"]), frames=1)
    for request in (ask(), ask(seed=1), flux, flux, ask()):
        finish(request, shelf=shelf)
    assert loaded == ["flux", "wan"]


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux", "sdxl"])
def test_a_pipeline_takes_the_smallest_sizes_that_its_card_allows(
    family: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    card = cards.find(str(model_folders[family]))
    across, down = card.multiple_px
    # Odd multiples: a pipeline that wants more than whole tokens would refuse them.
    width, height = card.nearest_size(3 * across, 5 * down)
    assert (width, height) == (3 * across, 5 * down)
    request = Request(
        prompt="a red circle",
        model=str(model_folders[family]),
        width=width,
        height=height,
        frames=card.nearest_frames(3),
        steps=1,
        output=str(tmp_path),
    )
    events = list(generate(request))
    assert isinstance(events[-1], Run)
    assert not [event for event in events if isinstance(event, Notice)]
