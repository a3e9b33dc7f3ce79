"""What the trainings share: a budget of minutes, resuming, averaging of weights, a log.

A training is cut by time, not by steps, so that it fits the GPU time there is. Progress is the
share of the budget used; schedules depend on it alone. A checkpoint holds all state, and a resumed
run goes on from the saved progress with the saved random state; it must be given the arguments that
the checkpoint was made with. Ctrl-C and SIGTERM save a checkpoint before they end a training.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Stateful(Protocol):
    """Anything with torch's `state_dict` pair."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def arguments(description: str, learning_rate: float) -> argparse.ArgumentParser:
    """The options that all trainings have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for log and checkpoint")
    parser.add_argument(
        "--minutes",
        type=float,
        required=True,
        help="wall time to train for, once clips are drawn and blocks compiled",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=learning_rate,
        help="largest one of the schedule (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, clips and noise (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: %(default)s)",
    )
    parser.add_argument(
        "--init",
        type=Path,
        help="folder of the same kind of part to start from; for the denoiser, of a pipeline "
        "(default: untrained)",
    )
    parser.add_argument("--small", action="store_true", help="use a toy size, to try the script")
    return parser


def settings(options: argparse.Namespace, **data: object) -> dict[str, str]:
    """What two runs on one checkpoint must have in common: options, and `data`, the batches."""
    free = ("out", "minutes", "device")
    given = {name: value for name, value in vars(options).items() if name not in free}
    return {name: str(value) for name, value in {**given, **data}.items()}


def trapezoid(progress: float, warm: float = 0.02, decay: float = 0.35) -> float:
    """Learning-rate factor at `progress` in 0 to 1: linear warm-up, flat, linear decay (WSD)."""
    return max(0.0, min(1.0, progress / warm, (1 - progress) / decay))


class Average:
    """Exponential moving average of the parameters of `module`, as a state dict in float32.

    The memory grows with the number of updates up to `decay`, so that early weights are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.source = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        blend = get_ema_multi_avg_fn(decay)
        blend(list(self.values.values()), list(self.source.values()), self.updates)

    @torch.no_grad()
    def copy_to_source(self) -> None:
        """Overwrite the trained parameters by their average."""
        for name, parameter in self.source.items():
            parameter.copy_(self.values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.updates = state_dict["updates"]
        for name, value in self.values.items():
            value.copy_(state_dict["values"][name])


@dataclass
class Session:
    """Budget, log and checkpoints of one training; iterate over it for its steps."""

    out: Path
    minutes: float
    parts: Mapping[str, Stateful]
    settings: Mapping[str, str] = field(default_factory=dict)
    """What a resumed training must have in common with the one that saved the checkpoint."""
    save_minutes: float = 5.0
    log_steps: int = 50
    step: int = 0
    elapsed_s: float = 0.0
    _pending: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    _signal: int | None = None

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed_s / (60 * self.minutes))

    def __iter__(self) -> Generator[float, None, None]:
        """Yield the progress before each step; saves on the way, at the end and when stopped.

        Raises:
            SystemExit: stopped by Ctrl-C or SIGTERM, or there is a checkpoint of other settings.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self.resume()
        began, before, saved = time.monotonic(), self.elapsed_s, self.elapsed_s
        with self._signals_end_the_step():
            while self.progress < 1 and self._signal is None:
                yield self.progress
                self.step += 1
                self.elapsed_s = before + time.monotonic() - began
                if self.elapsed_s - saved > 60 * self.save_minutes:
                    saved = self.elapsed_s
                    self.save()
            self.save()
        if self._signal is not None:
            _end(f"stopped; the same command goes on from {self.checkpoint}", 128 + self._signal)

    @contextmanager
    def _signals_end_the_step(self) -> Generator[None, None, None]:
        """Note a first Ctrl-C or SIGTERM, for the end of the step; a second one acts as always."""

        def note(number: int, _: object) -> None:
            self._signal = number
            with suppress(OSError):  # past the stream, in which a write may be under way
                os.write(2, b"saving a checkpoint after this step; Ctrl-C again stops now\n")
            for each, handler in before.items():
                signal.signal(each, handler)

        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        # What is ignored stays so: a job in the background is not meant by Ctrl-C.
        before = {each: it for each, it in before.items() if it not in (signal.SIG_IGN, None)}
        for each in before:
            signal.signal(each, note)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def log(self, scalars: dict[str, torch.Tensor]) -> None:
        """Collect scalars without waiting for the device; write means every `log_steps` steps."""
        for name, value in scalars.items():
            self._pending.setdefault(name, []).append(value.detach())
        if self.step % self.log_steps == self.log_steps - 1:
            means = {
                k: round(torch.stack(v).float().mean().item(), 6) for k, v in self._pending.items()
            }
            self._pending.clear()
            self.write(**means)

    def write(self, **values: Any) -> None:
        """One line of JSON to the log and to standard output."""
        line = json.dumps({"step": self.step, "seconds": round(self.elapsed_s, 1), **values})
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Write all state, so that at any moment either the old or the new checkpoint is whole."""
        state = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "settings": dict(self.settings),
            "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def check(self) -> None:
        """End the process, with status 2, if the checkpoint in `out` is of other settings."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu", mmap=True)
        was = state.get("settings", {})
        others = [
            f"{name} {was.get(name, 'unknown')}, not {now}"
            for name, now in self.settings.items()
            if was.get(name) != now
        ]
        if others:
            remedy = "give the same arguments, or another --out"
            _end(f"{self.checkpoint} was made with {'; '.join(others)}: {remedy}", 2)

    def resume(self) -> None:
        """Take up the checkpoint in `out`, if there is one and `check` lets it."""
        if not self.checkpoint.exists():
            return
        self.check()
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        here, *devices = state["random"]
        torch.set_rng_state(here)
        torch.cuda.set_rng_state_all(devices)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.write(resumed=True)


def _end(told: str, status: int) -> NoReturn:
    print(told, file=sys.stderr)
    sys.exit(status)
