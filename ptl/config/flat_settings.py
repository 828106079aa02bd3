"""Nested settings as dotted names."""

from __future__ import annotations

from typing import Any


def flat_settings(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as MLflow shows parameters; what is unset is left out."""
    if isinstance(settings, dict):
        entries: Any = settings.items()
    elif isinstance(settings, list) and any(isinstance(entry, dict) for entry in settings):
        entries = enumerate(settings)
    elif settings is None:
        return {}
    else:
        return {name: settings}
    dotted: dict[str, Any] = {}
    for key, value in entries:
        dotted |= flat_settings(value, f"{name}.{key}" if name else str(key))
    return dotted
