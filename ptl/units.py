"""Sizes and durations as people read them."""

from __future__ import annotations

MINUTE = 60.0  # seconds


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: 12,345,678 -> `12.3 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:  # which would be printed as 1000
            break
        value /= 1000
        unit = larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """4.2 -> `4.2 s`, 230 -> `3 min 50 s`, 26,000 -> `7 h 13 min`."""
    if round(seconds, 1) < MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    # Beside hours nobody needs seconds.
    parts = ((hours, "h"), (minutes, "min"), (0 if hours else rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
