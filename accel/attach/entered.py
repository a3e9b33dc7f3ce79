"""A module's calls, seen from outside of its hooks and of `torch.compile`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Called:
    """One call of a module, which goes on where this is called.

    Attributes:
        given: its arguments by name.
    """

    given: Mapping[str, Any]
    _module: Callable[..., Any]
    _names: tuple[str, ...]
    _args: tuple[Any, ...]
    _kwargs: Mapping[str, Any]

    def __call__(self, **changed: Any) -> Any:
        """What the module returns, with some of the arguments `changed`.

        Each is given as it was, by place or by name: hooks look for it there.
        """
        args, kwargs = list(self._args), dict(self._kwargs)
        for name, value in changed.items():
            if name in kwargs:
                kwargs[name] = value
            else:
                args[self._names.index(name)] = value
        return self._module(*args, **kwargs)


class Entry:
    """What stands in for a module's call while it is accelerated."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@contextmanager
def entered(module: Any, seen: Callable[[Called], Any]) -> Generator[None, None, None]:
    """Hand every call of a module to `seen`.

    `_compiled_call_impl` is what torch calls in place of `forward` and its hooks, where it is
    set; `Module.compile` sets it.
    """
    before = vars(module).get("_compiled_call_impl")
    call = before or module._call_impl
    inner = getattr(module, "_orig_mod", module)
    signature = inspect.signature(type(inner).forward)
    _, *rest = signature.parameters
    names = tuple(rest)

    def entry(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(inner, *args, **kwargs).arguments
        return seen(Called(given, call, names, args, kwargs))

    ours = vars(module)["_compiled_call_impl"] = Entry(entry)
    try:
        yield
    finally:
        if vars(module).get("_compiled_call_impl") is not ours:
            pass  # it was compiled in between: that is not ours to undo
        elif before is None:
            del vars(module)["_compiled_call_impl"]
        else:
            vars(module)["_compiled_call_impl"] = before
