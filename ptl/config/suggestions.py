"""Which field was meant: the names of a config's fields that are near to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from ptl.config.base import Section
from ptl.config.goal import TAGS

MOST = 3  # suggestions
KINDS = {"cpt", "distil", "grpo", *TAGS}  # of stages and targets, which pydantic puts into the location of a field

Path = tuple[str, ...]  # of a field: names from the outermost section inwards


def fields(section: type[Section], location: Sequence[str | int]) -> list[str]:
    """Dotted names of fields that were probably meant at the location of an unknown one, the best first."""
    known = field_paths(section)
    *outer, last = location
    # Without the indices of lists.
    parents = tuple(part for part in outer if isinstance(part, str) and part not in KINDS)

    # The right name in the right place, but for another method or kind of target: no name is meant.
    if (*parents, last) in known:
        return []

    # A typing error: a similar name in the same section.
    siblings = [path[-1] for path in known if path[:-1] == parents]
    for similar in difflib.get_close_matches(str(last), siblings, 1, cutoff=0.7):
        return [".".join([*parents, similar])]

    # The right name, but of another section.
    namesakes = [".".join(path) for path in known if path[-1] == last]
    return namesakes[:MOST]


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
