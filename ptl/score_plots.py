"""Pictures of scores against parameters: the run's accuracy, and a panel for each benchmark."""

from __future__ import annotations

from typing import Any, NamedTuple

from ptl.cells import Task, first_task, is_share, short
from ptl.result import Result, final_row
from ptl.result_rows import Row
from ptl.svg import BAD, CONTROL, LOOP, PAPER, set_size

MARGIN = 0.12  # of the scores' range, above and below them
ASIDE = 7 / 72  # inches to the right


class Mark(NamedTuple):
    """How a row is drawn."""

    colour: str  # of svg.VARIABLES
    marker: str  # of matplotlib
    aside: bool  # a little to the right


class Scored(NamedTuple):
    """A checkpoint's score of one task."""

    row: Row
    task: Task


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
        ends.append(row["accuracy"])
        if row["low"] is not None:
            ends += [row["low"], row["high"]]
    low, high = min(ends), max(ends)
    return low - MARGIN * (high - low) <= 0


def accuracy(figure: Any, result: Result, wide: bool) -> None:
    """The scores of the first task."""
    from matplotlib.ticker import MaxNLocator

    set_size(figure, wide, wide_height=3.9, narrow_height=3.7)
    axis = figure.subplots()
    scores = [Scored(row, first_task(row)) for row in result["rows"]]
    _draw_scores(axis, result, scores)
    axis.xaxis.set_major_locator(MaxNLocator(7 if wide else 4))
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
    # As many lines of panels as are needed, rounded up.
    columns = min(3, len(by_task)) if wide else 1
    lines = -(-len(by_task) // columns)
    height = 2.3 * lines
    set_size(figure, wide, wide_height=height + 0.4, narrow_height=height + 0.6)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (name, scores) in zip(panels, by_task.items(), strict=False):
        _draw_scores(axis, result, scores)
        axis.set_title(name if len(name) <= 28 else f"{name[:27]}…")
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_locator(MaxNLocator(4))
    # The last line of panels may not be full.
    for axis in panels[len(by_task) :]:
        axis.set_axis_off()
    _draw_key(figure, result, wide)


def _draw_scores(axis: Any, result: Result, scores: list[Scored]) -> None:
    """Scores of one task against parameters; the dense model is at the left, the smallest at the right."""
    axis.margins(0.08, MARGIN)
    for mark in sorted({mark_of(scored.row) for scored in scores}):
        same = [scored for scored in scores if mark_of(scored.row) == mark]
        _draw_marks(axis, mark, same)
    # A ring around the final checkpoint.
    final = final_row(result)
    ring = [scored for scored in scores if scored.row == final]
    axis.plot(_sizes(ring), _accuracies(ring), "o", color="none", markersize=13, markeredgecolor=LOOP)
    # A thin line through what the loop accepted.
    path = [scored for scored in scores if mark_of(scored.row) in (DENSE, ACCEPTED)]
    axis.plot(_sizes(path), _accuracies(path), color=LOOP, linewidth=1.2, alpha=0.55, zorder=1)
    if all(is_share(scored.task) for scored in scores):
        axis.yaxis.set_major_formatter(_percent_tick)
    axis.autoscale_view()
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(short_tick)


def _sizes(scores: list[Scored]) -> list[int]:
    """The x-coordinates: parameters."""
    return [scored.row["params"] for scored in scores]


def _accuracies(scores: list[Scored]) -> list[float]:
    """The y-coordinates."""
    return [scored.task["accuracy"] for scored in scores]


def _draw_marks(axis: Any, mark: Mark, scores: list[Scored]) -> None:
    """Marks of one kind with their intervals."""
    from matplotlib.transforms import ScaledTranslation

    x, y = _sizes(scores), _accuracies(scores)
    below, above = [], []  # lengths of the error bars
    for params, (_, task) in zip(x, scores, strict=True):
        accuracy = task["accuracy"]
        low = accuracy if task["low"] is None else task["low"]
        high = accuracy if task["high"] is None else task["high"]
        below.append(max(0.0, accuracy - low))
        above.append(max(0.0, high - accuracy))
        axis.update_datalim([(params, low), (params, high)])
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
    size = 8 if mark == REJECTED else 6
    axis.plot(x, y, mark.marker, color=mark.colour, markersize=size, markeredgecolor=PAPER, **options)


def _draw_key(figure: Any, result: Result, wide: bool) -> None:
    """A key of the marks that occur, above the plot."""
    from matplotlib.lines import Line2D

    marks = [mark_of(row) for row in result["rows"]]
    lines = []
    for mark, label in LABELS.items():
        if mark in marks:
            line = Line2D([], [], marker=mark.marker, color=mark.colour, linestyle="", label=label)
            lines.append(line)
    columns = 4 if wide else 2
    figure.legend(handles=lines, loc="outside upper left", ncols=columns, handletextpad=0.2, columnspacing=1.2)


def _percent_tick(value: float, _position: int) -> str:
    return f"{value * 100:.4g} %"


def short_tick(value: float, _position: int) -> str:
    """A count beside an axis."""
    return short(value)
