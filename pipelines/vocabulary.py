"""What a model makes of a prompt's words: which ones it was never taught, and where it cuts."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from .cards import Card
from .errors import ModelError
from .folder import ModelFolder, read_object, reading

_MOST_NAMED = 4
_LONGEST_NAMED = 40


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
    special.add(str(content["model"].get("unk_token", "")))
    return sorted(word for word in known - special if _is_word(word))


def warning(card: Card, text: str) -> str | None:
    """One line about what of `text` the model does not know, or None if it knows every word.

    Names the first unknown words, each with the nearest known ones; says so if there are no words.
    """
    found, known = _word_level(card), words(card)
    if found is None or known is None:
        return None
    content, path = found
    unknown = str(content["model"].get("unk_token", ""))
    encoded = _tokenizer(path).encode(text, add_special_tokens=False)
    read = [
        (text[start:end], token == unknown)
        for token, (start, end) in zip(encoded.tokens, encoded.offsets, strict=True)
        if _is_word(text[start:end])
    ]
    where = f"`kinora models show {card.name}` lists the words it knows"
    if not read:
        return f"{card.name} finds no word in {_short(text)}; {where}"
    missing = list(dict.fromkeys(word for word, is_unknown in read if is_unknown))
    if not missing:
        return None
    told = ", ".join(_with_nearest(word, known) for word in missing[:_MOST_NAMED])
    more = len(missing) - _MOST_NAMED
    told += f" and {more} more" if more > 0 else ""
    return f"{card.name} does not know {told}; {where}"


def _is_word(text: str) -> bool:
    return any(map(str.isalnum, text))


def _with_nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word[:_LONGEST_NAMED].lower(), known, n=3, cutoff=0.6)
    return f"{_short(word)} ({'nearest: ' + ', '.join(near) if near else 'nothing is near'})"


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_NAMED else f"{text[:_LONGEST_NAMED]}…")


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
            content = _word_level_content(file, file.stat().st_mtime_ns)
            if content is not None:
                return content, str(file)
    return None


@lru_cache(maxsize=8)
def _word_level_content(file: Path, changed_ns: int) -> dict[str, Any] | None:
    """Of a file that changed then: others are large, and are asked for with every prompt."""
    content = read_object(file)
    model = content.get("model")
    word_level = isinstance(model, dict) and cast("dict[str, Any]", model).get("type")
    return content if word_level == "WordLevel" else None
