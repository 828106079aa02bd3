"""Which field was meant: the names of a config's fields that are near to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from ptl.config.base import Section
from ptl.config.goal import TAGS
from ptl.config.recover import RecoverStage

MOST = 3  # suggestions
NEAR, NEAR_OF_METHOD = 0.7, 0.6  # similarity of a name that may have been meant; methods name one thing differently
STAGES, _ = get_args(RecoverStage)  # Annotated: the alternatives, and how pydantic chooses among them
METHODS: dict[str, type[Section]] = {tag.tag: stage for stage, tag in map(get_args, get_args(STAGES))}
KINDS = {*METHODS, *TAGS}  # of stages and targets, which pydantic puts into the location of a field

Path = tuple[str, ...]  # of a field: names from the outermost section inwards


def fields(section: type[Section], location: Sequence[str | int]) -> list[str]:
    """Dotted names of fields that were probably meant at the location of an unknown one, the best first."""
    known = field_paths(section)
    *outer, last = location
    # Without the indices of lists.
    parents = tuple(part for part in outer if isinstance(part, str) and part not in KINDS)

    # A typing error: a similar name in the same section; of a stage, among its method's own fields.
    method = METHODS.get(str(outer[-1])) if outer else None
    siblings = list(method.model_fields) if method else [path[-1] for path in known if path[:-1] == parents]
    siblings = [name for name in siblings if name != last]
    similar = difflib.get_close_matches(str(last), siblings, 1, cutoff=NEAR_OF_METHOD if method else NEAR)
    # `lr` and the like are initials.
    initials = [name for name in siblings if last == "".join(word[0] for word in name.split("_"))]
    for name in [*initials, *similar][:1]:
        return [".".join([*parents, name])]

    # The right name in the right place, but for another method or kind of target: no name is meant.
    if (*parents, last) in known:
        return []

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
