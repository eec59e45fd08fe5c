"""The base class of all sections of a configuration, and helpers that check and explain them."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from atr_scale.errors import UserError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of a configuration: unknown keys are refused, and defaults are checked like given values.

    Every field has a description, from which docs/config.md is written. null for a section, a mapping or a list stands
    for its default, unless the field itself takes null.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def part(cls, key: str, values: Any) -> Any:
        """The type that checks the value of `key` in `values`; None if there is no such key.

        A section overrides this if one key decides over the type of another, as a scorer's name does over its options.
        """
        field = cls.model_fields.get(key)
        return field.annotation if field else None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or not cls._is_container(key)}

    @classmethod
    def _is_container(cls, key: str) -> bool:
        kind = cls.model_fields[key].annotation if key in cls.model_fields else None
        return typing.get_origin(kind) in (dict, list, tuple) or _is_section(kind)


AnySection = TypeVar("AnySection", bound=Section)


def options_of(entry: Any, default: type[AnySection]) -> type[AnySection]:
    """The attribute `Options` of an entry of SCORERS, AUDIO_ENCODERS or the like; `default` if it has none."""
    return getattr(class_of(entry), "Options", default)


def class_of(entry: Any) -> Any:
    """The class behind an entry of SCORERS, AUDIO_ENCODERS or the like, which may be a functools.partial of one."""
    while isinstance(entry, partial):
        entry = entry.func
    return entry


def own_fields(options: Section, common: type[Section]) -> dict[str, Any]:
    """The fields of `options` that `common` does not have, by name."""
    return {name: value for name, value in options if name not in common.model_fields}


def check_options(kind: type[AnySection], values: dict[str, Any], place: str) -> AnySection:
    """Checks `values` as options of `kind`.

    Raises UserError that names `place` and every unknown option and wrong value.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(f"options of {place}: {explain(error, kind, values)}") from None


def explain(error: ValidationError, kind: type[Section], values: Any) -> str:
    """One line with a clause for each mistake in `values`, which failed the check as a section of `kind`."""
    return "; ".join(_clause(details, kind, values) for details in error.errors())


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dicts, and in lists of them, such as a configuration."""
    if isinstance(values, dict) and values:
        for key, inner in values.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and any(isinstance(item, dict | list) for item in values):
        for index, inner in enumerate(values):
            yield from flat(inner, f"{prefix}.{index}")
    else:
        yield prefix, values


def _clause(error: Any, kind: type[Section], values: Any) -> str:
    keys = [str(part) for part in error["loc"]]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1], kind, values)
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known) or 'none'}"
        return f"unknown key {name!r}; {hint}"
    if error["type"] == "missing":
        return f"{name!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{name!r}: {message}{value}" if name else f"{message}{value}"


def _known_keys(path: list[str], section: Any, values: Any) -> list[str]:
    """Field names of the section at `path`; a place in a list of sections counts as the section."""
    for key in path:
        if isinstance(values, list) and key.isdigit():
            values = values[int(key)]
        elif isinstance(values, dict) and key in values and _is_section(section):
            section, values = _section_type(section.part(key, values)), values[key]
    return [field.alias or name for name, field in section.model_fields.items()] if _is_section(section) else []


def _section_type(annotation: Any) -> Any:
    """The section in an annotation such as `list[S]` or `S | None`."""
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return next((_section_type(a) for a in typing.get_args(annotation) if a is not type(None)), None)
    return annotation


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
