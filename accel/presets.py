"""The recipes that come with Kinora, by name. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "recipes"
DENSE = "dense"
"""The one that accelerates nothing."""


def names() -> list[str]:
    """All of them."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@dataclass(frozen=True, slots=True)
class Measured:
    """What a preset was measured to do.

    Attributes:
        speed: of a run, from text to file, in a word or two.
        where: that was measured, and what else was; empty for the baseline.
        cost: in quality.
    """

    speed: str
    where: str
    cost: str

    @property
    def speed_words(self) -> str:
        """The speed with where it was measured."""
        return ": ".join(filter(None, (self.speed, self.where)))


MEASURED = {
    "dense": Measured("baseline", "", "none"),
    "exact": Measured(
        "as dense",
        "where torch takes the fastest by itself, as 2.11 does on an H200 at the five shapes "
        "tried; 1.6 times where it takes FlashAttention 2 (attention of Wan 1.3B at 480p: 18.5 ms, "
        "cuDNN 11.6)",
        "rounding; none where nothing is faster",
    ),
    "balanced": Measured(
        "1.45 times",
        "`kinora-tiny`, 256 px, 30 steps, two CPU cores; dense on a GPU, which such short calls "
        "keep waiting (made sparse, .4 times as fast on an H200); `blade`'s attention alone, with "
        "a fifth of the tiles and its tail, is 3.6 times as fast as dense at Wan 1.3B's shape "
        "there, 4.2 at Wan 14B's",
        "all correct −.03 [−.09, +.03] on 100 prompts, +.03 [−.02, +.08] on 100 others",
    ),
    "fast": Measured(
        "2.1 times",
        "`kinora-tiny`, 256 px, 30 steps, two CPU cores; on an H200, where such short calls stay "
        "dense, 1.4 times (1.1 s instead of 1.5), 1.5 times in 50 steps",
        "all correct −.03 [−.09, +.03] on 100 prompts, made sparse throughout",
    ),
}
"""By name. All correct: the share of videos of `kinora-tiny` that its judge finds right, against
dense ones, with the interval of 95 %. It says little of other models."""
