"""The token grid of a clip: how many tokens attention sees, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Latent patches along time, height and width, as the denoiser's self-attention sees them.

    `tokens` is their product; text tokens are not counted.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"a token grid needs at least one token each way, not {self}")

    @property
    def tokens(self) -> int:
        """Number of tokens, `frames * height * width`."""
        return self.frames * self.height * self.width

    def halved(self, times: int) -> TokenGrid:
        """The grid behind `times` convolutions that halve height and width, rounding up."""
        step = 2**times
        return TokenGrid(self.frames, -(-self.height // step), -(-self.width // step))

    def __str__(self) -> str:
        return f"{self.frames}×{self.height}×{self.width}"
