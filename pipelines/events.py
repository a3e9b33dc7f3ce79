"""What `generate` yields while it works; its last item is a `Run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["load", "text", "denoise", "decode", "save"]
STAGES: tuple[Stage, ...] = ("load", "text", "denoise", "decode", "save")
DOING: dict[Stage, str] = {
    "load": "loading the model",
    "text": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
}
"""What is being done in each stage, in words."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage has begun (`step` 0) or a denoising step has ended.

    `step` of `steps` counts within the stage (0 of 0 where a stage has no steps), `video` of
    `videos` counts from 1; `elapsed_s` is since the run began and `eta_s` until it ends as far as
    that is known (None until the first step has been timed). `latents` says that what stage `save`
    writes are the latents, before they are decoded, and not the video. `preview` is a small JPEG of
    what the run is heading for, where there is a new one; see `preview`.
    """

    stage: Stage
    step: int
    steps: int
    elapsed_s: float
    eta_s: float | None
    video: int
    videos: int
    latents: bool = False
    preview: bytes | None = None

    @property
    def doing(self) -> str:
        """What is being done, in words."""
        return "saving the latents" if self.latents else DOING[self.stage]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know that does not stop the run."""

    text: str
