"""The base class of all sections of a configuration, and helpers that check and explain them."""

from __future__ import annotations

import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from atr_scale.errors import UserError
from atr_scale.suggestions import closest


def expanded(path: str) -> str:
    """A path or s3:// prefix with its `~` and `$VARIABLE` replaced. Raises ValueError if a variable is not set."""
    found = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", found):
        raise ValueError(f"the variable {unset[0]} is not set: export it, or write the path out")
    return found


Location = Annotated[str, AfterValidator(expanded)]  # path, s3:// prefix, or the name of something on a hub
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
        """The type that checks the value of `key` in `values`, which need not have it; None if there is no such key.

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

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_booleans(cls, values: Any) -> Any:
        """`yes`, `on` and `true` are booleans of YAML, which Python takes for the number 1."""
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if field is not None and _is_number(field.annotation) and _has_boolean(value):
                raise ValueError(f"{key} is a number, but {str(value).lower()} is given: write the number")
        return values

    @classmethod
    def _is_container(cls, key: str) -> bool:
        kind = cls.model_fields[key].annotation if key in cls.model_fields else None
        return typing.get_origin(kind) in (dict, list, tuple) or _is_section(kind)


def _is_number(annotation: Any) -> bool:
    """Whether a value, or the items of a list, are numbers and no booleans."""
    parts = typing.get_args(annotation)
    return annotation in (int, float) or (bool not in parts and any(map(_is_number, parts)))


def _has_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_boolean, value)))


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
    name = dotted(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {name!r}; {_hint(error['loc'], error['input'], kind, values)}"
    if error["type"] == "missing":
        return f"{name!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"{name!r}: {message}{value}" if name else f"{message}{value}"


def dotted(keys: Iterable[str | int]) -> str:
    """Keys and places in lists as an override writes them: `data.train[0].shards`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _hint(keys: tuple[str | int, ...], value: Any, kind: type[Section], values: Any) -> str:
    """What may have been meant by the unknown key at `keys` with this value."""
    *place, key = keys
    known = _known_keys(place, kind, values)
    own = [dotted([*place, name]) for name in known]
    everywhere = list(all_keys(kind, values, ""))
    meant = closest(str(key), own, everywhere)
    if meant is None and isinstance(value, dict):  # a section that does not exist, with keys that may
        meant = next(filter(None, (closest(str(inner), [], everywhere) for inner in value)), None)
    return f"did you mean {meant!r}?" if meant else f"known keys: {', '.join(known) or 'none'}"


def _known_keys(path: Iterable[str | int], section: Any, values: Any) -> list[str]:
    """Field names of the section at `path`; a place in a list of sections counts as the section."""
    for key in path:
        if isinstance(values, list) and isinstance(key, int):
            values = values[key]
        elif isinstance(values, dict) and key in values and _is_section(section):
            section, values = _section_type(section.part(key, values)), values[key]
    return _keys_of(section) if _is_section(section) else []


def all_keys(section: type[Section], values: Any, prefix: str) -> Iterator[str]:
    """The dotted keys of a section and of all sections in it, for these values; those of a list by its first item."""
    for key in _keys_of(section):
        yield f"{prefix}{key}"
        below = values.get(key) if isinstance(values, dict) else None
        annotation = section.part(key, values)
        inner = _section_type(annotation)
        if _is_section(inner):
            items = typing.get_origin(annotation) is list
            below = below[0] if items and isinstance(below, list) and below else below
            yield from all_keys(inner, below, f"{prefix}{key}{'[0]' if items else ''}.")


def _keys_of(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_type(annotation: Any) -> Any:
    """The section in an annotation such as `list[S]` or `S | None`."""
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return next((_section_type(a) for a in typing.get_args(annotation) if a is not type(None)), None)
    return annotation


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
