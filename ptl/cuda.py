"""Which GPUs CUDA shows a process, by CUDA_VISIBLE_DEVICES; without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

VISIBLE = "CUDA_VISIBLE_DEVICES"


def listed(environment: Mapping[str, str]) -> list[str] | None:
    """The GPUs that the variable lists, by number or UUID; None where it is not set, and all GPUs are visible.

    CUDA reads up to the first entry that names none: neither an empty variable nor -1 shows any.
    """
    value = environment.get(VISIBLE)
    if value is None:
        return None
    entries = (entry.strip() for entry in value.split(","))
    return list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))
