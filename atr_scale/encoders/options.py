"""Keyword arguments of the builders, checked as a run's configuration is."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from atr_scale.config import Section
from atr_scale.errors import UserError

Options = TypeVar("Options", bound=Section)


def check_options(kind: type[Options], values: dict[str, Any], place: str) -> Options:
    """`values` as options of `kind`. Raises UserError naming every unknown option and wrong value, and `place`."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"options of {place}: {problems}") from None
