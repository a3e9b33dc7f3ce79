"""How several processes share the work on one video, as a recipe asks for it."""

from __future__ import annotations

from .options import Options, option, options_of


class Parallel(Options):
    """Factors of the number of processes that make one video together, each on its device."""

    ulysses: int = option(
        1,
        "Processes that share the tokens, and within attention the heads, which they divide",
        least=1,
        most=256,
        unit="processes",
    )
    ring: int = option(
        1,
        "Processes that share the tokens, also within attention, which stays dense",
        least=1,
        most=256,
        unit="processes",
    )
    cfg: int = option(
        1, "Processes that share the two guidance branches", least=1, most=2, unit="processes"
    )

    @property
    def processes(self) -> int:
        """Of one video."""
        return self.tokens * self.cfg

    @property
    def tokens(self) -> int:
        """Among how many the tokens of a branch are shared."""
        return self.ulysses * self.ring

    def words(self) -> str:
        """In words that follow "on "."""
        factors = {it.name: getattr(self, it.name) for it in options_of(type(self))}
        told = ", ".join(f"{name} {value}" for name, value in factors.items() if value > 1)
        return f"{self.processes} processes ({told})"
