"""Follows a run by the calls of its scheduler, which every pipeline makes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

Arguments = Mapping[str, Any]


@contextmanager
def watched(
    scheduler: Any,
    on_start: Callable[[], None],
    on_step: Callable[[Arguments], None],
    on_stepped: Callable[[Any], None],
) -> Generator[None, None, None]:
    """Call `on_start` after each `set_timesteps` of `scheduler`, the others around each `step`.

    `on_step` gets the arguments by name: their order differs between schedulers. `on_stepped` gets
    the sample that the step has left.
    Methods are shadowed on the instance. A deep copy of it, which some pipelines make, keeps the
    shadow but steps itself, unseen; signatures stay those of the class.
    """
    with ExitStack() as stack:
        stack.enter_context(_shadowed(scheduler, "set_timesteps", after=lambda _: on_start()))
        stack.enter_context(
            _shadowed(scheduler, "step", before=on_step, after=lambda it: on_stepped(it[0]))
        )
        yield


@contextmanager
def _shadowed(
    owner: Any,
    name: str,
    *,
    before: Callable[[Arguments], None] = lambda _: None,
    after: Callable[[Any], None] = lambda _: None,
) -> Generator[None, None, None]:
    earlier = vars(owner).get(name)
    inner = getattr(earlier, "__func__", None) or getattr(type(owner), name)
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is owner:
            before(signature.bind(self, *args, **kwargs).arguments)
        result = inner(self, *args, **kwargs)
        if self is owner:
            after(result)
        return result

    vars(owner)[name] = MethodType(method, owner)
    try:
        yield
    finally:
        if getattr(vars(owner).get(name), "__func__", None) is not method:
            pass  # another one came on top and is still there: taking this off would lose it
        elif earlier is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = earlier
