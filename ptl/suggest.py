"""Which field was meant: the names of a config's fields that are near to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from ptl.section import Section

MOST = 3  # suggestions


def fields(section: type[Section], location: Sequence[str | int]) -> list[str]:
    """Dotted names of fields that were probably meant at the location of an unknown one, the best first."""
    known = _names(section)
    methods = {"cpt", "distil", "grpo"}  # which pydantic puts into the location of a field of a stage
    given = ".".join(part for part in location if isinstance(part, str) and part not in methods)
    parent, dot, last = given.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    near = [f"{parent}{dot}{name}" for name in difflib.get_close_matches(last, siblings, 1, cutoff=0.7)]
    same = [name for name in known if name.rpartition(".")[2] == last]  # right, but of another section
    return near or same[:MOST]


@cache
def _names(section: type[Section]) -> tuple[str, ...]:
    """Dotted names of all fields, those of lists and alternatives without an index."""
    return tuple(dict.fromkeys(_walk(section, "")))


def _walk(annotation: Any, prefix: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            yield f"{prefix}{name}"
            yield from _walk(field.annotation, f"{prefix}{name}.")
    for argument in get_args(annotation):
        yield from _walk(argument, prefix)
