"""The page of methods is what the definitions say, and no method keeps anything to itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from kinora.accel.facts import facts, papers_of
from kinora.accel.method import AttentionMethod
from kinora.accel.methods import METHODS
from kinora.accel.options import option, options_of
from kinora.accel.recipe import changed, find
from kinora.accel.wrappers import WRAPPERS
from kinora.app.methods_page import DRAWN, PICTURES, page, picture_command

Cli = Callable[..., Any]
DOCS = Path(__file__).parents[2] / "docs"
MOST_BYTES = 100_000


def test_the_page_of_methods_is_up_to_date() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == page(), (
        "make it again: python -m kinora.app.methods_page > docs/methods.md"
    )


@pytest.mark.parametrize("method", [*METHODS.values(), *WRAPPERS], ids=str)
def test_every_method_says_what_it_is(method: type[AttentionMethod]) -> None:
    found = facts(method)
    assert found.name == method.name and found.short.endswith(".")
    assert found.papers or found.source.startswith("ours")
    assert all(paper in found.source for paper in found.papers), "Source names the papers"
    assert {it.name for it in found.options} == {it.name for it in options_of(method)}
    told = re.split(rf"\n##+ {method.name}\n", page())[1].partition("\n##")[0]
    for part in (*found.rule, *found.differs.values(), found.licence, found.use_when):
        assert part in told
    for it in found.options:
        assert f"| `{it.name}` |" in told and it.allowed() in told
    for paper in found.papers:
        assert f"(https://arxiv.org/abs/{paper})" in told


class Whole(AttentionMethod):
    """Everything is kept.

    As it always was.

    Source: A Paper (arXiv 2401.00001), where
    a line ends. Differs from the paper: it is: shorter. Differs from the authors' code: `x = 1`
    there.

    It differs from others too.
    """

    name: ClassVar[str] = "whole"
    paper: ClassVar[str] = "arXiv 2401.00001"
    licence: ClassVar[str] = "MIT"
    use_when: ClassVar[str] = "all else fails"
    keep: float = option(0.5, "Share", above=0, most=1)


def test_facts_are_read_from_the_docstring() -> None:
    found = facts(Whole)
    assert found.rule == ("Everything is kept.", "As it always was.")
    assert found.source == "A Paper (arXiv 2401.00001), where a line ends."
    assert found.differs == {
        "the paper": "it is: shorter.",
        "the authors' code": "`x = 1` there. It differs from others too.",
    }
    assert found.to_json()["options"]["keep"]["allowed"] == "a number above 0 to 1"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"licence": ""}, "Lacking lacks `licence`"),
        ({"use_when": ""}, "`use_when`"),
        ({"paper": "to appear"}, "an arXiv number"),
        ({"__doc__": "A rule."}, "`Source: …` in a paragraph after the rule"),
        ({"__doc__": "Source: it."}, "`Source: …` in a paragraph after the rule"),
        ({"__doc__": "A rule.\n\nSource: it."}, "does not say how it differs"),
    ],
)
def test_a_method_without_its_facts_is_refused(changed: dict[str, str], told: str) -> None:
    lacking = type("Lacking", (Whole,), {"__doc__": Whole.__doc__, **changed})
    with pytest.raises(ValueError, match=re.escape(told)):
        facts(lacking)


def test_papers_are_arxiv_numbers() -> None:
    assert papers_of(METHODS["top-blocks"]) == ("2505.13389", "2509.24006")


def test_pictures_are_small_and_of_methods_that_there_are() -> None:
    pictures = list(PICTURES.iterdir())
    assert {it.stem for it in pictures} <= set(METHODS) and pictures
    for path in pictures:
        assert path.stat().st_size < MOST_BYTES and f"plans/{path.name})" in page()
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 600


def test_what_draws_a_picture_says_what_defaults_must_not_change() -> None:
    assert DRAWN.keys() == {it.stem for it in PICTURES.iterdir()}
    for name, method in METHODS.items():
        command = picture_command(facts(method))
        given = [it for flag, it in pairwise(command) if flag == "--set"]
        recipe = changed(find("dense"), given)
        assert recipe.table()["attention"]["from_step"] == 0.4
        said = {it.partition("=")[0].removeprefix("attention.") for it in given}
        shares = {"keep", "beta", "threshold", "tail", "tile", "frames", "height", "width"}
        shares |= {"blocks", "branch"}
        # Of threshold-blocks keep is of the other rule, of blade the tail was always there.
        beside = {"threshold-blocks": {"keep"}, "blade": {"tail"}, "paro": {"tail"}}
        wanted = shares & {it.name for it in options_of(method)}
        if name in DRAWN:
            assert wanted - beside.get(name, set()) <= said, name


def test_the_command_line_tells_the_same(cli: Cli) -> None:
    every = cli("methods", "--json").last["methods"]
    assert [it["name"] for it in every] == list(METHODS)
    one = cli("methods", "show", "blade", "--json").last["method"]
    assert one == next(it for it in every if it["name"] == "blade")
    shown = cli("methods", "show", "blade").out
    for told in ("https://arxiv.org/abs/2508.10774", "not as the paper", "keep_least", "licence"):
        assert told in shown
    around = cli("methods", "show", "reuse").out
    for told in ("https://arxiv.org/abs/2509.24014", "not as the authors' code", "branches"):
        assert told in around
    assert "Around any of them: by-layer, quantised, reuse, within." in cli("methods").out
    assert cli("methods", "show", "within", "--json").last["around"]["name"] == "within"
    assert "did you mean reuse" in cli("methods", "show", "reus").complaint
    refused = cli("methods", "show", "balde")
    assert refused.status == 2 and "did you mean blade" in refused.complaint
