"""Writes docs/policies.md from the definitions: which steps each step policy skips, and from where.

    python -m kinora.app.policies_page > docs/policies.md

Tests hold the page against what this prints, and that no policy lacks its facts.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..accel.facts import facts
from ..accel.policies import POLICIES
from .methods_page import console_block, entry
from .terminal import show_policies

_HEAD = """\
Made by `python -m kinora.app.policies_page` from the definitions; do not edit.

A recipe names one of them, or `--set steps.policy=NAME`, and its options stand beside it
([recipes.md](recipes.md)). Which to choose, and what each costs: [steps.md](steps.md).

Those that skip steps are written anew from the mathematics of the papers; caches are those of
diffusers and cache-dit, which run as they are. No code is copied.
"""


def page() -> str:
    """The page in Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    every = [facts(policy) for policy in POLICIES.values()]
    yield "# Step policies"
    yield ""
    yield from console_block("kinora policies", lambda console: show_policies(every, console))
    yield ""
    yield from _HEAD.splitlines()
    for policy in every:
        yield from entry(policy)


if __name__ == "__main__":
    print(page(), end="")
