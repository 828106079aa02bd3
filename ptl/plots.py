"""The report's pictures: a result -> scores against size, losses, widths and speed, as inline SVG."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ptl import speeds
from ptl.cells import first_task, is_share, short
from ptl.result import Result, Row, final_row
from ptl.svg import BAD, CONTROL, GRID, INK, LOOP, MUTED, PAPER, picture

WIDE, NARROW = 8.4, 3.9  # inches: on a desktop and on a phone
MARGIN = 0.12  # of the scores' range, above and below them
MAX_POINTS = 4000  # of all loss curves together: keeps the page far below 1 MB
MAX_TOWERS = 500  # layers of all checkpoints together that are drawn apart from each other

Point = tuple[float, float]  # x and y


class Mark(NamedTuple):
    """How a row is drawn."""

    colour: str
    marker: str  # of matplotlib
    aside: bool  # a little to the right


DENSE = Mark(LOOP, "s", False)
ACCEPTED = Mark(LOOP, "o", False)
REJECTED = Mark(BAD, "X", False)
ONE_SHOT = Mark(CONTROL, "D", True)
# In the order of the key above a plot.
LABELS = {DENSE: "dense", ACCEPTED: "loop", REJECTED: "rejected", ONE_SHOT: "one-shot control"}


def draw(result: Result) -> dict[str, dict[str, str]]:
    """Every picture that the result has data for: name -> {"wide": svg, "narrow": svg} (desktop and phone)."""
    rows = result["rows"]
    painters = {}
    if rows:
        painters["accuracy"] = _accuracy
    if result["curves"]:
        painters["loss"] = _losses
    if any(row["widths"] for row in rows):
        painters["widths"] = _widths
    if any(len(row["scores"]["tasks"]) > 1 for row in rows):
        painters["tasks"] = _tasks
    if speeds.rows(result.get("speed") or {}):
        painters["speed"] = _speed
    pictures = {}
    for name, paint in painters.items():
        wide = functools.partial(paint, result=result, wide=True)
        narrow = functools.partial(paint, result=result, wide=False)
        pictures[name] = {"wide": picture(wide, f"{name}-wide"), "narrow": picture(narrow, f"{name}-narrow")}
    return pictures


def begins_at_zero(rows: list[Row]) -> bool:
    """Whether the axis of the scores reaches down to zero, with its margin."""
    ends = []
    for row in rows:
        ends += [row[key] for key in ("low", "accuracy", "high") if row[key] is not None]
    low, high = min(ends), max(ends)
    return low - MARGIN * (high - low) <= 0


def _mark(row: Row) -> Mark:
    if row["arm"] == "control":
        return ONE_SHOT
    if row["verdict"] == "rejected":
        return REJECTED
    return ACCEPTED if row["iteration"] else DENSE


def _set_size(figure: Any, wide: bool, *, wide_height: float, narrow_height: float) -> None:
    """Inches of a figure."""
    figure.set_size_inches(WIDE if wide else NARROW, wide_height if wide else narrow_height)


def _accuracy(figure: Any, result: Result, wide: bool) -> None:
    """The first task's scores."""
    from matplotlib.ticker import MaxNLocator

    _set_size(figure, wide, wide_height=3.9, narrow_height=3.7)
    axis = figure.subplots()
    scores = [(row, first_task(row)) for row in result["rows"]]
    _draw_scores(axis, result, scores)
    axis.xaxis.set_major_locator(MaxNLocator(7 if wide else 4))
    axis.set_xlabel("parameters (fewer to the right)")
    _draw_key(figure, result, wide=wide)


def _tasks(figure: Any, result: Result, wide: bool) -> None:
    """A panel for each task."""
    from matplotlib.ticker import MaxNLocator

    by_task: dict[str, list[tuple[Row, Row]]] = {}
    for row in result["rows"]:
        for score in row["scores"]["tasks"]:
            by_task.setdefault(score["task"], []).append((row, score))
    columns = min(3, len(by_task)) if wide else 1
    lines = -(-len(by_task) // columns)  # rounded up
    _set_size(figure, wide, wide_height=2.3 * lines + 0.4, narrow_height=2.3 * lines + 0.6)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (task, scores) in zip(axes, by_task.items(), strict=False):
        _draw_scores(axis, result, scores)
        axis.set_title(task if len(task) <= 28 else task[:27] + "…")
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_locator(MaxNLocator(4))
    for unused in axes[len(by_task) :]:
        unused.set_axis_off()
    _draw_key(figure, result, wide=wide)


def _draw_scores(axis: Any, result: Result, scores: list[tuple[Row, Row]]) -> None:
    """Scores of one task, each with its row, against parameters; the dense model is at the left."""
    axis.margins(0.08, MARGIN)
    by_mark: dict[Mark, list[tuple[int, Row]]] = {}
    ring: list[Point] = []
    path: list[Point] = []
    final = final_row(result)
    for row, score in scores:
        mark = _mark(row)
        point = (row["params"], score["accuracy"])
        by_mark.setdefault(mark, []).append((row["params"], score))
        if row == final:
            ring.append(point)
        if mark in (DENSE, ACCEPTED):
            path.append(point)
    for mark in sorted(by_mark):
        _draw_marks(axis, mark, by_mark[mark])
    axis.plot(*_coordinates(ring), "o", color="none", markersize=13, markeredgecolor=LOOP)
    axis.plot(*_coordinates(path), color=LOOP, linewidth=1.2, alpha=0.55, zorder=1)
    if all(is_share(score) for _, score in scores):
        axis.yaxis.set_major_formatter(_percent_tick)
    axis.autoscale_view()
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(_short_tick)


def _draw_marks(axis: Any, mark: Mark, scores: list[tuple[int, Row]]) -> None:
    """Marks of one kind with their intervals, at these numbers of parameters."""
    from matplotlib.transforms import ScaledTranslation

    x, y, lows, highs = [], [], [], []
    for params, score in scores:
        accuracy = score["accuracy"]
        x.append(params)
        y.append(accuracy)
        lows.append(accuracy if score["low"] is None else score["low"])
        highs.append(accuracy if score["high"] is None else score["high"])
    below = [max(0.0, value - low) for value, low in zip(y, lows, strict=True)]
    above = [max(0.0, high - value) for value, high in zip(y, highs, strict=True)]
    axis.update_datalim([*zip(x, lows, strict=True), *zip(x, highs, strict=True)])
    options: dict[str, Any] = {}
    if mark.aside:
        # The control ends at the loop's size: a few points aside, its interval stays apart from the loop's.
        shift = ScaledTranslation(7 / 72, 0, axis.figure.dpi_scale_trans)
        options["transform"] = axis.transData + shift
    axis.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=mark.colour, elinewidth=1.3, capsize=3, **options)
    size = 8 if mark == REJECTED else 6
    axis.plot(x, y, mark.marker, color=mark.colour, markersize=size, markeredgecolor=PAPER, **options)


def _coordinates(points: list[Point]) -> tuple[list[float], list[float]]:
    """Points as matplotlib takes them: all x, all y."""
    return [x for x, _ in points], [y for _, y in points]


def _percent_tick(value: float, _position: int) -> str:
    return f"{value * 100:.4g} %"


def _short_tick(value: float, _position: int) -> str:
    return short(value)


def _draw_key(figure: Any, result: Result, *, wide: bool) -> None:
    """A key of the marks that occur, above the plot."""
    from matplotlib.lines import Line2D

    present = {_mark(row) for row in result["rows"]}
    lines = []
    for mark, label in LABELS.items():
        if mark in present:
            lines.append(Line2D([], [], marker=mark.marker, color=mark.colour, linestyle="", label=label))
    columns = 4 if wide else 2
    figure.legend(handles=lines, loc="outside upper left", ncols=columns, handletextpad=0.2, columnspacing=1.2)


def _losses(figure: Any, result: Result, wide: bool) -> None:
    """Training losses against the recovery tokens of the arm; the loop's curves follow one another."""
    from matplotlib.lines import Line2D

    _set_size(figure, wide, wide_height=3.3, narrow_height=3.2)
    axis = figure.subplots()
    rejected = [row["iteration"] for row in result["rows"] if _mark(row) == REJECTED]
    curves = {name: curve for name, curve in result["curves"].items() if curve}
    max_points = max(20, MAX_POINTS // len(curves))
    start = 0  # tokens of the loop so far
    keys = {}
    for step in result["steps"]:
        if step["step"] not in curves:
            continue
        curve = _thinned(curves[step["step"]], max_points)
        if step["arm"] == "control":
            offset, colour, style, label = 0, CONTROL, "-", "one-shot control"
        elif step["iteration"] in rejected:
            offset, colour, style, label = start, BAD, "--", "rejected"
        else:
            offset, colour, style, label = start, LOOP, "-", "loop"
        x = [offset + tokens for tokens, _ in curve]
        y = [loss for _, loss in curve]
        marker = "o" if len(set(x)) == 1 else ""  # a line of one point is not seen
        axis.plot(x, y, marker=marker, color=colour, linewidth=1.5, ls=style, markersize=4)
        keys[label] = Line2D([], [], color=colour, linestyle=style, label=label)
        if step["arm"] == "loop":
            _draw_iteration_start(axis, offset, step["iteration"])
            last_tokens, _ = curve[-1]
            start += step["tokens"] or last_tokens
    axis.xaxis.set_major_formatter(_short_tick)
    axis.set_xlabel("recovery tokens since the start of the arm")
    axis.margins(0.02, 0.08)
    _set_loss_limits(axis, curves)
    handles = list(keys.values())
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.5, columnspacing=1.2)


def _thinned(curve: list[Any], max_points: int) -> list[Any]:
    """At most so many points of a curve, and its last."""
    stride = -(-len(curve) // max_points)  # rounded up
    return curve[::stride] + curve[-1:]


def _draw_iteration_start(axis: Any, tokens: float, iteration: int) -> None:
    """A dotted line with the iteration's number."""
    axis.axvline(tokens, color=GRID, linewidth=0.8, linestyle=(0, (2, 3)))
    axis.annotate(
        str(iteration),
        (tokens, 1),
        (3, -2),
        xycoords=("data", "axes fraction"),
        color=MUTED,
        textcoords="offset points",
        va="top",
        fontsize=8.5,
    )


def _set_loss_limits(axis: Any, curves: dict[str, Any]) -> None:
    """From zero, unless a loss is negative."""
    losses: list[float] = []
    for curve in curves.values():
        losses += [loss for _, loss in curve]
    axis.set_ylim(min(0, *losses), max(losses) * 1.1 or 1)


def _widths(figure: Any, result: Result, wide: bool) -> None:
    """A skyline per checkpoint: as many towers as layers, as high as each layer's FFN is wide."""
    rows = [row for row in result["rows"] if row["widths"]]
    _set_size(figure, wide, wide_height=2.7, narrow_height=2.7)
    axis = figure.subplots()
    num_layers = max(len(row["widths"]) for row in rows)
    gap = max(1.0, num_layers * 0.3)
    skyline = _towers if num_layers * len(rows) <= MAX_TOWERS else _outline
    ticks, labels = [], []
    for i, row in enumerate(rows):
        start = i * (num_layers + gap)
        heights, edges = skyline(row["widths"], start)
        axis.stairs(heights, edges, fill=True, color=_mark(row).colour, alpha=0.85)
        ticks.append(start + num_layers / 2)
        labels.append("control" if row["arm"] == "control" else str(row["iteration"] or "dense"))
    axis.set_xticks(ticks, labels)
    axis.tick_params(axis="x", length=0)
    # Many labels do not fit beside each other.
    most_upright = 12 if wide else 5
    if len(rows) > most_upright:
        axis.tick_params(axis="x", labelrotation=90 if len(rows) > 20 else 60)
    axis.set_xlabel("iteration; one bar for each layer")


def _towers(widths: list[int], start: float) -> tuple[list[int], list[float]]:
    """Heights, and edges of which there is one more: towers with a gap between them."""
    heights: list[int] = []
    edges = [start]
    for i, width in enumerate(widths):
        heights += [width, 0]
        edges += [start + i + 0.86, start + i + 1]
    return heights, edges


def _outline(widths: list[int], start: float) -> tuple[list[int], list[float]]:
    """The same as one outline: equal neighbours are one step, which keeps the page small."""
    heights: list[int] = []
    edges: list[float] = []
    for i, width in enumerate(widths):
        if i == 0 or width != widths[i - 1]:
            heights.append(width)
            edges.append(start + i)
    edges.append(start + len(widths))
    return heights, edges


def _speed(figure: Any, result: Result, wide: bool) -> None:
    """How many times as fast the final model is as the dense one: a bar from 1 for each measure."""
    from matplotlib.ticker import MaxNLocator

    rows = speeds.rows(result["speed"])
    _set_size(figure, wide, wide_height=0.6 + 0.3 * len(rows), narrow_height=0.6 + 0.32 * len(rows))
    axis = figure.subplots()
    times = [row.times for row in rows]
    lengths = [value - 1 for value in times]
    colours = [LOOP if value >= 1 else BAD for value in times]
    axis.barh(range(len(rows)), lengths, left=1, height=0.62, color=colours)
    for position, value in enumerate(times):
        _draw_number(axis, value, position)
    axis.axvline(1, color=MUTED, linewidth=1)
    low, high = min(1.0, *times), max(1.0, *times)
    room = (0.1 if wide else 0.25) * max(high - low, 0.1)  # for the numbers at the bars' ends
    room_below = room if low < 1 else room / 4
    axis.set_xlim(low - room_below, high + room)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    locator = MaxNLocator(6 if wide else 3, steps=[1, 2, 2.5, 5, 10])  # 1 is among the ticks
    axis.xaxis.set_major_locator(locator)
    axis.set_xlabel("times as fast as the dense model")


def _draw_number(axis: Any, value: float, position: int) -> None:
    """The speed-up at the end of its bar, on the side that the bar points to."""
    faster = value >= 1
    axis.annotate(
        f"{value:.2f}",
        (value, position),
        (4 if faster else -4, 0),
        textcoords="offset points",
        va="center",
        ha="left" if faster else "right",
        color=INK,
        fontsize=8.5,
    )
