"""One shelf for several requests: each gets what it would get alone, one at a time."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kinora.pipelines import cards, files, models, sidecar
from kinora.pipelines import saving as saving_files
from kinora.pipelines.errors import Cancelled, ModelError
from kinora.pipelines.events import Notice, Progress
from kinora.pipelines.generate import generate
from kinora.pipelines.request import Request
from kinora.pipelines.run import Output, Run, StageClock
from kinora.pipelines.taps import tapped

Make = Callable[..., Request]


@pytest.fixture
def ask(wan_folder: Path, tmp_path: Path) -> Make:
    """A small request for the tiny Wan pipeline; keywords change it."""

    def make(**fields: Any) -> Request:
        small = {"prompt": "a red circle", "model": str(wan_folder), "width": 32, "height": 32}
        small |= {"frames": 5, "steps": 3, "guidance": 5.0, "output": str(tmp_path / "out")}
        return Request.model_validate({**small, **fields})

    return make


@pytest.fixture
def embedded(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny Wan pipeline in the place of kinora-tiny's weights."""
    monkeypatch.setattr(cards, "WEIGHTS", wan_folder)


def made(request: Request, shelf: models.Shelf | None = None) -> Output:
    """Run to the end and return the one output."""
    *_, last = generate(request, shelf=shelf)
    assert isinstance(last, Run)
    return last.outputs[0]


def test_two_cards_of_one_folder_keep_their_own_arguments(ask: Make, embedded: None) -> None:
    shelf = models.Shelf()
    long, short = made(ask(), shelf), made(ask(model="kinora-tiny"), shelf)
    assert long.frames_sha256 == made(ask()).frames_sha256
    assert short.frames_sha256 == made(ask(model="kinora-tiny")).frames_sha256
    assert short.frames_sha256 != long.frames_sha256, "64 tokens of text against 512"
    assert sidecar.read(short.sidecar).model.name == "kinora-tiny"


def test_threads_take_turns_on_a_shelf(ask: Make) -> None:
    shelf, alone = models.Shelf(), [made(ask(seed=seed)).frames_sha256 for seed in (0, 1)]
    found: dict[int, str] = {}

    def run(seed: int) -> None:
        found[seed] = made(ask(seed=seed), shelf).frames_sha256

    for _ in range(2):
        threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found.pop(0), found.pop(1)] == alone


def test_a_run_that_waits_for_the_shelf_can_be_stopped(ask: Make) -> None:
    shelf = models.Shelf()
    first = generate(ask(steps=500), shelf=shelf)
    next(event for event in first if isinstance(event, Progress) and event.step)
    second = generate(ask(), shelf=shelf)
    next(second)
    second.close()
    assert any(isinstance(event, Progress) and event.step > 1 for event in first)
    first.close()


def test_a_pipeline_is_tapped_once(ask: Make, wan_folder: Path) -> None:
    weights = models.locate(cards.find(str(wan_folder)))
    pipe = models.load(weights, models.place(weights.card, "cpu", "auto")).pipe

    def nothing(*_: object) -> None: ...

    with tapped(pipe, StageClock("text"), check=nothing, before_decode=nothing, after_text=nothing):
        again = tapped(
            pipe, StageClock("text"), check=nothing, before_decode=nothing, after_text=nothing
        )
        with pytest.raises(RuntimeError, match="runs already"), again:
            pass
    assert "encode_prompt" not in vars(pipe)


def test_loading_stops_between_the_parts(wan_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = models.locate(cards.find(str(wan_folder)))
    loaded: list[str] = []
    load_part = models.load_part

    def counting(weights: models.Weights, name: str, *rest: Any) -> Any:
        loaded.append(name)
        return load_part(weights, name, *rest)

    def stop_after_the_first() -> None:
        if loaded:
            raise Cancelled

    monkeypatch.setattr(models, "load_part", counting)
    with pytest.raises(Cancelled):
        models.load(weights, models.place(weights.card, "cpu", "auto"), stop_after_the_first)
    assert len(loaded) == 1


def test_a_prompt_that_is_cut_is_told_once(ask: Make, embedded: None) -> None:
    def notices(words: int) -> list[str]:
        request = ask(prompt="red " * words, model="kinora-tiny", width=96, height=96)
        return [event.text for event in generate(request) if isinstance(event, Notice)]

    assert notices(63) == []  # and the end of the text is a token too
    (told,) = notices(64)
    assert "the first 64 tokens" in told and "has 65" in told


def test_a_size_outside_training_is_told_once_and_made(ask: Make, embedded: None) -> None:
    events = list(generate(ask(model="kinora-tiny", num_videos=2)))
    (told,) = [event.text for event in events if isinstance(event, Notice)]
    assert "trained for 96 to 256 px a side" in told and "32x32, 5 frames" in told
    assert isinstance(events[-1], Run) and len(events[-1].outputs) == 2


def test_weights_of_every_family_are_whole_with_their_ties(model_folders: dict[str, Path]) -> None:
    """A tied weight is in the file once; that is no missing one."""
    for path in model_folders.values():
        weights = models.locate(cards.find(str(path)))
        assert models.load(weights, models.place(weights.card, "cpu", "auto")).pipe is not None


def test_what_wants_code_of_its_own_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(wan_folder, folder)
    with pytest.raises(ModelError) as caught, models._loading(folder):  # pyright: ignore[reportPrivateUsage]
        raise ValueError("set the option `trust_remote_code=True` to remove this error")
    assert "trust_remote_code" not in str(caught.value) and "code of its own" in str(caught.value)


def test_a_video_is_saved_while_the_next_is_being_made(
    ask: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, saving, goes_on = models.Shelf(), threading.Event(), threading.Event()
    made(ask(), shelf)  # loads
    publish = saving_files.publish

    def slowly(folder: Path, stem: str, contents: Mapping[str, bytes]) -> dict[str, Path]:
        if ".json" in contents and not saving.is_set():
            saving.set()
            assert goes_on.wait(60)
        return publish(folder, stem, contents)

    monkeypatch.setattr(saving_files, "publish", slowly)
    first: list[Output] = []
    thread = threading.Thread(target=lambda: first.append(made(ask(seed=1), shelf)))
    thread.start()
    assert saving.wait(60)
    began = time.perf_counter()
    second = made(ask(seed=2), shelf)
    took_s = time.perf_counter() - began
    assert not first, "the first was still being saved"
    time.sleep(0.5)
    goes_on.set()
    thread.join()
    assert first[0].seed == 1 and second.seed == 2
    assert first[0].stages_s["save"] > took_s and second.stages_s["load"] < took_s
    assert first[0].frames_sha256 == made(ask(seed=1)).frames_sha256


def test_waiting_for_the_shelf_is_no_time_of_the_run(ask: Make) -> None:
    shelf = models.Shelf()
    made(ask(), shelf)
    with shelf.reserved(lambda: None):
        second = generate(ask(), shelf=shelf)
        found: list[Run] = []
        thread = threading.Thread(
            target=lambda: found.extend(it for it in second if isinstance(it, Run))
        )
        thread.start()
        time.sleep(1.5)
    thread.join()
    assert found[0].total_s < 1.5 and found[0].stages_s["load"] < 0.5


def test_files_can_be_written_elsewhere_first(ask: Make, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    elsewhere = files.Destination(staging, "name", (".mp4", ".json", files.LATENTS_SUFFIX))
    *_, run = generate(ask(), destination=elsewhere)
    assert isinstance(run, Run) and not (tmp_path / "out").exists()
    assert sorted(path.name for path in staging.iterdir()) == ["name.json", "name.mp4"]
    assert sidecar.read(run.outputs[0].sidecar).request.output == str(tmp_path / "out")
