"""Writes docs/methods.md from the definitions: what each attention method does, and from where.

    python -m kinora.app.methods_page > docs/methods.md

A test holds the page against what this prints, and another one that no method lacks its facts.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from ..accel.facts import Facts, facts
from ..accel.methods import METHODS
from ..accel.wrappers import WRAPPERS
from .reference import option_table
from .terminal import show_methods

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "plans"
COLUMNS = 110
PROMPT = "a red circle moving left and a blue star standing still over a gray background"
_HEAD = """\
Made by `python -m kinora.app.methods_page` from the definitions; do not edit.

A recipe names one of them, or `--set attention.method=NAME`, and their options stand beside it
([recipes.md](recipes.md)). What they select on `kinora-tiny` [was measured](selection.md), and so
was [what that does to its videos](guide.md#what-it-gains).

All are written anew from the mathematics of the papers. No code is copied, whatever the licence of
the authors' own, which is told for those who want to compare.

The pictures are of one call of `kinora-tiny` at 256 × 256, two of its four heads, dense up to
there. At the left are all pairs of tokens in the order of the plan, queries down and keys across;
at the right, frame by frame, the keys of the query in the middle, which is framed. Blue is kept,
red is left out; the darker, the more dense attention falls there. Fewer tiles are kept than by
default, which shows more.
"""
DRAWN = {
    "top-blocks": "keep=0.25 tail=none",
    "threshold-blocks": "beta=1 tail=none",
    "x-attention": "threshold=0.9 least=0 tail=none",
    "sliding-tile": "frames=0.6 height=0.5 width=0.5 tail=none",
    "neighborhood": "frames=0.6 height=0.5 width=0.3",
    "blade": "keep=0.2",
    "hierarchical": "blocks=18 branch=4 tail=none",
    "permuted-blocks": "keep=0.25 tail=none",
    "paro": "calibration=paro.npz",
    "vmoba": "keep=0.25 shared=false",
}
"""Options of what is drawn: fewer tiles than by default show more."""


def page() -> str:
    """The page in Markdown."""
    every = [facts(method) for method in METHODS.values()]
    return "\n".join([*_head(every), *(line for it in every for line in entry(it)), *_any()]) + "\n"


def picture_command(method: Facts) -> list[str]:
    """The arguments of `kinora` that draw a method's picture."""
    names = {it.name for it in method.options}
    settings = [f"attention.method={method.name}", "attention.from_step=0.4"]
    settings += ["attention.tile=64x64"] * ("tile" in names)
    settings += [f"attention.{it}" for it in DRAWN.get(method.name, "").split()]
    where = "--size 256x256 --steps 10 --layer 8 --step 4 --head 0 --head 2"
    changed = [part for setting in settings for part in ("--set", setting)]
    return ["inspect", PROMPT, *where.split(), *changed]


def console_block(command: str, show: Callable[[Console], None]) -> Iterator[str]:
    """A command and what `show` prints for it, as on a terminal of 110 columns."""
    console = Console(file=io.StringIO(), width=COLUMNS)
    with console.capture() as printed:
        show(console)
    yield "```console"
    yield f"$ {command}"
    yield from (line.rstrip() for line in printed.get().splitlines())
    yield "```"


def _head(every: list[Facts]) -> Iterator[str]:
    yield "# Attention methods"
    yield ""
    yield from console_block("kinora methods", lambda console: show_methods(every, console))
    yield ""
    yield from _HEAD.splitlines()


def entry(method: Facts, level: int = 2) -> Iterator[str]:
    """All about one method or policy, under a heading, in lines of Markdown."""
    yield ""
    yield f"{'#' * level} {method.name}"
    for paragraph in method.rule:
        yield ""
        yield paragraph
    drawn = PICTURES / f"{method.name}.png"
    if drawn.exists():
        yield ""
        yield f"![What {method.name} keeps in two heads of one call]({PICTURES.name}/{drawn.name})"
        yield ""
        if any(it.name == "calibration" for it in method.options):
            yield "`kinora calibrate kinora-tiny --size 256x256 --steps 10 --keep 0.25`, then"
        yield f"`kinora {shlex.join(picture_command(method))}`"
    source = re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", method.source)
    told = {
        "Use it": f"where {method.use_when}",
        "Source": source,
        **{f"Differs from {name}": text for name, text in method.differs.items()},
    }
    if method.licence:
        own = f"nothing copied; theirs: {method.licence}."
        told["Licence"] = f"{method.terms}; nothing copied." if method.library else own
    yield ""
    for name, text in told.items():
        yield f"- **{name}**: {text}"
    yield ""
    yield from option_table(method.options)


def _any() -> Iterator[str]:
    yield ""
    yield "## Around any method"
    yield ""
    yield "Options that stand beside those of every method, and change when it is asked."
    for wrapper in WRAPPERS:
        yield from entry(facts(wrapper), level=3)


if __name__ == "__main__":
    print(page(), end="")
