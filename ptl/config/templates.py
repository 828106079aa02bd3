"""Templates: text with columns of a row in braces, and which of them ptl accepts."""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator

NUMBER = re.compile(r"\d{4}")  # in a format: a width of that many characters is a typing error
COLUMN = re.compile(r"(?!\d+(?:\[|$))[^.\[\]{}]+(?:\[[^\[\]]+\])*")  # a column, and keys or indices into its value


def columns_of(template: str) -> list[str]:
    """The columns that a template names, with keys into them. Raises ValueError for what is no such template."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is no template ({error}); a brace of the text itself is doubled: {{{{ or }}}}") from error
    columns = []
    for _, name, spec, conversion in parts:
        if name is None:  # the text after the last column
            continue
        if not COLUMN.fullmatch(name):
            raise ValueError(
                f"names {{{name}}}, which is no column; write {{column}}, or {{column[key]}} for a part of its value"
            )
        spec = spec or ""
        is_plain = "{" not in spec and not NUMBER.search(spec)
        if not is_plain or conversion not in (None, "r", "s", "a"):
            raise ValueError(f"has no plain format behind {{{name}; write {{{name}}}, or for example {{{name}:.2f}}")
        columns.append(name)
    return columns


def _valid_template(template: str) -> str:
    columns_of(template)
    return template


Template = Annotated[str, AfterValidator(_valid_template)]  # text with {column}s of a row
