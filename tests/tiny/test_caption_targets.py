"""What the text encoder is asked about each word of a caption."""

from __future__ import annotations

import torch

from kinora.pipelines.tiny.architecture import new_tokenizer, tokenise
from kinora.pipelines.tiny.train.text_encoder import ANSWERS, IGNORED, targets


def _answers(caption: str) -> dict[str, dict[str, str]]:
    """By word (the last of equal ones) what is asked of it and the right answer."""
    tokenizer = new_tokenizer()
    tokens, _ = tokenise([caption], tokenizer)
    asked: dict[str, dict[str, str]] = {}
    for question, target in targets([caption], tokens, tokenizer).items():
        assert target.shape == tokens.shape
        for number, answer in zip(tokens[0].tolist(), target[0].tolist(), strict=True):
            if answer != IGNORED:
                word = str(tokenizer.convert_ids_to_tokens(number))
                asked.setdefault(word, {})[question] = ANSWERS[question][answer]
    return asked


def test_each_object_has_its_own_answers():
    text = "a green star that moves right, left of a blue cross resting over a black background"
    star = {"shape": "star", "colour": "green", "motion": "right", "side": "left"}
    cross = {"shape": "cross", "colour": "blue", "motion": "still", "side": "right"}
    assert _answers(text) == {
        **{"green": star, "star": star, "blue": cross, "cross": cross},
        "</s>": {"background": "black"},
    }


def test_a_second_mention_means_the_same_object():
    text = (
        "a green star growing and a blue cross resting over a white background, "
        "the green star is above the blue cross"
    )
    asked = _answers(text)
    assert asked["star"]["side"] == "top" and asked["cross"]["side"] == "bottom"


def test_what_is_not_said_is_unsaid():
    ring = {"shape": "ring", "colour": "red", "motion": "unsaid", "side": "unsaid"}
    assert _answers("a red ring") == {
        **{"red": ring, "ring": ring},
        "</s>": {"background": "unsaid"},
    }


def test_padding_is_asked_nothing():
    tokenizer = new_tokenizer()
    captions = ["a red ring", "a red ring moving left over a gray background"]
    tokens, mask = tokenise(captions, tokenizer)
    for target in targets(captions, tokens, tokenizer).values():
        assert torch.all(target[mask == 0] == IGNORED)
