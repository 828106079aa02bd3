"""Sizes, durations and numbers of things as people read them."""

from __future__ import annotations

from collections.abc import Sequence

MINUTE = 60.0  # seconds
# Kubernetes' suffixes of a quantity.
SUFFIXES = {
    **{unit: 1000**power for power, unit in enumerate(("", "k", "M", "G", "T", "P"))},
    **{f"{unit}i": 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P")) if unit},
    "m": 1e-3,
}


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: 12,345,678 -> `12.3 MB`."""
    value = float(count)
    if value < 999.5:  # more would be printed as 1000
        return f"{value:.0f} B"
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def billions(params: int) -> str:
    """8,190,735,360 -> `8.19B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if params >= 0.9995 * size:  # less has three digits in the unit below
            return f"{params / size:.3g}{unit}"
    return str(params)


def memory_beside(count: int, goal: str) -> str:
    """Bytes in the unit of a goal as written: 409,200 beside `400KiB` -> `399.6 KiB`; very little as by `size`."""
    unit = goal.lstrip("0123456789. ").removesuffix("B")
    value = count / SUFFIXES[unit]
    if value < 0.05:
        return size(count)
    return f"{value:.1f} {unit}B" if value >= 1 else f"{value:.2g} {unit}B"


def quantity(text: str) -> float:
    """Kubernetes' quantities as numbers: `64Gi` -> 64 x 2^30."""
    suffix = text.lstrip("0123456789.")
    return float(text.removesuffix(suffix)) * SUFFIXES[suffix]


def duration(seconds: float) -> str:
    """4.2 -> `4.2 s`, 230 -> `3 min 50 s`, 26,000 -> `7 h 13 min`."""
    if round(seconds, 1) < MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    # Beside hours nobody needs seconds.
    parts = {"h": hours, "min": minutes, "s": 0 if hours else rest}
    return " ".join(f"{number} {unit}" for unit, number in parts.items() if number)


def decimal_hours(value: float) -> str:
    """Hours with at least two digits that count: 12.34, 0.042, 2.1e-05."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def listed(names: Sequence[str]) -> str:
    """`a`; `a and b`; `a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """`iteration`, [4] -> `iteration 4`; [3, 4] -> `iterations 3 and 4`."""
    plural = "" if len(numbers) == 1 else "s"
    return f"{noun}{plural} {listed([str(number) for number in numbers])}"


def counted(number: int, noun: str) -> str:
    """1, `item` -> `1 item`; 1200 -> `1,200 items`."""
    plural = "" if number == 1 else "s"
    return f"{number:,} {noun}{plural}"
