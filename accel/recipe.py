"""Recipes: which accelerations to run and how, as a value, a TOML file and single settings.

In a file, the options of what wraps a method (`wrappers`) stand beside its own:

    title = "…"
    [attention]
    method = "top-blocks"
    keep = 0.25
    from_step = 0.2
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import SerializeAsAny

from ..kernels.dense import DenseKernel
from .errors import RecipeError, hint, nearest
from .method import AttentionMethod, Wrapper
from .methods import METHODS
from .options import Option, Options, checked, option, options_of, shown
from .presets import DENSE, FOLDER, names
from .steps import StepPolicy
from .wrappers import WRAPPERS


class Recipe(Options):
    """A composition of accelerations; None is a part that is left as it is."""

    name: str = ""
    title: str = option("", "What it is for, in one line")
    when: Literal["faster", "always"] = option(
        "faster", "Whether a part runs only where it is predicted to be faster, or always"
    )
    dense_kernel: Literal["stock", DenseKernel] = option(
        "stock",
        "Kernel of self-attention that is not sparse: as the pipeline has it, or one of torch's "
        "(sdpa lets torch choose) or of another library that is installed; sage loses precision",
    )
    attention: SerializeAsAny[AttentionMethod] | None = None
    steps: SerializeAsAny[StepPolicy] | None = None
    """No policy has a name yet that a file could give; a library call can bring its own."""

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        return not self.attends and self.steps is None

    @property
    def attends(self) -> bool:
        """Whether it changes how attention is computed."""
        return self.attention is not None or self.dense_kernel != "stock"

    def table(self) -> dict[str, Any]:
        """As a TOML file says it; `from_table` reads it again.

        Raises:
            RecipeError: the attention is wrapped in a way that no file could say.
        """
        _check_order(self.attention)
        own = self._own()
        found: dict[str, Any] = {key: own[key] for key in own if own[key] != _default(Recipe, key)}
        if self.attention is not None:
            found["attention"] = _flat(self.attention)
        if self.steps is not None:
            found["steps"] = {"policy": self.steps.name, **self.steps.model_dump()}
        return found

    def to_toml(self) -> str:
        """As a TOML file with every option's help and range; `find` reads it again."""
        lines = _explained(self._own(), options_of(Recipe))
        if self.attention is not None:
            table = self.table()["attention"]
            method = METHODS[table.pop("method")]
            lines += ["", "[attention]", f"method = {json.dumps(method.name)}"]
            known = attention_options(method)
            lines += _explained({it.name: table.get(it.name, it.default) for it in known}, known)
        return "\n".join(lines) + "\n"

    def _own(self) -> dict[str, Any]:
        """What belongs to no part."""
        return {it.name: getattr(self, it.name) for it in options_of(Recipe)}

    def words(self) -> str:
        """What it asks for, in words."""
        told: list[str] = []
        if self.attends:
            told.append(f"attention by {self.attention_words()}")
        if self.steps is not None:
            told.append(f"steps by {self.steps.words()}")
        return "; ".join(told) or "nothing"

    def attention_words(self) -> str:
        """How attention is to be computed, in words that follow "attention by …"."""
        told = [] if self.attention is None else [self.attention.words()]
        if self.dense_kernel != "stock":
            told.append(f"{'dense calls by ' if told else ''}the {self.dense_kernel} kernel")
        return ", ".join(told)


def from_table(table: Mapping[str, Any], name: str = "") -> Recipe:
    """The recipe that a TOML table describes.

    Raises:
        RecipeError: a part, method or option that there is not, or a value out of range.
    """
    own = {option.name: option for option in options_of(Recipe)}
    fields: dict[str, Any] = {"name": name}
    for key, value in table.items():
        if key == "attention":
            fields[key] = _method(value)
        elif key in own:
            fields[key] = checked(own[key], value, key)
        else:
            known = ["attention", *own]
            under = [f"attention.{it}" for it in nearest(key, _ATTENTION_ONLY, 1)]
            near = hint(key, known) or (f" (did you mean {under[0]}?)" if under else "")
            raise RecipeError(f"a recipe has no {key!r}{near}; it has {', '.join(known)}")
    return Recipe(**fields)


def find(name: str) -> Recipe:
    """The preset called `name`, or the recipe in the TOML file of that path.

    Raises:
        RecipeError: neither is there, or the file is no recipe.
    """
    presets = names()
    if name in presets:
        text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
        return from_table(tomllib.loads(text), name)
    # Of a long path the end says most.
    path, shown = Path(name), name if len(name) <= 200 else f"…{name[-200:]}"
    try:
        path = path.expanduser()
        if not (path.suffix or "/" in name or path.is_file()):
            raise RecipeError(
                f"there is no recipe {shown!r}{hint(name, presets)}; there are "
                f"{', '.join(presets)}, or give the path of a TOML file"
            )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RecipeError):
            raise
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise RecipeError(f"the recipe {shown!r} is no path: {reason}") from error
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
        return from_table(tomllib.loads(text), str(path))
    except RecipeError as error:
        raise RecipeError(f"{shown}: {error}") from error
    except OSError as error:
        near = hint(path.stem, presets)
        raise RecipeError(f"the recipe {shown} cannot be read: {error.strerror}{near}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{shown} is no TOML file: {error}") from error


def changed(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """`recipe` with settings such as `attention.keep=0.3` put over it.

    A new `attention.method` begins with the defaults of that method.

    Raises:
        RecipeError: see `from_table`; or a setting without `=`.
    """
    table, name = recipe.table(), recipe.name
    refusal: RecipeError | None = None
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"{setting!r} sets nothing: write PART.OPTION=VALUE, such as "
                              f"attention.keep=0.3")  # fmt: skip
        *parts, key = path.strip().split(".")
        if not parts:
            if key in _ATTENTION_ONLY:
                raise RecipeError(f"a recipe has no {key!r}: did you mean attention.{key}?")
            table[key] = text.strip()
        elif parts != ["attention"]:
            part = ".".join(parts)
            raise RecipeError(
                f"a recipe has no part {part!r}{hint(part, ['attention'])}; it has attention"
            )
        elif key == "method":
            table["attention"] = {"method": text.strip()}
        elif "attention" not in table:
            raise RecipeError(
                f"{setting}: the recipe {name or DENSE} accelerates no attention; choose another "
                f"--recipe or set attention.method first ({', '.join(METHODS)})"
            )
        else:
            table["attention"][key] = text.strip()
        # One at a time, so that an error names its setting; a later one may still put it right.
        try:
            table = from_table(table, name).table()
        except RecipeError as error:
            refusal = refusal or error
    try:
        return from_table(table, name)
    except RecipeError as error:
        raise refusal or error from None


def attention_options(method: type[AttentionMethod]) -> tuple[Option, ...]:
    """The options of a method and of what may wrap it, as a recipe spells them."""
    return tuple(it for model in (method, *WRAPPERS) for it in options_of(model))


_ATTENTION_ONLY = {"method"}.union(
    *({it.name for it in attention_options(method)} for method in METHODS.values())
)
"""What stands under `attention`, for those who forget to say so."""


def _method(table: Any) -> AttentionMethod | None:
    if table is None:
        return None
    if not isinstance(table, Mapping):
        raise RecipeError(f"attention is {table!r}; it must be a table with a method in it")
    given = dict(cast("Mapping[str, Any]", table))
    name = given.pop("method", None)
    if name is None:
        raise RecipeError(f"attention names no method; there are {', '.join(METHODS)}")
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(
            f"there is no attention method {shown(name)!r}{hint(str(name), METHODS)}; "
            f"there are {', '.join(METHODS)}"
        )
    known = {it.name: it for it in attention_options(METHODS[name])}
    for key in given:
        if key not in known:
            raise RecipeError(
                f"{name} has no option {key!r}{hint(key, known)}; it has {', '.join(known)}"
            )
    values = {key: checked(known[key], it, f"attention.{key}") for key, it in given.items()}

    def of(model: type[AttentionMethod]) -> dict[str, Any]:
        return {it.name: values[it.name] for it in options_of(model) if it.name in values}

    METHODS[name].check_options(values)
    method = METHODS[name](**of(METHODS[name]))
    for wrapper in WRAPPERS:
        if any(value != _default(wrapper, key) for key, value in of(wrapper).items()):
            wrapper.check(METHODS[name], values)
            method = wrapper(method=method, **of(wrapper))
    return method


def _check_order(method: AttentionMethod | None) -> None:
    """Raise `RecipeError` where wrappers stand in another order than files can say."""
    found: list[str] = []
    while isinstance(method, Wrapper):
        found.append(method.name)
        method = method.method
    known = [wrapper.name for wrapper in reversed(WRAPPERS)]
    if found != [name for name in known if name in found]:
        raise RecipeError(
            f"attention is wrapped in {', then '.join(found)}, from the outside; a recipe can "
            f"have each of {', then '.join(known)} once, in that order"
        )


def _flat(method: AttentionMethod) -> dict[str, Any]:
    """The options of a method and of what wraps it, defaults of wrappers left out."""
    own = {it.name: getattr(method, it.name) for it in options_of(type(method))}
    if not isinstance(method, Wrapper):
        return {"method": method.name, **own}
    changed = {key: value for key, value in own.items() if value != _default(type(method), key)}
    return {**_flat(method.method), **changed}


def _explained(values: dict[str, Any], known: Iterable[Option]) -> list[str]:
    """Lines of TOML, each with what it means; JSON writes these values as TOML does."""
    return [
        f"{it.name} = {json.dumps(values[it.name], ensure_ascii=False)}  "
        f"# {it.help}: {it.allowed()}"
        for it in known
    ]


def _default(model: type[Options], name: str) -> Any:
    return model.model_fields[name].default
