"""JSON of files that strangers write: what is nested too deeply is a ValueError, as all other damage is."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64  # a config has four levels; transformers copies it by recursion


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, and for more than MAX_DEPTH levels."""
    too_deep = ValueError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise too_deep from error
    # Level by level, not by recursion, which is what deep nesting would exhaust
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            inner += container.values() if isinstance(container, dict) else container
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return value
    raise too_deep
