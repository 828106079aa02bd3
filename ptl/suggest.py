"""Which field was meant: the names of a config's fields that are near to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from ptl.section import Section

MOST = 3  # suggestions
METHODS = {"cpt", "distil", "grpo"}  # which pydantic puts into the location of a stage's field


def fields(section: type[Section], location: Sequence[str | int]) -> list[str]:
    """Dotted names of fields that were probably meant at the location of an unknown one, the best first."""
    known = field_names(section)
    names = [part for part in location if isinstance(part, str) and part not in METHODS]
    parent, dot, last = ".".join(names).rpartition(".")

    # A typing error: a similar name in the same section.
    siblings = [name for name_parent, name in map(_split, known) if name_parent == parent]
    similar = difflib.get_close_matches(last, siblings, 1, cutoff=0.7)
    if similar:
        return [f"{parent}{dot}{similar[0]}"]

    # The right name, but of another section.
    return [name for name in known if _split(name)[1] == last][:MOST]


def _split(name: str) -> tuple[str, str]:
    """`prune.target` -> (`prune`, `target`)."""
    parent, _, last = name.rpartition(".")
    return parent, last


@cache
def field_names(section: type[Section]) -> tuple[str, ...]:
    """Dotted names of all fields, those of lists and alternatives without an index."""
    return tuple(dict.fromkeys(_walk(section, "")))


def _walk(annotation: Any, prefix: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            yield f"{prefix}{name}"
            yield from _walk(field.annotation, f"{prefix}{name}.")
    # `tuple[X, ...]`, `X | None`, Annotated: sections inside of them.
    for argument in get_args(annotation):
        yield from _walk(argument, prefix)
