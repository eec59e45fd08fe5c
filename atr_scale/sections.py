"""What every section of a configuration is made of, wherever it is defined."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atr_scale.errors import UserError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)


Options = TypeVar("Options", bound=Section)


def check_options(kind: type[Options], values: dict[str, Any], place: str) -> Options:
    """`values` as options of `kind`. Raises UserError naming every unknown option and wrong value, and `place`."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"options of {place}: {problems}") from None
