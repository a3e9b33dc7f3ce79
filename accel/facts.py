"""What stands written about a method or policy, for those who choose one: parsed from its class.

A docstring begins with the rule, then says `Source: …` and `Differs from …: …`, the last for the
paper and for the authors' code where they are not alike. `licence` and `use_when` are attributes.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, dataclass
from typing import Any

from .named import Named
from .options import Option, options_of

_HEADS = re.compile(r"(?:^|(?<=\s))(Source|Differs from [^:.;]+): ")


@dataclass(frozen=True, slots=True)
class Facts:
    """About one method; all texts are in one line a paragraph.

    Attributes:
        rule: what it keeps, the first sentence in a paragraph of its own being the shortest answer.
        papers: arXiv numbers.
        differs: from what, and how.
        licence: of `library`, or of the authors' code, none of which is here; empty where it is
            ours.
        library: whose code runs; empty where it is written here.
    """

    name: str
    rule: tuple[str, ...]
    papers: tuple[str, ...]
    source: str
    differs: dict[str, str]
    licence: str
    library: str
    use_when: str
    options: tuple[Option, ...]

    @property
    def terms(self) -> str:
        """What the licence is of, in words; empty where it is ours."""
        if self.library:
            return f"{self.library} runs it, {self.licence}"
        return self.licence and f"written anew from the mathematics; theirs: {self.licence}"

    @property
    def short(self) -> str:
        """The rule in one sentence."""
        return self.rule[0]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = asdict(self)
        found["options"] = {
            it.name: {"default": it.default, "allowed": it.allowed(), "help": it.help}
            for it in self.options
        }
        return found


def facts(method: type[Named]) -> Facts:
    """What is written about `method`; of our own (`Source: ours`) that is less.

    Raises:
        ValueError: something is not.
    """
    text = inspect.cleandoc(method.__doc__ or "")
    paragraphs = [" ".join(it.split()) for it in text.split("\n\n")]
    start = next((i for i, it in enumerate(paragraphs) if it.startswith("Source: ")), None)
    ours = start is not None and paragraphs[start].startswith("Source: ours")
    absent = [
        name
        for name, there in (
            ("a docstring with `Source: …` in a paragraph after the rule", start),
            ("an arXiv number in `paper`", ours or papers_of(method)),
            ("`licence`", ours or method.licence),
            ("`use_when`", method.use_when),
        )
        if not there
    ]
    if absent or start is None:
        raise ValueError(f"{method.__name__} lacks {', '.join(absent)}")
    _, *parts = _HEADS.split(" ".join(paragraphs[start:]))
    told = dict(zip(parts[::2], (it.strip() for it in parts[1::2]), strict=True))
    source = told.pop("Source")
    if not (told or ours):
        raise ValueError(f"{method.__name__} does not say how it differs: `Differs from …: …`")
    return Facts(
        name=method.name,
        rule=tuple(paragraphs[:start]),
        papers=papers_of(method),
        source=source,
        differs={name.removeprefix("Differs from "): it for name, it in told.items()},
        licence=method.licence,
        library=method.library,
        use_when=method.use_when,
        options=options_of(method),
    )


def papers_of(method: type[Named]) -> tuple[str, ...]:
    """The arXiv numbers in `paper`."""
    return tuple(re.findall(r"\b\d{4}\.\d{4,5}\b", method.paper))
