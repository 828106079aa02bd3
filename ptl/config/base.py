"""The base of every part of the config."""

import re
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from ptl.address import without_login

_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]{1,2})?)([kMG]?)")
LARGEST = 2**53  # JSON, and so a compiled pipeline, holds larger integers with other digits

Positive = Annotated[int, Field(ge=1)]  # pydantic's own PositiveInt has errors that speak of "greater than 0"


def _count(value: Any) -> Any:
    """`1e6`, `500k` and `2M` as numbers of things; what is none stays as it is, for the field's own error."""
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    number = float(match[1]) * 1000 ** " kMG".index(match[2] or " ")
    return int(number) if number.is_integer() else value


Count = Annotated[int, Field(ge=0), BeforeValidator(_count)]


def one_error(message: str) -> WrapValidator:
    """For a field with alternatives (`int | Literal["auto"]`): one error, where pydantic has one for each of them."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise ValueError(message) from error

    return WrapValidator(validate)


class Section(BaseModel):
    """A part of the config: unknown fields are errors, values do not change once read, and each can be passed on."""

    # A string below a field is its description in the schema, unless Field gives one.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_passed_on(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError("must be at most 2^53")
        # Only the text itself is compared: an address without a login comes back as it is.
        if isinstance(value, str) and without_login(value) != value:
            raise ValueError("holds a login, and a config is kept with its run and in MLflow; leave the login out")
        return value
