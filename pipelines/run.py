"""What a finished run hands back, and the clock that times its stages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accel.receipt import Receipt
from .events import STAGES, Stage
from .request import Resolved


@dataclass(frozen=True, slots=True)
class Output:
    """One video or image on disk.

    `identical` compares the frames with those of the original where a run repeats one (`--from`),
    else None. `latents` is set where the latents were kept. `receipt` says what the denoiser was
    asked for and what it ran.
    """

    path: Path
    sidecar: Path
    latents: Path | None
    seed: int
    stages_s: dict[Stage, float]
    latents_sha256: str
    frames_sha256: str
    receipt: Receipt | None = None
    identical: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "path": str(self.path),
            "sidecar": str(self.sidecar),
            "latents": None if self.latents is None else str(self.latents),
            "seed": self.seed,
            "stages_s": _rounded(self.stages_s),
            "latents_sha256": self.latents_sha256,
            "frames_sha256": self.frames_sha256,
            "receipt": None if self.receipt is None else self.receipt.model_dump(),
            "identical": self.identical,
        }


@dataclass(frozen=True, slots=True)
class Run:
    """The last item of `generate`: what was asked for, what came out, what each stage took."""

    request: Resolved
    outputs: tuple[Output, ...]
    stages_s: dict[Stage, float]
    device: str
    versions: dict[str, str]
    leads: bool = True
    """Whether its files stay, of several processes that make one video."""

    @property
    def total_s(self) -> float:
        """Seconds from the start of the run to its end; the stages add up to it."""
        return sum(self.stages_s.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values for a machine-readable report."""
        return {
            "request": self.request.model_dump(),
            "outputs": [output.to_json() for output in self.outputs],
            "stages_s": _rounded(self.stages_s),
            "total_s": round(self.total_s, 3),
            "device": self.device,
            "versions": self.versions,
        }


class StageClock:
    """Wall time by stage. Exactly one stage runs at any time, so nothing is counted twice or lost.

    On an accelerator, work that was only queued is waited for at every switch.
    """

    def __init__(self, stage: Stage) -> None:
        self.began = self._since = time.perf_counter()
        self.stage: Stage = stage
        self._spent: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._lap: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self.device = "cpu"

    def switch(self, stage: Stage) -> None:
        """End the running stage and begin `stage`."""
        if self.device != "cpu":
            _wait_for(self.device)
        now = time.perf_counter()
        self._spent[self.stage] += now - self._since
        self.stage, self._since = stage, now

    def skip(self) -> None:
        """Count the time since the last switch for nothing: it was spent waiting for others."""
        now = time.perf_counter()
        self.began, self._since = self.began + now - self._since, now

    def settle(self) -> None:
        """Wait for the accelerator a last time: what follows needs it no more."""
        self.switch(self.stage)
        self.device = "cpu"

    def lap(self) -> dict[Stage, float]:
        """Seconds by stage since the last lap."""
        self.switch(self.stage)
        lap = self._since_lap()
        self._lap = dict(self._spent)
        return lap

    def peek(self) -> dict[Stage, float]:
        """Seconds by stage since the last lap, without ending it."""
        self.switch(self.stage)
        return self._since_lap()

    def _since_lap(self) -> dict[Stage, float]:
        return {stage: self._spent[stage] - self._lap[stage] for stage in STAGES}

    def total(self) -> dict[Stage, float]:
        """Seconds by stage since the clock was made."""
        self.switch(self.stage)
        return dict(self._spent)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.began


def _wait_for(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(torch.device(device))
    elif device == "mps":
        torch.mps.synchronize()


def _rounded(stages_s: dict[Stage, float]) -> dict[Stage, float]:
    return {stage: round(seconds, 3) for stage, seconds in stages_s.items()}
