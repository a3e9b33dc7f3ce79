"""The parts of a recipe: each a table that names a method or a policy, with its options beside it.

The options of what wraps a method stand there too, see `wrappers`. A part that chooses nothing by
name is `Settings`: its options alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from .errors import RecipeError, hint
from .method import AttentionMethod, Wrapper
from .methods import METHODS
from .named import Named
from .options import Option, Options, checked, options_of, shown
from .parallel import Parallel
from .policies import POLICIES
from .wrappers import WRAPPERS

T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Part(Generic[T]):
    """One of them.

    Attributes:
        key: of the table.
        selector: the key in it that names one of `known`.
        noun: what that is, in words.
        without: what a recipe without this part does, in words that follow its name.
        known: by name.
        wrappers: what may wrap it, from the inside to the outside.
    """

    key: str
    selector: str
    noun: str
    without: str
    known: Mapping[str, type[T]]
    wrappers: tuple[type[Wrapper], ...] = ()

    def options(self, chosen: type[T]) -> tuple[Option, ...]:
        """The options of one of them and of what may wrap it, as a recipe spells them."""
        return tuple(it for model in (chosen, *self.wrappers) for it in options_of(model))

    def names(self) -> set[str]:
        """All that may stand in the table."""
        every = (it.name for chosen in self.known.values() for it in self.options(chosen))
        return {self.selector, *every}

    def read(self, table: Any) -> T | None:
        """What a TOML table describes.

        Raises:
            RecipeError: it is no table, or names nothing known, or an option is not.
        """
        if table is None:
            return None
        if isinstance(table, list):
            raise RecipeError(
                f"{self.key} is given {len(cast('list[Any]', table))} times: a recipe has at most "
                f"one {self.noun}, keep one of them"
            )
        if not isinstance(table, Mapping):
            raise RecipeError(
                f"{self.key} is {table!r}; it must be a table with a {self.selector} in it"
            )
        given = dict(cast("Mapping[str, Any]", table))
        name = given.pop(self.selector, None)
        if name is None:
            raise RecipeError(
                f"{self.key} names no {self.selector}; there are {', '.join(self.known)}"
            )
        chosen = self.known[self.check_name(name)]
        known = {it.name: it for it in self.options(chosen)}
        for key in given:
            if key not in known:
                raise RecipeError(
                    f"{name} has no option {key!r}{hint(key, known)}; it has {', '.join(known)}"
                )
        values = {key: checked(known[key], it, f"{self.key}.{key}") for key, it in given.items()}

        def of(model: type[Named]) -> dict[str, Any]:
            return {it.name: values[it.name] for it in options_of(model) if it.name in values}

        chosen.check_options(values)
        found: Any = chosen(**of(chosen))
        for wrapper in self.wrappers:
            own, all_options = of(wrapper), options_of(wrapper)
            if any(own.get(it.name, it.default) != idle(wrapper, it.name) for it in all_options):
                method = cast("type[AttentionMethod]", chosen)
                wrapper.check(method, values)
                found = wrapper(method=found, **own)
        return found

    def check_name(self, name: Any) -> str:
        """`name`, if it is one of `known`. Raises RecipeError."""
        several = name if isinstance(name, list) else re.split(r"[\s,+]+", str(name))
        named = [str(it) for it in cast("list[Any]", several)]
        if len(named) > 1 and set(named) <= self.known.keys():
            raise RecipeError(
                f"{self.key}.{self.selector} names {', '.join(named)}: a recipe has at most one "
                f"{self.noun}, keep one of them"
            )
        if not isinstance(name, str) or name not in self.known:
            raise RecipeError(
                f"there is no {self.noun} {shown(name)!r}{hint(str(name), self.known)}; "
                f"there are {', '.join(self.known)}"
            )
        return name

    def table(self, value: T) -> dict[str, Any]:
        """What `read` reads again.

        Defaults of wrappers that change nothing are left out; those that do are told, so that a
        table means the same under other defaults.

        Raises:
            RecipeError: it is wrapped in a way that no file could say.
        """
        wrapped = self._check_order(value)
        absent = [it.idle for it in self.wrappers if it.name not in wrapped]
        return self._flat(value) | {key: idle[key] for idle in absent for key in idle}

    def explained(self, value: T) -> list[str]:
        """The same as lines of TOML, every option with its help and range."""
        table = self.table(value)
        chosen = self.known[table.pop(self.selector)]
        known = self.options(chosen)
        return [
            f"[{self.key}]",
            f"{self.selector} = {json.dumps(chosen.name)}",
            *explained({it.name: table.get(it.name, it.default) for it in known}, known),
        ]

    def _flat(self, value: Named) -> dict[str, Any]:
        own = {it.name: getattr(value, it.name) for it in options_of(type(value))}
        if not isinstance(value, Wrapper):
            return {self.selector: value.name, **own}
        told = {key: it for key, it in own.items() if key in value.idle}
        changed = {key: it for key, it in own.items() if it != default(type(value), key)}
        return {**self._flat(value.method), **told, **changed}

    def _check_order(self, value: Named) -> list[str]:
        """What wraps it, from the outside.

        Raises `RecipeError` where that stands in another order than files can say.
        """
        found: list[str] = []
        while isinstance(value, Wrapper):
            found.append(value.name)
            value = value.method
        known = [wrapper.name for wrapper in reversed(self.wrappers)]
        if found != [name for name in known if name in found]:
            raise RecipeError(
                f"{self.key} is wrapped in {', then '.join(found)}, from the outside; a recipe can "
                f"have each of {', then '.join(known)} once, in that order"
            )
        return found


@dataclass(frozen=True)
class Settings:
    """A part of options alone; without effect, and no part of the recipe, where all have defaults.

    Attributes:
        key: of the table.
        model: its options.
    """

    key: str
    model: type[Options]

    def names(self) -> set[str]:
        """All that may stand in the table."""
        return {it.name for it in options_of(self.model)}

    def read(self, table: Any) -> Options | None:
        """What a TOML table describes. Raises RecipeError where it is none, see `Part`."""
        if table is None:
            return None
        if not isinstance(table, Mapping):
            raise RecipeError(f"{self.key} is {shown(table)}; it must be a table")
        known = {it.name: it for it in options_of(self.model)}
        values: dict[str, Any] = {}
        for key, value in cast("Mapping[str, Any]", table).items():
            if key not in known:
                raise RecipeError(
                    f"{self.key} has no option {key!r}{hint(key, known)}; it has {', '.join(known)}"
                )
            values[key] = checked(known[key], value, f"{self.key}.{key}")
        found = self.model(**values)
        return None if found == self.model() else found

    def table(self, value: Options) -> dict[str, Any]:
        """What `read` reads again."""
        return {name: getattr(value, name) for name in sorted(self.names())}

    def explained(self, value: Options) -> list[str]:
        """The same as lines of TOML, every option with its help and range."""
        return [f"[{self.key}]", *explained(self.table(value), options_of(self.model))]


def explained(values: Mapping[str, Any], known: Iterable[Option]) -> list[str]:
    """Lines of TOML, each with what it means."""
    return [f"{it.name} = {_toml(values[it.name])}  # {it.help}: {it.allowed()}" for it in known]


def _toml(value: Any) -> str:
    """JSON writes these values as TOML does, but for one character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def idle(wrapper: type[Wrapper], name: str) -> Any:
    """The value of an option of a wrapper that changes nothing."""
    return wrapper.idle.get(name, default(wrapper, name))


def default(model: type[Options], name: str) -> Any:
    """The default of an option."""
    return model.model_fields[name].default


ATTENTION = Part(
    "attention", "method", "attention method", "accelerates no attention", METHODS, WRAPPERS
)
STEPS = Part("steps", "policy", "step policy", "skips no steps", POLICIES)
PARALLEL = Settings("parallel", Parallel)
PARTS: dict[str, Part[Any] | Settings] = {part.key: part for part in (ATTENTION, STEPS, PARALLEL)}
"""By key, in the order in which a file has them."""
