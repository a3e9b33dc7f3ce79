"""The words a model was taught, where its tokenizer is a plain list of words."""

from __future__ import annotations

import difflib
from typing import Any, cast

from .cards import Card
from .folder import ModelFolder, read_object


def words(card: Card) -> list[str] | None:
    """All words the model knows, sorted; None where its tokenizer can spell any word.

    Only a `WordLevel` vocabulary in a `tokenizer*/tokenizer.json` limits a model to words.
    """
    found = _word_level(card)
    if found is None:
        return None
    content, _ = found
    special = {str(entry["content"]) for entry in content.get("added_tokens", ())}
    special.add(str(content["model"].get("unk_token", "")))
    return sorted(set(cast("dict[str, int]", content["model"]["vocab"])) - special)


def unknown_words(card: Card, text: str) -> dict[str, list[str]]:
    """Words of `text` that the model does not know, each with the nearest that it does."""
    found = _word_level(card)
    if found is None:
        return {}
    from tokenizers import Tokenizer

    content, path = found
    unknown = str(content["model"].get("unk_token", ""))
    encoded = Tokenizer.from_file(path).encode(text, add_special_tokens=False)
    spans = encoded.offsets
    missing = [
        text[start:end]
        for token, (start, end) in zip(encoded.tokens, spans, strict=True)
        if token == unknown and any(map(str.isalnum, text[start:end]))
    ]
    known = words(card) or []
    return {
        word: difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.6)
        for word in dict.fromkeys(missing)
    }


def warning(card: Card, text: str) -> str | None:
    """One line about unknown words in `text`, or None if there are none."""
    missing = unknown_words(card, text)
    if not missing:
        return None
    told = ", ".join(
        f"{word!r} (nearest: {', '.join(near)})" if near else f"{word!r} (nothing is near)"
        for word, near in missing.items()
    )
    return f"{card.name} does not know {told}; `kinora models show {card.name}` lists its words"


def _word_level(card: Card) -> tuple[dict[str, Any], str] | None:
    if card.folder is None or not card.folder.is_dir():
        return None
    folder = ModelFolder.open(card.folder)
    for part in sorted(folder.parts):
        file = folder.path / part / "tokenizer.json"
        if part.startswith("tokenizer") and file.is_file():
            content = read_object(file)
            model = content.get("model")
            if isinstance(model, dict) and cast("dict[str, Any]", model).get("type") == "WordLevel":
                return content, str(file)
    return None
