"""What Predicted says beside the plan: an image that is missing, words that are not known."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[ui]"')

from standing import Standing, opened

from kinora.app.ui import view
from kinora.app.ui.page import Page
from kinora.pipelines import cards, vocabulary
from kinora.pipelines.errors import RequestError


@pytest.fixture
def page(tmp_path: Path) -> Generator[Page, None, None]:
    """The page over an empty folder; nothing is made."""
    with opened(tmp_path / "made") as made:
        yield made


def test_a_model_that_needs_an_image_says_so_and_nothing_is_there_to_copy(page: Page) -> None:
    standing = Standing(page)
    standing.values[standing.panel.fields["model"]] = "wan2.1-i2v-14b-480p"
    for name in ("width", "height", "frames"):
        standing.values[standing.panel.fields[name]] = None
    told = standing.predicted()
    with pytest.raises(RequestError) as refused:
        page._jobs.submit(standing.request())  # pyright: ignore[reportPrivateUsage]
    for part in (standing.panel.prediction, standing.builder.why):
        assert view.worded(str(refused.value)) in told[part]
        assert told[part].count("<li>") == 1 and "say which by Image" in told[part]
    assert told[standing.builder.toml] == told[standing.builder.command] == ""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    id = page._jobs.uploads.keep(picture.getvalue(), named="a")  # pyright: ignore[reportPrivateUsage]
    standing.values[standing.panel.fields["image"]] = id
    told = standing.predicted()
    assert "say which" not in told[standing.panel.prediction]
    assert "--image" in told[standing.builder.command]


def test_without_a_prompt_there_is_no_command_that_would_be_refused(page: Page) -> None:
    standing = Standing(page)
    standing.values[standing.panel.fields["prompt"]] = " "
    told = standing.predicted()
    assert told[standing.builder.command] == ""
    assert "tokens" in told[standing.panel.prediction] and told[standing.builder.toml]


@pytest.mark.parametrize("character", ["\u202e", "\u2066"])
def test_a_prompt_that_turns_what_follows_is_copied_escaped(page: Page, character: str) -> None:
    standing = Standing(page)
    prompt = f"it's a \\ {character}ring"
    standing.values[standing.panel.fields["prompt"]] = prompt
    command = standing.predicted()[standing.builder.command]
    assert character not in command and command.isascii()
    bash = ["bash", "-c", f'kinora() {{ printf %s "$2"; }}; {command}']
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    assert subprocess.run(bash, env=env, check=True, capture_output=True).stdout.decode() == prompt


def test_words_that_the_model_does_not_know_are_told(page: Page, wan_folder: Path) -> None:
    standing = Standing(page)
    known = "does not know"
    assert known not in standing.predicted()[standing.panel.prediction]
    standing.values[standing.panel.fields["prompt"]] = "a <b>rde</b> circle"
    standing.values[standing.panel.fields["negative_prompt"]] = "blurry"
    told = standing.predicted()
    warned = [
        vocabulary.warning(cards.find("kinora-tiny"), it)
        for it in ("a <b>rde</b> circle", "blurry")
    ]
    for it in warned:
        assert it is not None and f"<li>{view.worded(it)}</li>" in told[standing.panel.prediction]
    assert "k-bad" not in told[standing.panel.prediction] and told[standing.builder.command]
    standing.values[standing.panel.fields["prompt"]] = " "
    standing.values[standing.panel.fields["negative_prompt"]] = ""
    assert known not in standing.predicted()[standing.panel.prediction], "nothing is asked for yet"
    standing.values[standing.panel.fields["prompt"]] = "a" * 30_000
    told = standing.predicted()
    assert "30,000 characters" in told[standing.panel.prediction]
    assert told[standing.builder.command] == ""


def test_the_words_stand_at_the_prompt_and_follow_the_model(
    page: Page, wan_folder: Path, model_folders: dict[str, Path]
) -> None:
    words = page._panel.words  # pyright: ignore[reportPrivateUsage]
    tiny = " ".join(vocabulary.words(cards.find("kinora-tiny")) or ())
    assert "Words it knows" in words.value and f"<p>{tiny}</p>" in words.value
    other = page.describe(str(wan_folder))[words]
    assert other != words.value and "Words it knows" in other
    for model in ("wan2.1-t2v-1.3b", str(model_folders["sdxl"]), "no such"):
        assert page.describe(model)[words] == ""
    assert page.describe("kinora-tiny")[words] == words.value
