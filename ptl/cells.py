"""Numbers as the report prints them."""

from __future__ import annotations

from typing import Any

Task = dict[str, Any]  # score of a benchmark, as in a row's `scores`


def is_share(task: Task) -> bool:
    """Whether a score is a share of items, shown in percent; perplexities and other means have no interval."""
    return task.get("low") is not None and 0 <= task["accuracy"] <= 1


def first_task(row: dict[str, Any]) -> Task:
    """The score of a row's first benchmark, which is the run's accuracy."""
    return dict(row["scores"]["tasks"][0])


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
    return percent(task["accuracy"]) if is_share(task) else f"{task['accuracy']:.4g}"


def interval(task: Task) -> str:
    """A task's interval; empty where it has none."""
    low, high = task["low"], task["high"]
    if low is None:
        return ""
    if is_share(task):
        return f"{low * 100:.1f} to {high * 100:.1f}"
    return f"{low:.4g} to {high:.4g}"


def score(task: Task) -> str:
    """A task's score with its interval, in percent where it is a share."""
    if task["low"] is None:
        return accuracy(task)
    return f"{accuracy(task)} ({interval(task)})"


def short(number: float) -> str:
    """A count in three or four characters: 950, 82 k, 1.23 M, 7 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def comparison(pair: dict[str, Any]) -> str:
    """A paired comparison with its numbers; p is McNemar's exact two-sided test."""
    change, low, high = (f"{100 * pair[key]:+.1f}" for key in ("difference", "low", "high"))
    confidence = 100 * (1 - 2 * pair["alpha"])
    return (
        f"{change} points ({low} to {high} at {confidence:g} %), "
        f"{pair['regressions']} regressions and {pair['improvements']} improvements on {pair['items']:,} items, "
        f"p {pair['p_different']:.2g}"
    )


def dotted(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested config as dotted names and printed values; empty values are left out."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(entry, dict) for entry in value):
        inner = list(enumerate(value))
    if inner:
        pairs = []
        for key, entry in inner:
            name = f"{prefix}.{key}" if prefix else str(key)
            pairs += dotted(entry, name)
        return pairs
    # A value of its own.
    if value in (None, "", [], {}):
        return []
    if isinstance(value, float):
        return [(prefix, f"{value:.6g}")]
    if isinstance(value, (list, tuple)):
        return [(prefix, ", ".join(map(str, value)))]
    return [(prefix, str(value))]
