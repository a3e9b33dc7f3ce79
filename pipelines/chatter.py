"""What diffusers and transformers say while they work: warnings become notices, the rest is off."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

_LIBRARIES = ("diffusers", "transformers")
# Kinora does without torchvision on purpose; the libraries remark on it at import.
_KNOWN = ("torchvision",)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class _Relay(logging.Handler):
    """Hands each warning on once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, unless it was said before or is about what Kinora does without."""
        text = _STYLE.sub("", record.getMessage())
        if text not in self._said and not any(word in text for word in _KNOWN):
            self._said.add(text)
            self._say(f"{record.name.partition('.')[0]}: {text}")


@contextmanager
def relayed(say: Callable[[str], None]) -> Generator[None, None, None]:
    """Send the libraries' warnings to `say`, each once, and keep their bars off the screen."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars = [
        module
        for module in (diffusers_logging, transformers_logging)
        if module.is_progress_bar_enabled()
    ]
    for module in bars:
        module.disable_progress_bar()
    relay = _Relay(say)
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [relay], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        for module in bars:
            module.enable_progress_bar()
