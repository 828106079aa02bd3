"""Numbers as the report prints them."""

from __future__ import annotations

from ptl.evaluation.scoring import TaskScore


def is_share(task: TaskScore) -> bool:
    """Whether a score is a share of items, shown in percent; perplexities and other means have no interval."""
    return task.low is not None and 0 <= task.accuracy <= 1


def metric(task: TaskScore) -> str:
    """The metric without its filter: `exact_match` of `exact_match,final-number`."""
    return task.metric.partition(",")[0]


def percent(share: float) -> str:
    """0.981 -> `98.1 %`."""
    return f"{share * 100:.1f} %"


def accuracy(task: TaskScore) -> str:
    """A score without its interval: percent where it is a share."""
    return percent(task.accuracy) if is_share(task) else f"{task.accuracy:.4g}"


def interval(task: TaskScore) -> str:
    """The interval of a score, in percent where it is a share; empty where it has none."""
    if task.low is None or task.high is None:
        return ""
    if is_share(task):
        return f"{task.low * 100:.1f} to {task.high * 100:.1f}"
    return f"{task.low:.4g} to {task.high:.4g}"


def score(task: TaskScore) -> str:
    """A score with its interval."""
    return f"{accuracy(task)} ({interval(task)})" if task.low is not None else accuracy(task)


def signed_points(difference: float) -> str:
    """-0.016 -> `-1.6`."""
    return f"{100 * difference:+.1f}"


def margin(share: float) -> str:
    """The drop that is tolerated: `2 points`."""
    return f"{100 * share:g} points"
