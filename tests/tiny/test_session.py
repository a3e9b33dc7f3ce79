"""A training's budget and checkpoints: interrupted, stopped, resumed."""

from __future__ import annotations

import json
import signal
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kinora.pipelines.tiny.train.session import Session

CLOCK = "kinora.pipelines.tiny.train.session.time.monotonic"


class _Interrupt(Exception):  # noqa: N818 - no error, the test's own signal
    pass


def _drawing(folder: Path, clock: pytest.MonkeyPatch, stop_at: int | None = None) -> list[float]:
    """A training that draws one random number a step; half a minute at a second a step."""
    drawn: list[float] = []
    torch.manual_seed(3)
    session = Session(folder, 0.5, {"model": torch.nn.Linear(1, 1)}, save_minutes=5 / 60)
    seconds = iter(range(10_000))
    clock.setattr(CLOCK, lambda: float(next(seconds)))
    with closing(iter(session)) as steps:
        for _ in steps:
            if session.step == stop_at:
                raise _Interrupt
            drawn.append(torch.rand(()).item())
    return drawn


def test_an_interrupted_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = _drawing(tmp_path / "whole", monkeypatch)
    assert len(whole) == 30
    with pytest.raises(_Interrupt):
        _drawing(tmp_path / "cut", monkeypatch, stop_at=17)
    rest = _drawing(tmp_path / "cut", monkeypatch)
    log = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["resumed"] is True
    # It was last saved after 12 steps, and goes on from there with the same draws.
    assert rest == whole[12:]


def test_a_resumed_training_draws_what_it_would_have_drawn(tmp_path: Path):
    model = torch.nn.Linear(2, 2)
    session = Session(tmp_path, 1.0, {"model": model})
    session.step, session.elapsed_s = 7, 12.5
    torch.manual_seed(11)
    session.save()
    expected = torch.rand(4)
    again = Session(tmp_path, 1.0, {"model": torch.nn.Linear(2, 2)})
    again.resume()
    assert (again.step, again.elapsed_s) == (7, 12.5)
    assert torch.equal(torch.rand(4), expected)
    restored = again.parts["model"].state_dict()
    assert all(torch.equal(restored[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_is_saved_after_its_step_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    whole = _drawing(tmp_path / "whole", monkeypatch)
    torch.manual_seed(3)
    session = Session(tmp_path / "cut", 0.5, {"model": torch.nn.Linear(1, 1)})
    drawn: list[float] = []
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            for _ in session:
                if session.step == 7:
                    signal.raise_signal(number)
                drawn.append(torch.rand(()).item())
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
        # A second one does not wait.
        twice = Session(tmp_path / "twice", 0.5, {})
        with pytest.raises(KeyboardInterrupt), closing(iter(twice)) as steps:
            for _ in steps:
                signal.raise_signal(number)
                signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert drawn == whole[:8]
    assert drawn + _drawing(tmp_path / "cut", monkeypatch) == whole


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    session = Session(tmp_path, 1.0, {"model": torch.nn.Linear(1, 1)})
    session.save()
    good = session.checkpoint.read_bytes()

    def half_written(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        session.save()
    assert session.checkpoint.read_bytes() == good
