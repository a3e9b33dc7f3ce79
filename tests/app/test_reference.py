"""The reference page is what the definitions say."""

from __future__ import annotations

from pathlib import Path

from kinora.app.reference import page

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "make it again: python -m kinora.app.reference > docs/reference.md"
    )


def test_it_names_every_option_with_its_range() -> None:
    for told in (
        "`when`",
        "one of faster, always",
        "`--recipe`",
        "kinora recipes show",
        "`--json`",
    ):
        assert told in page()
