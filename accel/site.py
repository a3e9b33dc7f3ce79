"""Where and when an attention call happens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .grid import TokenGrid


@dataclass(frozen=True, slots=True)
class Site:
    """One self-attention call of one run.

    Queries and keys are the picture's tokens in raster order and, in models whose attention is
    joint, those of the text, all of them before the picture or all behind it.
    """

    grid: TokenGrid
    layer: int
    layers: int
    step: int
    steps: int
    """Of the sampler's schedule; step 0 is the noisiest."""
    text: int = 0
    """Text tokens among the queries and keys."""
    text_first: bool = False
    branch: int = 0
    """Which of the calls of a step: with separate guidance 0 and 1 in the pipeline's order."""
    branches: int = 1
    """Guidance branches one behind the other in the batch, the prompt's last, as far as is known:
    where a step is one call, that is told by the first step's sample."""
    item: int = 0
    """Which of the batch, in models that attend to each of its items alone."""
    items: int = 1
    """How many of these there are, the prompt's last where guidance is in the batch."""
    expert: int = 0
    """Which denoiser, of models that have one for noise and one for detail."""
    seed: int = 0
    skipped: int = 0
    """Steps before it that were not evaluated, or not on all of its tokens, see `steps`."""

    @property
    def tokens(self) -> int:
        """`L`: tokens of the picture and of the text."""
        return self.grid.tokens + self.text

    def is_text(self) -> torch.Tensor:
        """`[L]` bool."""
        places = torch.arange(self.tokens)
        return places < self.text if self.text_first else places >= self.grid.tokens
