"""`pattern`: steps that are skipped are known before the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import RecipeError
from ..options import option
from ..steps import Schedule, Step, StepRun
from .skipping import EDGE, SkippingRun, SkipPolicy, too_few


class Pattern(SkipPolicy):
    """Steps are skipped in a fixed rhythm, whatever the run looks like.

    `pattern` repeats from `from_step` on: with sC every second step is skipped, with ssC two of
    three. A `mask` file has a letter for each step of the whole run instead; blanks and line ends
    in it mean nothing. How long a run takes is known beforehand, nothing is measured on the device,
    and all of several processes decide alike.

    Source: ZEUS (arXiv 2604.01552), which skips by the step's number alone.
    Differs from the paper: x0 is extrapolated in the noise level and from evaluated steps only,
    where it alternates between a line through the last two outputs and the last one again. Differs
    from the authors' code: what is predicted is the guided output, so that guidance is kept with
    calls of its own too; theirs shares one history between the branches.
    """

    name: ClassVar[str] = "pattern"
    paper: ClassVar[str] = "arXiv 2604.01552"
    licence: ClassVar[str] = "not looked at"
    use_when: ClassVar[str] = (
        "the time of a run must be known beforehand, or several processes share a run."
    )

    pattern: str = option("sC", "Letters that repeat: C evaluates a step, s skips it")
    mask: str = option(
        "", "File with a letter for each step of the run, instead of pattern", path=True
    )

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """See `Named`."""
        super().check_options(values)
        letters = cls(**values).pattern
        if set(letters) != {"C", "s"}:
            raise RecipeError(
                f"steps.pattern is {letters[:60]!r}; it must be letters C (evaluate) and s "
                f"(skip), with each at least once"
            )

    def letters(self, steps: int) -> str:
        """One for each step, C or s.

        Raises:
            RecipeError: the mask cannot be read, or is not of so many steps.
        """
        if self.mask:
            return _read(self.mask, steps)
        window = self.window(steps)
        repeated = self.pattern * (len(window) // len(self.pattern) + 1)
        skipped = repeated[: len(window)]
        return "C" * window.start + skipped + "C" * (steps - window.start - len(skipped))

    def computed(self, steps: int, experts: int = 1) -> tuple[int, int]:
        """See `StepPolicy`."""
        count = self.letters(steps).count("C")
        return count, min(steps, count + EDGE * (experts - 1))

    def refuses(self, steps: int, first: int = 0) -> str | None:
        """See `StepPolicy`."""
        try:
            self.letters(steps)
        except RecipeError as refusal:
            return str(refusal)
        return too_few(steps, first) if self.mask else super().refuses(steps, first)

    def window(self, steps: int) -> range:
        """See `SkipPolicy`; a mask says it itself."""
        return range(EDGE, steps - EDGE) if self.mask else super().window(steps)

    def allows(self, run: SkippingRun, step: Step, sample: torch.Tensor) -> bool:
        """See `SkipPolicy`."""
        assert isinstance(run, _PatternRun)
        return run.letters[step.index] == "s"

    def start(self, schedule: Schedule) -> StepRun:
        """See `StepPolicy`."""
        return _PatternRun(self, schedule)


class _PatternRun(SkippingRun):
    """Reads its mask once."""

    def __init__(self, policy: Pattern, schedule: Schedule) -> None:
        super().__init__(policy, schedule)
        self.letters = policy.letters(len(schedule.levels))


def _read(name: str, steps: int) -> str:
    try:
        path = Path(name).expanduser()
        if path.exists() and not path.is_file():  # what never ends would be waited for
            raise ValueError("no file")
        letters = "".join(path.read_text(encoding="utf-8").split())
    except (OSError, ValueError, RuntimeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise RecipeError(f"the mask {name[-200:]} cannot be read: {reason}") from error
    strange = sorted(set(letters) - {"C", "s"})
    if strange:
        raise RecipeError(
            f"the mask {name} has the letter {strange[0]!r}: only C (evaluate) and s (skip) may be "
            f"in it"
        )
    if len(letters) != steps:
        raise RecipeError(
            f"the mask {name} is of {len(letters)} steps, the run has {steps}: give one of its "
            f"length, or the steps that it is for"
        )
    if "s" in letters[:EDGE] + letters[-EDGE:]:
        raise RecipeError(
            f"the mask {name} skips one of the first or last {EDGE} steps, which must be evaluated"
        )
    return letters
