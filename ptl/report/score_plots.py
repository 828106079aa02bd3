"""Pictures of scores against parameters: the run's accuracy, and a panel for each benchmark."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ptl.report.cells import first_task, is_share, short
from ptl.report.result import Result, final_row
from ptl.report.result_rows import Row
from ptl.report.svg import BAD, CONTROL, LOOP, PAPER, add_key, set_size

MARGIN = 0.12  # of the scores' range, above and below them
ASIDE = 7 / 72  # inches to the right
MAX_TITLE = 28  # characters


class Mark(NamedTuple):
    """How a row is drawn."""

    colour: str  # of svg.VARIABLES
    marker: str  # of matplotlib
    aside: bool  # a little to the right


class Scored(NamedTuple):
    """A checkpoint's score of one task."""

    row: Row
    task: Row


DENSE = Mark(LOOP, "s", False)
ACCEPTED = Mark(LOOP, "o", False)
REJECTED = Mark(BAD, "X", False)
ONE_SHOT = Mark(CONTROL, "D", True)
# In the order of the key above a plot.
LABELS = {
    DENSE: "dense",
    ACCEPTED: "loop",
    REJECTED: "rejected",
    ONE_SHOT: "one-shot control",
}


def mark_of(row: Row) -> Mark:
    """The mark of a scored checkpoint."""
    if row["arm"] == "control":
        return ONE_SHOT
    if row["verdict"] == "rejected":
        return REJECTED
    return ACCEPTED if row["iteration"] else DENSE


def begins_at_zero(rows: list[Row]) -> bool:
    """Whether the axis of the scores reaches down to zero, with its margin."""
    ends: list[float] = []
    for row in rows:
        ends += [row["accuracy"], *_bounds(row)]
    lowest = min(ends)
    margin = MARGIN * (max(ends) - lowest)
    return lowest <= margin


def _bounds(score: Row) -> tuple[float, float]:
    """The ends of an interval; of a score that has none, the score itself."""
    if score["low"] is None:
        return score["accuracy"], score["accuracy"]
    return score["low"], score["high"]


def accuracy(figure: Any, result: Result, wide: bool) -> None:
    """The scores of the first task."""
    from matplotlib.ticker import MaxNLocator

    height = 3.9 if wide else 3.7
    set_size(figure, wide, height)
    axis = figure.subplots()
    scores = [Scored(row, first_task(row)) for row in result["rows"]]
    _draw_scores(axis, result, scores)
    # As many numbers as there is room for.
    num_ticks = 7 if wide else 4
    axis.xaxis.set_major_locator(MaxNLocator(num_ticks))
    axis.set_xlabel("parameters (fewer to the right)")
    _draw_key(figure, result, wide)


def tasks(figure: Any, result: Result, wide: bool) -> None:
    """A panel for each task, each with its own scale."""
    from matplotlib.ticker import MaxNLocator

    by_task: dict[str, list[Scored]] = {}
    for row in result["rows"]:
        for task in row["scores"]["tasks"]:
            scores = by_task.setdefault(task["task"], [])
            scores.append(Scored(row, task))
    # As many lines of panels as are needed.
    columns = min(3, len(by_task)) if wide else 1
    lines = math.ceil(len(by_task) / columns)
    key_height = 0.4 if wide else 0.6
    set_size(figure, wide, 2.3 * lines + key_height)
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = grid.flatten()
    for axis, (name, scores) in zip(panels, by_task.items(), strict=False):
        _draw_scores(axis, result, scores)
        axis.set_title(_shortened(name))
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_locator(MaxNLocator(4))
    # The last line of panels may not be full.
    for axis in panels[len(by_task) :]:
        axis.set_axis_off()
    _draw_key(figure, result, wide)


def _shortened(title: str) -> str:
    """As much of a title as fits above a panel."""
    if len(title) <= MAX_TITLE:
        return title
    return title[: MAX_TITLE - 1] + "…"


def _draw_scores(axis: Any, result: Result, scores: list[Scored]) -> None:
    """Scores of one task against parameters; the dense model is at the left, the smallest at the right."""
    axis.margins(0.08, MARGIN)
    by_mark: dict[Mark, list[Scored]] = {}
    for scored in scores:
        mark = mark_of(scored.row)
        by_mark.setdefault(mark, []).append(scored)
    for mark, marked in sorted(by_mark.items()):
        _draw_marks(axis, mark, marked)
    # A ring around the final checkpoint.
    final = final_row(result)
    ring = [scored for scored in scores if scored.row == final]
    x, y = _coordinates(ring)
    axis.plot(x, y, "o", color="none", markersize=13, markeredgecolor=LOOP)
    # A thin line through what the loop accepted.
    path = by_mark[DENSE] + by_mark.get(ACCEPTED, [])
    x, y = _coordinates(path)
    axis.plot(x, y, color=LOOP, linewidth=1.2, alpha=0.55, zorder=1)  # below the marks
    # A task's scores are all shares, or none is.
    if all(is_share(score.task) for score in scores):
        axis.yaxis.set_major_formatter(_percent_tick)
    axis.autoscale_view()
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(short_tick)


def _coordinates(scores: list[Scored]) -> tuple[list[int], list[float]]:
    """All parameters and all scores, as matplotlib takes them."""
    x = [scored.row["params"] for scored in scores]
    y = [scored.task["accuracy"] for scored in scores]
    return x, y


def _draw_marks(axis: Any, mark: Mark, scores: list[Scored]) -> None:
    """Marks of one kind with their intervals."""
    from matplotlib.transforms import ScaledTranslation

    # Lengths of the error bars.
    below, above = [], []
    for row, task in scores:
        low, high = _bounds(task)
        accuracy = task["accuracy"]
        # Rounding may put it a little outside of its interval.
        below.append(max(0.0, accuracy - low))
        above.append(max(0.0, high - accuracy))
        # The axes must have room for them.
        params = row["params"]
        axis.update_datalim([(params, low), (params, high)])
    x, y = _coordinates(scores)
    options: dict[str, Any] = {}
    if mark.aside:
        # The control ends at the loop's size: a few points aside, its interval stays apart from the loop's.
        shift = ScaledTranslation(ASIDE, 0, axis.figure.dpi_scale_trans)
        options["transform"] = axis.transData + shift
    axis.errorbar(
        x,
        y,
        yerr=[below, above],
        fmt="none",  # no marks: they are drawn on top
        ecolor=mark.colour,
        elinewidth=1.3,
        capsize=3,
        **options,
    )
    # A cross looks smaller than a disc.
    options["markersize"] = 8 if mark == REJECTED else 6
    axis.plot(x, y, mark.marker, color=mark.colour, markeredgecolor=PAPER, **options)


def _draw_key(figure: Any, result: Result, wide: bool) -> None:
    """A key of the marks that occur, above the plot."""
    from matplotlib.lines import Line2D

    present = [mark_of(row) for row in result["rows"]]
    lines = []
    for mark, label in LABELS.items():
        if mark in present:
            # A line without points, for its mark and its label.
            line = Line2D([], [], marker=mark.marker, color=mark.colour, linestyle="", label=label)
            lines.append(line)
    columns = 4 if wide else 2
    add_key(figure, lines, columns=columns, gap=0.2)


def _percent_tick(value: float, _position: int) -> str:
    return f"{value * 100:.4g} %"


def short_tick(value: float, _position: int) -> str:
    """A count beside an axis."""
    return short(value)
