"""What the denoiser is shown at each step, drawn ahead by worker processes.

A lesson is a kind of batch. The autoencoder is causal: the latents of a clip's first frames do not
depend on the later ones, so one pool of long clips teaches every shorter length too.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from ...world.scene import Description
from ..architecture import TEXT_LENGTH, tokenise
from .clips import Clip, caption
from .session import Session

STOCK_TEXT_LENGTH = 512
"""What `WanPipeline` pads to unless told otherwise. Cross-attention sees the padding, so some of
the steps use it and the model works with both."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A kind of batch: the first `frames` frames of `size` clips from the pool of `clip`."""

    clip: Clip
    frames: int
    size: int
    early_share: float
    """Weight among the steps at the start; it moves linearly to `late_share` by half time. A
    denoiser that was trained before has the late one throughout."""
    late_share: float
    time_shift: float
    """Times are logit-normal, then s -> shift s / (1 + (shift - 1) s): larger clips, more noise."""

    def share(self, progress: float) -> float:
        """Weight among the steps at `progress` in 0 to 1."""
        return self.early_share + (self.late_share - self.early_share) * min(1.0, 2 * progress)

    def __str__(self) -> str:
        return f"{self.frames}x{self.clip.height}x{self.clip.width}"


IMAGE, LARGE_IMAGE = Clip(1, 128, 128), Clip(1, 256, 256)
VIDEO, LARGE_VIDEO = Clip(33, 128, 128), Clip(33, 256, 256)
WIDE, TALL = Clip(33, 96, 160), Clip(33, 160, 96)

POOLS = {IMAGE: 12_000, LARGE_IMAGE: 4_000, VIDEO: 16_000, WIDE: 2_000, TALL: 2_000}
POOLS[LARGE_VIDEO] = 4_000
LESSONS = (
    Lesson(IMAGE, 1, 768, 0.35, 0.02, 1.5),
    Lesson(LARGE_IMAGE, 1, 192, 0.05, 0.05, 3.0),
    Lesson(VIDEO, 9, 256, 0.25, 0.02, 2.5),
    Lesson(VIDEO, 17, 160, 0.15, 0.03, 3.0),
    Lesson(VIDEO, 33, 96, 0.20, 0.23, 3.0),
    Lesson(WIDE, 33, 96, 0.0, 0.02, 3.0),
    Lesson(TALL, 33, 96, 0.0, 0.02, 3.0),
    Lesson(LARGE_VIDEO, 9, 64, 0.0, 0.08, 4.0),
    Lesson(LARGE_VIDEO, 17, 32, 0.0, 0.08, 5.0),
    Lesson(LARGE_VIDEO, 33, 20, 0.05, 0.45, 6.0),
)
SMALL_POOLS = {Clip(1, 32, 32): 16, Clip(9, 32, 48): 16}
SMALL_LESSONS = (
    Lesson(Clip(1, 32, 32), 1, 4, 0.5, 0.5, 1.5),
    Lesson(Clip(9, 32, 48), 5, 4, 0.3, 0.3, 3.0),
    Lesson(Clip(9, 32, 48), 9, 4, 0.2, 0.2, 3.0),
)


class Draw(NamedTuple):
    """One batch, still as places in a pool and words."""

    lesson: int
    rows: torch.Tensor
    """`[B]`, of the lesson's pool."""
    tokens: torch.Tensor
    mask: torch.Tensor
    """Both `[B, longest caption]`."""
    text_length: int

    def to(self, device: torch.device) -> Draw:
        return self._replace(
            rows=self.rows.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
        )


class Draws(Dataset[Draw]):
    """The draw of a step and a lesson, a new phrasing each time."""

    def __init__(
        self,
        lessons: Sequence[Lesson],
        told: Mapping[Clip, Sequence[Description]],
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
    ) -> None:
        self.lessons, self.told, self.tokenizer, self.seed = lessons, told, tokenizer, seed

    def __getitem__(self, index: tuple[int, int]) -> Draw:
        step, number = index
        lesson, rng = self.lessons[number], random.Random(f"{self.seed}/{step}/draw")
        told = self.told[lesson.clip]
        rows = [rng.randrange(len(told)) for _ in range(lesson.size)]
        tokens, mask = tokenise([caption(rng, told[row]) for row in rows], self.tokenizer)
        length = STOCK_TEXT_LENGTH if rng.random() < 0.2 else TEXT_LENGTH
        return Draw(number, torch.tensor(rows), tokens, mask, length)


def _plan(session: Session, lessons: Sequence[Lesson], seed: int) -> Iterator[tuple[int, int]]:
    """Step and lesson for ever, a few steps ahead of `session`."""
    for step in itertools.count(session.step):
        shares = [lesson.share(session.progress) for lesson in lessons]
        rng = random.Random(f"{seed}/{step}/lesson")
        yield step, rng.choices(range(len(lessons)), shares)[0]


class _Steps:
    """`_plan` as an iterable, which is what a loader takes."""

    def __init__(self, session: Session, lessons: Sequence[Lesson], seed: int) -> None:
        self.arguments = session, lessons, seed

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return _plan(*self.arguments)


def _leave_ctrl_c(_: int) -> None:
    """Ctrl-C reaches workers too, but the session ends the training, and needs them until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def draws(session: Session, dataset: Draws, device: torch.device) -> Iterator[Draw]:
    """One draw a step, tensors on `device`; starts at the step of `session` when first asked."""
    cuda = device.type == "cuda"
    loader: DataLoader[Draw] = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Steps(session, dataset.lessons, dataset.seed),
        num_workers=4 if cuda else 0,
        pin_memory=cuda,
        worker_init_fn=_leave_ctrl_c,
    )
    for draw in loader:
        yield draw.to(device)
