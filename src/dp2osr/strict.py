"""The base of all settings: what is unknown or wrong stops with one line that names the key."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dp2osr.errors import UserError

T = TypeVar("T", bound="Strict")
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            lines.append(f"config: {where}: unknown key")
        elif item["type"] == "missing":
            lines.append(f"config: {where}: missing")
        else:
            lines.append(f"config: {where}: {item['msg']}, found {item['input']!r}")
    return "; ".join(lines)


def parse(model: type[T], data: Mapping[str, Any]) -> T:
    """Validate `data` as `model`; raises UserError with the key, the value found and the value wanted."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
