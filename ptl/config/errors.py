"""Pydantic's errors as lines that name the field, its value and a remedy: of an unknown field, which one was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import ValidationError

from ptl.config.base import Section
from ptl.config.goal import TAGS

SHOWN = 200  # characters of a wrong value
MOST = 3  # suggestions
NEAR = 0.62  # similarity of a name that may have been meant
KINDS = {
    "model_type": "must be a section, a mapping of its fields",
    "tuple_type": "must be a list: [...]",
    "string_type": """must be text: put it in quotes, FIELD: "VALUE" in a file, --set 'FIELD="VALUE"' in a shell""",
}

Path = tuple[str, ...]  # of a field: names from the outermost section inwards


def lines(section: type[Section], error: ValidationError) -> Iterator[str]:
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
        meant = " or ".join(suggestions(section, details["loc"]))
        remedy = f"did you mean {meant}?" if meant else "remove it, or see `ptl validate --schema` for all fields"
        return f"unknown field; {remedy}"
    if details["type"] == "missing":
        return "missing; add it"
    message = details["msg"]
    if details["type"] == "value_error":  # of our own: pydantic's message puts words before it
        message = str(details["ctx"]["error"])
    # Pydantic's words name classes and kinds of Python.
    message = KINDS.get(details["type"], message)
    if isinstance(details["input"], dict):  # a whole section says less than the message
        return message
    value = repr(details["input"])
    if len(value) > SHOWN:  # somebody may have pasted a whole file
        value = f"{value[:SHOWN]}... ({len(value):,} characters)"
    return f"{value}: {message}"


def suggestions(section: type[Section], location: Sequence[str | int]) -> list[str]:
    """Dotted names of fields that were probably meant at the location of an unknown one, the best first."""
    known = field_paths(section)
    *outer, last = map(str, location)
    # Without the indices of lists, and the kinds of targets.
    parents = tuple(part for part in outer if not (part.isdecimal() or part in TAGS))
    # A typing error, or initials such as `lr`, in the same section.
    siblings = [path[-1] for path in known if path[:-1] == parents]
    initials = [name for name in siblings if last == "".join(word[0] for word in name.split("_"))]
    for name in [*initials, *difflib.get_close_matches(last, siblings, 1, NEAR)][:1]:
        return [".".join([*parents, name])]
    # The right name in the right place, but for another kind of target: no name is meant.
    if (*parents, last) in known:
        return []
    # The right name, but of another section.
    return [".".join(path) for path in known if path[-1] == last][:MOST]


@cache
def field_paths(section: type[Section]) -> tuple[Path, ...]:
    """All fields, those of lists and alternatives without an index."""
    return tuple(dict.fromkeys(_walk(section, ())))


def _walk(annotation: Any, parents: Path) -> Iterator[Path]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            path = (*parents, name)
            yield path
            yield from _walk(field.annotation, path)
    # `tuple[X, ...]`, `X | None`, Annotated: sections inside of them.
    for argument in get_args(annotation):
        yield from _walk(argument, parents)
