"""Numbers and settings as the report prints them."""

from __future__ import annotations

from typing import Any

from ptl.flat_settings import flat_settings

Task = dict[str, Any]  # score of a benchmark, as in a row's `scores`
UNITS = ((1e9, " B"), (1e6, " M"), (1e3, " k"))


def first_task(row: dict[str, Any]) -> Task:
    """The score of a row's first benchmark, which is the run's accuracy."""
    return dict(row["scores"]["tasks"][0])


def is_share(task: Task) -> bool:
    """Whether a score is a share of items, shown in percent; perplexities and other means have no interval."""
    if task["low"] is None:
        return False
    return 0 <= task["accuracy"] <= 1


def percent(share: float, digits: int = 1) -> str:
    """0.981 -> `98.1 %`."""
    return f"{share * 100:.{digits}f} %"


def points(difference: float) -> str:
    """0.081 -> `8.1 points`."""
    return f"{difference * 100:.1f} points"


def level(result: dict[str, Any]) -> str:
    """The confidence level of the intervals: `95 %`."""
    return f"{result['confidence'] * 100:g} %"


def accuracy(task: Task) -> str:
    """A task's score without its interval: percent where it is a share."""
    if is_share(task):
        return percent(task["accuracy"])
    return f"{task['accuracy']:.4g}"


def interval(task: Task) -> str:
    """A task's interval; empty where it has none."""
    low, high = task["low"], task["high"]
    if low is None:
        return ""
    # Percent without the sign, which the score beside it has.
    if is_share(task):
        return f"{low * 100:.1f} to {high * 100:.1f}"
    return f"{low:.4g} to {high:.4g}"


def score(task: Task) -> str:
    """A task's score with its interval, in percent where it is a share."""
    bounds = interval(task)
    return f"{accuracy(task)} ({bounds})" if bounds else accuracy(task)


def span(low: int, high: int) -> str:
    """From the lowest to the highest number; one number where they are equal."""
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,}"


def short(number: float) -> str:
    """A count in three or four characters: 950, 82 k, 1.23 M, 7 B."""
    for size, unit in UNITS:
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def comparison(pair: dict[str, Any]) -> str:
    """A paired comparison with its numbers; p is McNemar's exact two-sided test."""
    # In points. The interval belongs to two one-sided tests.
    change = f"{100 * pair['difference']:+.1f}"
    low = f"{100 * pair['low']:+.1f}"
    high = f"{100 * pair['high']:+.1f}"
    confidence = 100 * (1 - 2 * pair["alpha"])
    changed = f"{pair['regressions']} regressions and {pair['improvements']} improvements"
    return (
        f"{change} points ({low} to {high} at {confidence:g} %), "
        f"{changed} on {pair['items']:,} items, "
        f"p {pair['p_different']:.2g}"
    )


def settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A nested config as dotted names and printed values; empty values are left out."""
    flat = flat_settings(config)
    return [(name, _printed(value)) for name, value in flat.items() if value not in ("", [])]


def _printed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
