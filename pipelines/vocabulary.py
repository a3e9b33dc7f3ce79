"""What a model makes of a prompt's words: which ones it was never taught, and where it cuts."""

from __future__ import annotations

import difflib
from typing import Any, cast

from .cards import Card
from .errors import ModelError
from .folder import ModelFolder, read_object, reading


def words(card: Card) -> list[str] | None:
    """All words the model knows, sorted; None where its tokenizer can spell any word.

    Only a `WordLevel` vocabulary in a `tokenizer*/tokenizer.json` limits a model to words.
    """
    found = _word_level(card)
    if found is None:
        return None
    content, path = found
    try:
        special = {str(entry["content"]) for entry in content.get("added_tokens") or ()}
        known = {str(word) for word in content["model"]["vocab"]}
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return sorted(known - special - {str(content["model"].get("unk_token", ""))})


def unknown_words(card: Card, text: str) -> dict[str, list[str]]:
    """Words of `text` that the model does not know, each with the nearest that it does."""
    found = _word_level(card)
    if found is None:
        return {}
    content, path = found
    unknown = str(content["model"].get("unk_token", ""))
    encoded = _tokenizer(path).encode(text, add_special_tokens=False)
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


def cut(card: Card, folder: ModelFolder, text: str) -> str | None:
    """One line if the model's pipeline would drop the end of `text` without a word, else None."""
    file = folder.path / "tokenizer" / "tokenizer.json"
    with reading(file):
        if card.prompt_tokens is None or not file.is_file():
            return None
    tokenizer = _tokenizer(str(file))
    tokenizer.no_truncation()
    count = len(tokenizer.encode(text).ids)
    if count <= card.prompt_tokens:
        return None
    return (
        f"{card.name} reads the first {card.prompt_tokens} tokens of a prompt; "
        f"this one has {count}, and the rest is ignored"
    )


def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} is damaged: {error}") from None


def _word_level(card: Card) -> tuple[dict[str, Any], str] | None:
    """The content and path of the tokenizer file of a model that knows words only."""
    if card.folder is None:
        return None
    with reading(card.folder):
        if not card.folder.is_dir():
            return None
        folder = ModelFolder.open(card.folder)
        for part in sorted(folder.parts):
            file = folder.path / part / "tokenizer.json"
            if not part.startswith("tokenizer") or not file.is_file():
                continue
            content = read_object(file)
            model = content.get("model")
            if isinstance(model, dict) and cast("dict[str, Any]", model).get("type") == "WordLevel":
                return content, str(file)
    return None
