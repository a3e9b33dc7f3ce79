"""Options: one definition each; files, the command line, the page and the docs follow from it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from .errors import RecipeError, hint

LONGEST_TEXT = 20_000
"""Characters of an option or a prompt: text encoders read some hundred words, and what `mag-cache`
is told of 1,000 steps takes 8,000."""


class Options(BaseModel):
    """A frozen set of options; fields are made by `option`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    unit: str = "",
    path: bool = False,
) -> Any:
    """A field with its range (`least` or, exclusive, `above`, and `most`), unit and help.

    `path`: it names a file that a run reads.
    """
    extra: Any = {"unit": unit, "path": path}
    return Field(default, ge=least, gt=above, le=most, description=help, json_schema_extra=extra)


@dataclass(frozen=True, slots=True)
class Option:
    """What a front end must know to offer an option."""

    name: str
    kind: type
    """bool, int, float or str."""
    default: Any
    help: str
    unit: str
    least: float | None
    above: bool
    """Whether `least` itself is excluded."""
    most: float | None
    choices: tuple[str, ...]
    path: bool = False
    """Whether it names a file that a run reads."""

    def allowed(self) -> str:
        """The values that it takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "true or false"
        words = {int: "a whole number", float: "a number", str: "text"}[self.kind]
        if self.least is not None:
            words += f" {'above' if self.above else 'from'} {self.least:g}"
        if self.most is not None:
            words += f" to {self.most:g}"
        return f"{words} ({self.unit})" if self.unit else words


def options_of(model: type[BaseModel]) -> tuple[Option, ...]:
    """The options of `model`, its own before inherited ones; fields that are no option are not."""
    found: list[Option] = []
    own = inspect.get_annotations(model)
    fields = sorted(model.model_fields.items(), key=lambda it: it[0] not in own)
    for name, field in fields:
        if not isinstance(field.json_schema_extra, dict):
            continue
        limits = {type(it).__name__: it for it in field.metadata}
        least, above = limits.get("Ge"), limits.get("Gt")
        most = limits.get("Le")
        annotation: Any = field.annotation
        literal = get_origin(annotation) is Literal
        found.append(
            Option(
                name=name,
                kind=str if literal else annotation,
                default=None if field.is_required() else field.default,
                help=field.description or "",
                unit=str(field.json_schema_extra.get("unit", "")),
                least=least.ge if least else above.gt if above else None,
                above=above is not None,
                most=most.le if most else None,
                choices=get_args(annotation) if literal else (),
                path=bool(field.json_schema_extra.get("path")),
            )
        )
    return tuple(found)


def checked(option: Option, value: Any, path: str) -> Any:
    """`value`, perhaps given as text, as what the option takes.

    Raises:
        RecipeError: it does not; `path` says where.
    """
    refusal = RecipeError(f"{path} must be {option.allowed()}, not {shown(value)}")
    if option.choices:
        if str(value) not in option.choices:
            near = hint(str(value), option.choices)
            raise RecipeError(f"{path} must be {option.allowed()}, not {shown(value)}{near}")
        return str(value)
    if option.kind is str:
        if not isinstance(value, str):
            raise refusal
        if len(value) > LONGEST_TEXT:
            raise RecipeError(
                f"{path} has {len(value):,} characters: {LONGEST_TEXT:,} are the most"
            )
        if wrong := no_utf8(value):
            raise RecipeError(f"{path} is {wrong}")
        return value
    if option.kind is bool:
        told = str(value).lower()
        if told not in ("true", "false"):
            raise refusal
        return told == "true"
    if isinstance(value, bool):
        raise refusal
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise refusal from None
    if option.kind is int:
        if number != number or number in (float("inf"), float("-inf")) or number != int(number):
            raise refusal
        number = int(number)
    low = option.least is not None and (
        not number > option.least if option.above else not number >= option.least
    )
    if low or (option.most is not None and not number <= option.most):
        raise refusal
    return number


def no_utf8(text: str) -> str | None:
    """What is wrong with a text that cannot be written as UTF-8: lone surrogates are in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.end])
        return f"no UTF-8 text, near {near}"
    return None


def shown(value: Any) -> str:
    """A value that was given, at a length that fits a message."""
    told = value if isinstance(value, str) and value else repr(value)
    told = told if len(told) <= 60 else f"{told[:60]}…"
    return told.encode("utf-8", "backslashreplace").decode()  # it may be no UTF-8
