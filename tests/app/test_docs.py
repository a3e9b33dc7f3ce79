"""What the docs print is what the commands print.

Of the `console` blocks in README.md and docs/, the commands that only tell something are run, as on
the machine of the docs: a terminal of 110 columns, no GPU, 24.6 GB free. In a block

- `…` at the end of a line stands for anything, further lines too;
- the path in a row `weights` is that of somebody's clone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COLUMNS = 110
FREE_BYTES = 24_600_000_000
TELLING = ("plan", "recipes", "models", "methods", "policies")
"""Commands that only tell something: fast, and the same everywhere."""


@dataclass(frozen=True)
class Shown:
    """A command in a page, with the output that stands below it, if any."""

    page: str
    arguments: tuple[str, ...]
    output: str

    def __str__(self) -> str:
        return f"{self.page}: kinora {' '.join(self.arguments)}"


def shown(page: Path) -> Iterator[Shown]:
    """The commands in the `console` blocks of a page that only tell something."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.M)[1:]:
            line, _, output = part.partition("\n")
            program, *arguments = shlex.split(line, comments=True) or [""]
            if ">" in arguments:
                arguments = arguments[: arguments.index(">")]
            asks = {"--help", "-h", "--version"}.intersection(arguments)
            if program == "kinora" and (asks or (arguments[:1] and arguments[0] in TELLING)):
                yield Shown(page.name, tuple(arguments), output)


SHOWN = [command for page in PAGES for command in shown(page)]


def masked(text: str) -> str:
    """`text` without padding and without the path of the clone, which may be wrapped."""
    told = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"^weights   .*(\n {10}.*)*", "weights   PATH", told, flags=re.M)


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_page_shows_what_the_command_prints(
    command: Shown, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("kinora.pipelines.memory.free_bytes", lambda _device: FREE_BYTES)
    called = cli(*command.arguments)
    assert called.status == 0, called.err
    parts = re.split(r"…$", masked(command.output), flags=re.M)
    printed = masked(called.out)
    assert not command.output or re.fullmatch(".*".join(map(re.escape, parts)), printed, re.S), (
        f"{command} does not print what the page shows, but\n{printed}"
    )


def test_the_pages_show_each_of_these_commands() -> None:
    with_output = {command.arguments[:2] for command in SHOWN if command.output}
    assert with_output >= {
        ("plan", "--recipe"),
        ("recipes", "show"),
        ("models", "show"),
        ("methods",),
        ("policies",),
    }


def test_the_guide_has_the_predicted_gain(cli: Cli) -> None:
    plan = cli("plan", "--recipe", "balanced", "--size", "256x256", "--device", "cpu", "--json")
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    assert re.findall(r"\| `balanced` \| .* \| (\S+) times \|", guide) == [
        f"{plan.last['parts'][0]['speedup']:.2f}"
    ]
