"""What every part of the config is made of: sections, the numbers and paths in them, and errors that name a field.

Paths in a config are relative to its own file, those in `--set` to the working directory. Pydantic's errors become
lines with the field, its value and a remedy: of an unknown field, which one was meant.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from ptl.address import without_login

_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]{1,2})?)([kMG]?)")
LARGEST = 2**53  # JSON, and so a compiled pipeline, holds larger integers with other digits
# Kinds of schedule.target, which pydantic puts into the location of a field.
NUMBER, MEMORY = TAGS = ("<number>", "<memory>")

# Of paths.
# key of pydantic's context: validation takes relative paths from there, serialization makes such
FOLDER = "folder"
# What is always a file and never the name of something on the hub or of the harness.
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".txt", ".yaml", ".yml")
# what a user must replace in a config of `ptl init`; no file, data set or task has that name
FILL_IN = "FILL-IN"
LONGEST = 4096  # characters of a path

# Of errors.
SHOWN = 200  # characters of a wrong value
MOST = 3  # suggestions
NEAR = 0.62  # similarity of a name that may have been meant
_NUMBER_KINDS = dict.fromkeys(
    ("int_type", "int_parsing", "int_from_float"), "must be a whole number"
)
_NUMBER_KINDS |= dict.fromkeys(("float_type", "float_parsing"), "must be a number")
# Our words for pydantic's kinds of errors; {braces} hold what an error says of its limits.
KINDS = {
    **_NUMBER_KINDS,
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt:.12g}",
    "greater_than_equal": "must be at least {ge:.12g}",
    "less_than": "must be less than {lt:.12g}",
    "less_than_equal": "must be at most {le:.12g}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
    "model_type": "must be a section, a mapping of its fields",
    "dict_type": "must be a mapping of names to values",
    "tuple_type": "must be a list: [...]",
    "too_short": "must have an entry",
    "invalid_key": "must have text as its names",
    "string_unicode": "must be text of valid Unicode",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the regular expression {pattern}",
    "string_type": """must be text: put it in quotes, FIELD: "VALUE" in a file, --set 'FIELD="VALUE"' in a shell""",
}

# pydantic's own PositiveInt has errors that speak of "greater than 0"
Positive = Annotated[int, Field(ge=1)]
FieldPath = tuple[str, ...]  # names from the outermost section inwards


def _count(value: Any) -> Any:
    """`1e6`, `500k` and `2M` as numbers of things; what is none stays as it is, for the field's own error."""
    if isinstance(value, bool):  # for pydantic 1 or 0
        raise ValueError("must be a valid integer, not true or false")
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    # of floats 8.2M would be none
    number = Fraction(match[1]) * 1000 ** " kMG".index(match[2] or " ")
    return int(number) if number.denominator == 1 else value


Count = Annotated[int, Field(ge=0), BeforeValidator(_count)]


def one_error(message: str) -> WrapValidator:
    """For a field with alternatives (`int | Literal["auto"]`): one error, where pydantic has one for each of them."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise ValueError(message) from error

    return WrapValidator(validate)


# What Kubernetes, and so a pipeline's name too, takes as a DNS label.
Label = Annotated[
    Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")],
    one_error(
        "must be text of small letters, digits and hyphens, up to 63, and begin and end with a letter or digit"
    ),
]


class Section(BaseModel):
    """A part of the config: unknown fields are errors, values do not change once read, and each can be passed on."""

    # A string below a field is its description in the schema, unless Field gives one.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_passed_on(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError("must be at most 2^53")
        # Only the text itself is compared: an address without a login comes back as it is.
        if isinstance(value, str) and without_login(value) != value:
            raise ValueError(
                "holds a login, and a config is kept with its run and in MLflow; leave the login out"
            )
        return value


class Typed(str):
    """A text from the command line, where a relative path is meant from the working directory."""


def typed(value: Any) -> Any:
    """A value from the command line, with its texts marked as such."""
    if isinstance(value, dict):
        return {name: typed(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return Typed(value) if isinstance(value, str) else value


def _from_working_directory(value: Any) -> Any:
    return _locate(value, Path.cwd()) if isinstance(value, Typed) and value else value


def _absolute_path(value: str, info: ValidationInfo) -> str:
    """A local path made absolute; names on the hub and addresses of a store stay as they are."""
    # Without a context nothing is located: a step reads what the command has made absolute.
    return _locate(value, info.context[FOLDER]) if info.context else value


def _locate(value: str, folder: Path) -> str:
    if "://" in value:
        return value
    # Functions of os.path, since those of Path raise for an unknown user, or where the whole path is too long.
    path = os.path.join(folder, os.path.expanduser(value))  # noqa: PTH111, PTH118
    # `org/model` may be a folder here and a name on the hub: what exists is the folder.
    looks_local = value.startswith((".", "/", "~")) or value.endswith(SUFFIXES)
    if looks_local or os.path.exists(path):  # noqa: PTH110
        return os.path.normpath(path)
    return value


def _relative(value: str, info: SerializationInfo) -> str:
    """A path below the context's folder as seen from there: a compiled pipeline is the same on every machine."""
    folder = info.context and info.context[FOLDER]
    path = Path(value)
    if folder and path.is_relative_to(folder):
        return str(path.relative_to(folder))
    return value


# A local path, or a name on the hub or of the harness. The order counts: texts of the command line are located first,
# all others by the last validator.
Location = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST, pattern=r"^[^\x00]*$"),
    BeforeValidator(_from_working_directory),
    PlainSerializer(_relative, str),
    AfterValidator(_absolute_path),
]


def error_lines(section: type[Section], error: ValidationError) -> Iterator[str]:
    """A line for each wrong field."""
    for details in error.errors():
        # A list whose entries are wrong counts as empty: that follows from the others.
        if details["type"] == "too_short" and details["input"]:
            continue
        field = ".".join(str(part) for part in details["loc"] if part not in TAGS) or "config"
        yield f"  {field}: {_explanation(section, details)}"


def _explanation(section: type[Section], details: Any) -> str:
    """What is wrong with a field, in words that name a remedy."""
    if details["type"] == "extra_forbidden":
        meant = " or ".join(_suggestions(section, details["loc"]))
        remedy = (
            f"did you mean {meant}?"
            if meant
            else "remove it, or see `ptl validate --schema` for all fields"
        )
        return f"unknown field; {remedy}"
    if details["type"] == "missing":
        return "missing; add it"
    message = details["msg"]
    if details["type"] == "value_error":  # of our own: pydantic's message puts words before it
        message = str(details["ctx"]["error"])
    # Pydantic's words name classes and kinds of Python.
    if words := KINDS.get(details["type"]):
        message = words.format(**details.get("ctx", {}))
    if isinstance(details["input"], dict):  # a whole section says less than the message
        return message
    value = repr(details["input"])
    if len(value) > SHOWN:  # somebody may have pasted a whole file
        value = f"{value[:SHOWN]}... ({len(value):,} characters)"
    return f"{value}: {message}"


def _suggestions(section: type[Section], location: Sequence[str | int]) -> list[str]:
    """Dotted names of fields that were probably meant at the location of an unknown one, the best first."""
    known = field_paths(section)
    *outer, last = map(str, location)
    # Without the indices of lists, and the kinds of targets.
    parents = tuple(part for part in outer if not (part.isdecimal() or part in TAGS))
    # A typing error, or initials such as `lr`, in the same section.
    siblings = [path[-1] for path in known if path[:-1] == parents]
    initials = [name for name in siblings if last == "".join(word[0] for word in name.split("_"))]
    # The right name in the right place, but for another kind of target: no name is meant.
    if (*parents, last) in known:
        return []
    # The right name, but of another section.
    elsewhere = [".".join(path) for path in known if path[-1] == last][:MOST]
    near = [*initials, *difflib.get_close_matches(last, siblings, 1, NEAR)][:1]
    return elsewhere or [".".join([*parents, name]) for name in near]


@cache
def field_paths(section: type[Section]) -> tuple[FieldPath, ...]:
    """All fields, those of lists and alternatives without an index."""
    return tuple(dict.fromkeys(_walk(section, ())))


def _walk(annotation: Any, parents: FieldPath) -> Iterator[FieldPath]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            path = (*parents, name)
            yield path
            yield from _walk(field.annotation, path)
    # `tuple[X, ...]`, `X | None`, Annotated: sections inside of them.
    for argument in get_args(annotation):
        yield from _walk(argument, parents)


def flat_settings(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as MLflow shows parameters; what is unset is left out."""
    if isinstance(settings, dict):
        entries: Any = settings.items()
    elif isinstance(settings, list) and any(isinstance(entry, dict) for entry in settings):
        entries = enumerate(settings)
    elif settings is None:
        return {}
    else:
        return {name: settings}
    dotted: dict[str, Any] = {}
    for key, value in entries:
        dotted |= flat_settings(value, f"{name}.{key}" if name else str(key))
    return dotted
