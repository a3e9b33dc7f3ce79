"""The desk: one run after the other, each of which can be stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kinora.app.ui import desk as desk_module
from kinora.app.ui.desk import Desk, Ended, Job
from kinora.pipelines import cards, models
from kinora.pipelines.events import Progress
from kinora.pipelines.request import Request
from kinora.pipelines.run import Run
from kinora.pipelines.saving import Kept
from kinora.pipelines.worker import Event, running

Make = Callable[..., Request]
PATIENCE_S = 60


@pytest.fixture
def ask(wan_folder: Path, tmp_path: Path) -> Make:
    """A small request for the tiny Wan pipeline; keywords change it."""

    def make(**fields: Any) -> Request:
        small = {"prompt": "a red circle", "model": str(wan_folder), "width": 32, "height": 32}
        small |= {"frames": 5, "steps": 2, "guidance": 1.0, "output": str(tmp_path / "out")}
        return Request.model_validate({**small, **fields})

    return make


def news(job: Job, until: Callable[[Event | Ended], bool]) -> list[Event | Ended]:
    """What comes of a job, up to the first thing that is wanted."""
    found: list[Event | Ended] = []
    while not found or not until(found[-1]):
        found.append(job.news.get(timeout=PATIENCE_S))
    return found


def last(job: Job) -> Run | Ended:
    """What the job ends with."""
    end = news(job, lambda it: isinstance(it, Run | Ended))[-1]
    assert isinstance(end, Run | Ended)
    return end


def denoising(job: Job, step: int = 1) -> None:
    """Wait until the job has done a step."""
    news(job, lambda it: isinstance(it, Progress) and it.step >= step)


def pipe_of(shelf: models.Shelf, folder: Path) -> Any:
    """The pipeline on the shelf."""
    card = cards.find(str(folder))
    return shelf.take(models.locate(card), models.place(card, "auto", "auto")).pipe


def visit(desk: Desk, visitor: Callable[[], None]) -> None:
    """Have the desk work in this thread while `visitor` runs in another."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            visitor()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    desk.work(thread.is_alive)
    thread.join()
    if failures:
        raise failures[0]
    assert not running()


def test_the_model_stays_loaded_between_runs(ask: Make) -> None:
    desk = Desk()

    def visitor() -> None:
        first, second = desk.submit(ask()), desk.submit(ask(seed=1))
        ends = last(first), last(second)
        assert isinstance(ends[0], Run) and isinstance(ends[1], Run)
        assert ends[0].outputs[0].path.is_file() and ends[1].outputs[0].path.is_file()
        assert ends[1].stages_s["load"] < ends[0].stages_s["load"]

    visit(desk, visitor)


def test_a_cancel_takes_effect_within_a_step_and_leaves_nothing(
    ask: Make, wan_folder: Path, tmp_path: Path
) -> None:
    shelf = models.Shelf()
    desk, calls = Desk(shelf), list[int]()

    def slow(*_: Any) -> None:
        calls.append(1)
        time.sleep(0.05)

    def visitor() -> None:
        assert isinstance(last(desk.submit(ask())), Run)
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        hook = pipe_of(shelf, wan_folder).transformer.register_forward_pre_hook(slow)
        for _ in range(5):
            calls.clear()
            job = desk.submit(ask(steps=500))
            denoising(job, 3)
            before = len(calls)
            desk.cancel(job)
            desk.cancel(job)  # an impatient second press changes nothing
            assert last(job) == Ended("cancelled")
            assert len(calls) <= before + 1
            assert list((tmp_path / "out").iterdir()) == []
        hook.remove()
        assert isinstance(last(desk.submit(ask())), Run)

    visit(desk, visitor)


def test_a_cancel_in_the_line_and_while_the_model_loads(ask: Make, tmp_path: Path) -> None:
    desk = Desk()

    def visitor() -> None:
        first, second = desk.submit(ask(steps=500)), desk.submit(ask())
        news(first, lambda it: isinstance(it, Progress))
        desk.cancel(second)
        assert last(second) == Ended("cancelled"), "at once, not in its turn"
        desk.cancel(first)
        assert last(first) == Ended("cancelled")
        assert not (tmp_path / "out").exists()
        late = desk.submit(ask())
        assert isinstance(last(late), Run)
        desk.cancel(late)
        assert isinstance(last(desk.submit(ask())), Run), "a late cancel hits no other run"

    visit(desk, visitor)


def test_a_cancel_keeps_what_is_finished(ask: Make, tmp_path: Path) -> None:
    desk = Desk()
    job = desk.submit(ask(num_videos=3, steps=50))

    def visitor() -> None:
        news(job, lambda it: isinstance(it, Progress) and it.video == 2)
        desk.cancel(job)
        assert last(job) == Ended("cancelled")

    visit(desk, visitor)
    (made,) = job.finished
    assert set((tmp_path / "out").iterdir()) == {made.path, made.sidecar}


def test_cancelling_needs_no_signal_and_no_main_thread(
    ask: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a signal")

    monkeypatch.setattr(signal, "signal", forbidden)
    monkeypatch.setattr(signal, "pthread_kill", forbidden)
    desk, over = Desk(), threading.Event()
    thread = threading.Thread(target=desk.work, args=(lambda: not over.is_set(),))
    thread.start()
    try:
        job = desk.submit(ask(steps=500))
        denoising(job, 2)
        desk.cancel(job)
        assert last(job) == Ended("cancelled")
    finally:
        over.set()
        thread.join()


def test_refusals_and_faults_are_one_line(
    ask: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    desk = Desk()
    refused = desk.submit(ask(frames=6))

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("first\nsecond")

    def visitor() -> None:
        end = last(refused)
        assert isinstance(end, Ended) and end.how == "refused"
        assert "cannot make 6 frames" in end.text and "\n" not in end.text
        monkeypatch.setattr(desk_module, "generate", broken)
        end = last(desk.submit(ask()))
        assert end == Ended(
            "fault", "a fault in Kinora: RuntimeError: first second; KINORA_DEBUG=1 shows where, "
            "please report it"
        )  # fmt: skip

    visit(desk, visitor)
    assert capfd.readouterr().err == ""


def test_the_end_of_the_page_ends_the_run_and_the_line(ask: Make, tmp_path: Path) -> None:
    desk = Desk()
    jobs = [desk.submit(ask(steps=500)), desk.submit(ask())]

    class CtrlC(BaseException):
        pass

    def handler(*_: object) -> None:
        raise CtrlC

    def interrupt() -> None:
        denoising(jobs[0], 2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(CtrlC):
            desk.work(lambda: True)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert [last(job) for job in jobs] == [Ended("closed"), Ended("closed")]
    assert not running() and not (tmp_path / "out").exists()


def test_waiting_for_news_is_short(ask: Make) -> None:
    job = Job(ask())
    assert asyncio.run(job.wait(0.01)) == []
    job.news.put(Ended("closed"))
    assert asyncio.run(job.wait(PATIENCE_S)) == [Ended("closed")]


def test_the_end_of_the_page_while_decoding_keeps_the_latents_and_names_them(
    ask: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    class CtrlC(BaseException):
        pass

    def handler(*_: object) -> None:
        raise CtrlC

    def interrupted(decoder: Any, *args: Any, **options: Any) -> Any:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        time.sleep(1)  # longer than the signal may take to arrive
        return forward(decoder, *args, **options)

    forward = WanDecoder3d.forward
    monkeypatch.setattr(WanDecoder3d, "forward", interrupted)
    left: list[Kept] = []
    desk = Desk(unfinished=left)
    job = desk.submit(ask())
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        with pytest.raises(CtrlC):
            desk.work(lambda: True)
    finally:
        signal.signal(signal.SIGUSR2, before)
    (kept,) = left
    assert list((tmp_path / "out").iterdir()) == [kept.path]
    assert last(job) == Ended("closed", kept.remedy())
