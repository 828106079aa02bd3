"""JSON of files that strangers write: what is nested too deeply is a ValueError, as all other damage is."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64  # a config has four levels; transformers copies it by recursion


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, and for more than MAX_DEPTH levels."""
    deep = ValueError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise deep from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise deep


def _inside(value: Any) -> list[Any]:
    """The lists and mappings right inside a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]
