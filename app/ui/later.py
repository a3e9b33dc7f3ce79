"""A quick start: imports that wait until they are used, so that the page is there before torch."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

# What the import system and `inspect` ask of every module, and what is known before it is run. A
# package's `__path__` is not among them: its modules need the package.
_KNOWN = frozenset(("__class__", "__file__", "__loader__", "__name__", "__package__", "__spec__"))


def defer(*names: str) -> None:
    """Have `import NAME` run a module no sooner than something in it is used, in this process.

    A module that is imported already, or not installed, stays so. Its own modules, as `torch.nn`,
    import it in full.
    """
    for name in names:
        spec = None if name in sys.modules else find_spec(name)
        if spec is None or spec.loader is None:
            continue
        module = module_from_spec(spec)
        spec.loader_state = _Loading()
        module.__class__ = _Later
        sys.modules[name] = module


def without_stubs() -> None:
    """Have gradio write no stubs for editors, from templates, whenever it is imported.

    It takes a quarter of that time. Where gradio does so no more, nothing is changed.
    """
    if "gradio" not in sys.modules:
        sys.meta_path.insert(0, _WithoutStubs())


class _WithoutStubs(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "gradio.component_meta":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_without(module: ModuleType) -> None:
                run(module)
                if hasattr(module, "create_or_modify_pyi"):
                    vars(module)["create_or_modify_pyi"] = lambda *_: None

            vars(spec.loader)["exec_module"] = run_without
        return spec


@contextmanager
def uncollected() -> Generator[None, None, None]:
    """No search for garbage: imports leave hardly any, and it takes a quarter of their time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Loading:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.begun = False


class _Later(ModuleType):
    """A module that is not run yet; whoever uses it first runs it, others wait for that."""

    def __getattribute__(self, name: str) -> Any:
        if name in _KNOWN:
            return ModuleType.__getattribute__(self, name)
        state: _Loading = self.__spec__.loader_state  # pyright: ignore[reportOptionalMemberAccess]
        with state.lock:
            if not state.begun:
                state.begun = True
                object.__getattribute__(self, "_run")(state)
            return ModuleType.__getattribute__(self, name)

    def _run(self, state: _Loading) -> None:
        spec: Any = ModuleType.__getattribute__(self, "__spec__")
        module: Any = self
        try:
            with uncollected():
                spec.loader.exec_module(self)
        except BaseException:
            state.begun = False
            raise
        module.__class__ = ModuleType
