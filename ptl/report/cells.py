"""Numbers and settings as the report prints them."""

from __future__ import annotations

from typing import Any

from ptl.config.flat_settings import flat_settings
from ptl.report.result_rows import Row
from ptl.units import counted

Pairs = list[tuple[str, str]]  # names and printed values

UNITS = {1e9: " B", 1e6: " M", 1e3: " k"}


def first_task(row: Row) -> Row:
    """The score of a row's first benchmark, which is the run's accuracy."""
    return dict(row["scores"]["tasks"][0])


def is_share(task: Row) -> bool:
    """Whether a score is a share of items, shown in percent; perplexities and other means have no interval."""
    if task["low"] is None:
        return False
    return 0 <= task["accuracy"] <= 1


def metric_name(task: Row) -> str:
    """The metric without its filter: `exact_match` of `exact_match,final-number`."""
    return str(task["metric"]).partition(",")[0]


def percent(share: float) -> str:
    """0.981 -> `98.1 %`."""
    return f"{share * 100:.1f} %"


def points(difference: float) -> str:
    """0.081 -> `8.1 points`."""
    return f"{difference * 100:.1f} points"


def level(result: Row) -> str:
    """The confidence level of the intervals: `95 %`."""
    confidence = result["confidence"] * 100
    return f"{confidence:g} %"


def accuracy(task: Row) -> str:
    """A task's score without its interval: percent where it is a share."""
    value = task["accuracy"]
    if is_share(task):
        return percent(value)
    return f"{value:.4g}"


def interval(task: Row) -> str:
    """A task's interval; empty where it has none."""
    low = task["low"]
    high = task["high"]
    if low is None:
        return ""
    # In percent without the sign, which the score beside it has.
    if is_share(task):
        low *= 100
        high *= 100
        return f"{low:.1f} to {high:.1f}"
    return f"{low:.4g} to {high:.4g}"


def score(task: Row) -> str:
    """A task's score with its interval, in percent where it is a share."""
    text = accuracy(task)
    if task["low"] is not None:
        text += f" ({interval(task)})"
    return text


def span(low: int, high: int) -> str:
    """From the lowest to the highest number; one number where they are equal."""
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,}"


def short(number: float) -> str:
    """A count in three or four characters: 950, 82 k, 1.23 M, 7 B."""
    # The largest unit that leaves a digit before the point.
    for size, unit in UNITS.items():
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def comparison(pair: Row) -> str:
    """A paired comparison with its numbers."""
    return f"{signed_points(pair['difference'])} points ({pair_interval(pair)}), {changes(pair)} on {p_of(pair)}"


def pair_interval(pair: Row) -> str:
    """The interval of a paired difference: that of two one-sided tests, each at the significance level."""
    confidence = 100 * (1 - 2 * pair["alpha"])
    return f"{signed_points(pair['low'])} to {signed_points(pair['high'])} at {confidence:.3g} %"


def changes(pair: Row) -> str:
    """The items that changed, which alone distinguish the models."""
    regressions = counted(pair["regressions"], "regression")
    improvements = counted(pair["improvements"], "improvement")
    return f"{regressions} and {improvements}"


def p_of(pair: Row) -> str:
    """p of McNemar's exact two-sided test, and of how many items."""
    return f"{pair['items']:,} items, p {pair['p_different']:.2g}"


def signed_points(difference: float) -> str:
    """-0.016 -> `-1.6`."""
    return f"{100 * difference:+.1f}"


def margin(pair: Row) -> str:
    """The drop that is tolerated: `2 points`."""
    return f"{100 * pair['margin']:g} points"


def settings(config: Row) -> Pairs:
    """A nested config as dotted names and printed values; empty values are left out."""
    pairs = []
    for name, value in flat_settings(config).items():
        text = _printed(value)
        # Empty lists and texts say nothing.
        if text:
            pairs.append((name, text))
    return pairs


def _printed(value: Any) -> str:
    # 0.0003 instead of 0.00030000000000000003.
    if isinstance(value, float):
        return f"{value:.6g}"
    # Lists of numbers or words; lists of sections are flat already.
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
