"""Follows a run by the calls of its scheduler, which every pipeline makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any


@contextmanager
def watched(
    scheduler: Any, on_start: Callable[[], None], on_step: Callable[[], None]
) -> Generator[None, None, None]:
    """Call `on_start` after each `set_timesteps` of `scheduler` and `on_step` after each `step`.

    Methods are shadowed on the instance. A deep copy of it, which some pipelines make, keeps the
    shadow but steps itself, unseen; signatures stay those of the class.
    """
    with ExitStack() as stack:
        for name, after in (("set_timesteps", on_start), ("step", on_step)):
            stack.enter_context(_shadowed(scheduler, name, after))
        yield


@contextmanager
def _shadowed(owner: Any, name: str, after: Callable[[], None]) -> Generator[None, None, None]:
    before = vars(owner).get(name)
    inner = getattr(before, "__func__", None) or getattr(type(owner), name)

    @functools.wraps(inner)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = inner(self, *args, **kwargs)
        if self is owner:
            after()
        return result

    vars(owner)[name] = MethodType(method, owner)
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
