"""What a recipe chooses by name, attention methods and step policies alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .options import Options, options_of


class Named(Options):
    """A frozen set of options with a name, and what stands written about it; see `facts`."""

    name: ClassVar[str] = ""
    """As recipes spell it."""
    paper: ClassVar[str] = ""
    """With its arXiv number; a docstring tells the rest."""
    library: ClassVar[str] = ""
    """Whose code runs; empty where it is written here."""
    licence: ClassVar[str] = ""
    """Of that library, or of the authors' code, of which nothing is copied here."""
    use_when: ClassVar[str] = ""
    """When to choose it, in words that follow "where "."""

    @classmethod
    def check_options(cls, values: Mapping[str, Any]) -> None:
        """Whether option `values`, each in its range, go together. Raises RecipeError."""
        del values

    def unsaid(self) -> set[str]:
        """Options that are without effect, as the others are set."""
        return set()

    def words(self) -> str:
        """The name and the options, in words."""
        unsaid, said = self.unsaid(), list[str]()
        for it in options_of(type(self)):
            name, value = it.name.replace("_", " "), getattr(self, it.name)
            # What is off is not said, unless it is on by default.
            off = it.default is not True and (value is False or value == "")
            if it.name not in unsaid and not off:
                said.append(name if value is True else f"{name} {_short(value)}")
        told = ", ".join(said)
        return f"{self.name} ({told})" if told else self.name


def _short(value: Any) -> str:
    if value is False:
        return "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
