"""Recipes: which accelerations to run and how, as a value, a TOML file and single settings.

In a file, the options of what wraps a method (`wrappers`) stand beside its own:

    title = "…"
    [attention]
    method = "top-blocks"
    keep = 0.25
    from_step = 0.2
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import SerializeAsAny

from ..kernels.dense import DenseKernel
from .errors import RecipeError, hint, nearest
from .method import AttentionMethod
from .options import Options, checked, option, options_of
from .parallel import Parallel
from .parts import PARTS, Settings, default, explained
from .presets import DENSE, FOLDER, names
from .steps import StepPolicy


class Recipe(Options):
    """A composition of accelerations; None is a part that is left as it is."""

    name: str = ""
    title: str = option("", "What it is for, in one line")
    when: Literal["faster", "always"] = option(
        "faster", "Whether a part runs only where it is predicted to be faster, or always"
    )
    dense_kernel: Literal["stock", "fastest", DenseKernel] = option(
        "stock",
        "Kernel of self-attention that is not sparse: as the pipeline has it, the fastest exact "
        "one here, or one of torch's (sdpa lets torch choose) or of another library that is "
        "installed; sage loses precision",
    )
    attention: SerializeAsAny[AttentionMethod] | None = None
    steps: SerializeAsAny[StepPolicy] | None = None
    parallel: Parallel | None = None

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        return not self.attends and self.steps is None and self.parallel is None

    @property
    def attends(self) -> bool:
        """Whether it changes how attention is computed."""
        return self.attention is not None or self.dense_kernel != "stock"

    @property
    def only_kernel(self) -> bool:
        """Whether all it changes is the kernel of dense attention."""
        return self.attends and self.attention is None and self.steps is None

    def table(self) -> dict[str, Any]:
        """As a TOML file says it; `from_table` reads it again.

        Raises:
            RecipeError: the attention is wrapped in a way that no file could say.
        """
        own = self._own()
        found: dict[str, Any] = {key: own[key] for key in own if own[key] != default(Recipe, key)}
        for key, part in PARTS.items():
            value = getattr(self, key)
            if value is not None:
                found[key] = part.table(value)
        return found

    def to_toml(self) -> str:
        """As a TOML file with every option's help and range; `find` reads it again."""
        lines = explained(self._own(), options_of(Recipe))
        for key, part in PARTS.items():
            value = getattr(self, key)
            if value is not None:
                lines += ["", *part.explained(value)]
        return "\n".join(lines) + "\n"

    def _own(self) -> dict[str, Any]:
        """What belongs to no part."""
        return {it.name: getattr(self, it.name) for it in options_of(Recipe)}

    def paths(self) -> dict[str, str]:
        """The files that it names, by what `--set` calls the option."""
        table = self.table()
        return {
            f"{part.key}.{it.name}": table[part.key][it.name]
            for part in PARTS.values()
            if part.key in table and not isinstance(part, Settings)
            for it in part.options(part.known[table[part.key][part.selector]])
            if it.path and table[part.key].get(it.name)
        }

    def words(self) -> str:
        """What it asks for, in words."""
        told: list[str] = []
        if self.attends:
            told.append(f"attention by {self.attention_words()}")
        if self.steps is not None:
            told.append(f"steps by {self.steps.words()}")
        if self.parallel is not None:
            told.append(f"on {self.parallel.words()}")
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
        if key in PARTS:
            part, given = PARTS[key], value if isinstance(value, Mapping) else {}
            if strays := sorted((own.keys() & given.keys()) - part.names()):
                raise RecipeError(
                    f"{strays[0]} is no option of {key} but of the whole recipe: write --set "
                    f"{strays[0]}=VALUE, or in a file above [{key}]"
                )
            fields[key] = part.read(value)
        elif key in own:
            fields[key] = checked(own[key], value, key)
        else:
            known = [*PARTS, *own]
            raise RecipeError(
                f"a recipe has no {key!r}{_near(key, known)}; it has {', '.join(known)}"
            )
    return Recipe(**fields)


def _near(key: str, known: list[str]) -> str:
    """` (did you mean …?)`, also for those who forget under which part an option stands."""
    under = sorted({it for part in PARTS.values() for it in part.names()})
    for name in nearest(key, [*known, *under], 1):
        parts = [f"{part.key}.{name}" for part in PARTS.values() if name in part.names()]
        return f" (did you mean {name if name in known else ' or '.join(parts)}?)"
    return ""


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

    A new `attention.method` begins with the defaults of that method. A title says what the recipe
    is for as it stands, so one that is changed has none but a new one.

    Raises:
        RecipeError: see `from_table`; or a setting without `=`.
    """
    table, name, titled = recipe.table(), recipe.name, False
    refusal: RecipeError | None = None
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"{setting!r} sets nothing: write PART.OPTION=VALUE, such as "
                              f"attention.keep=0.3")  # fmt: skip
        where, _, key = path.strip().rpartition(".")
        part = PARTS.get(where)
        if not where:
            if any(key in it.names() for it in PARTS.values()):
                raise RecipeError(f"a recipe has no {key!r}{_near(key, [])}")
            table[key] = text.strip()
            titled |= key == "title"
        elif part is None:
            raise RecipeError(
                f"a recipe has no part {where!r}{hint(where, PARTS)}; it has {', '.join(PARTS)}"
            )
        elif isinstance(part, Settings):
            table.setdefault(where, {})[key] = text.strip()
        elif key == part.selector:
            table[where] = {key: text.strip()}
        elif where not in table:
            raise RecipeError(
                f"{setting}: the recipe {name or DENSE} {part.without}; choose another "
                f"--recipe or set {where}.{part.selector} first ({', '.join(part.known)})"
            )
        else:
            table[where][key] = text.strip()
        # One at a time, so that an error names its setting; a later one may still put it right.
        try:
            table = from_table(table, name).table()
        except RecipeError as error:
            refusal = refusal or error
    if not titled and table != recipe.table():
        table.pop("title", None)
    try:
        return from_table(table, name)
    except RecipeError as error:
        raise refusal or error from None
