"""JSON of files that strangers write: what is nested too deeply is a ValueError, as all other damage is."""

from __future__ import annotations

import contextlib
import json
from typing import Any

MAX_DEPTH = 64  # a config has four levels; transformers copies it by recursion


def loads(text: str | bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, and for more than MAX_DEPTH levels."""
    with contextlib.suppress(RecursionError):
        value = json.loads(text)
        if _depth(value) <= MAX_DEPTH:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _depth(value: Any) -> int:
    """Levels of objects and lists."""
    if not isinstance(value, dict | list):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, items), default=0)
