"""The report's pictures as inline SVG: which there are; losses, widths and speed. Scores: `score_plots`."""

from __future__ import annotations

import math
from typing import Any

from ptl.evaluation import speed_rows
from ptl.report import score_plots
from ptl.report.result import Result
from ptl.report.result_rows import Row
from ptl.report.score_plots import mark_of, short_tick
from ptl.report.svg import BAD, CONTROL, GRID, INK, LOOP, MUTED, Painter, add_key, picture, set_size
from ptl.report.tables import experts_removed, iteration_label

MAX_POINTS = 4000  # of all loss curves together: keeps the page far below 1 MB
MAX_TOWERS = 500  # layers of all checkpoints together that are drawn apart from each other
GAP = 0.14  # of the width of a tower
DOTS = (0, (2, 3))  # of a line: offset, then lengths of dot and gap in points

Curve = list[tuple[int, float]]  # tokens and loss
Skyline = tuple[list[int], list[float]]  # heights, and edges of which there is one more


def draw(result: Result) -> dict[str, Row]:
    """Every picture that the result has data for: name -> {"wide": svg, "narrow": svg} (desktop and phone)."""
    painters: dict[str, Painter] = {"accuracy": score_plots.accuracy, "widths": _widths}
    # The others need data that not every run has.
    if result["curves"]:
        painters["loss"] = _losses
    # All checkpoints were scored on the same benchmarks.
    first = result["rows"][0]
    if len(first["scores"]["tasks"]) > 1:
        painters["tasks"] = score_plots.tasks
    if speed_rows.rows(result["speed"]):
        painters["speed"] = _speed
    pictures = {}
    for name, painter in painters.items():
        pictures[name] = {
            "wide": picture(painter, result, True, f"{name}-wide"),
            "narrow": picture(painter, result, False, f"{name}-narrow"),
        }
    return pictures


def _losses(figure: Any, result: Result, wide: bool) -> None:
    """Training losses against the recovery tokens of the arm; the loop's curves follow one another."""
    from matplotlib.lines import Line2D

    set_size(figure, wide, 3.3 if wide else 3.2)
    axis = figure.subplots()
    curves = result["curves"]
    max_points = max(20, MAX_POINTS // len(curves))
    rejected_rows = [row for row in result["rows"] if row["verdict"] == "rejected"]
    rejected = [row["iteration"] for row in rejected_rows]
    keys = {}  # by label
    start = 0  # tokens of the loop so far
    for step in result["steps"]:
        if step["step"] not in curves:
            continue
        curve = _thinned(curves[step["step"]], max_points)
        in_loop = step["arm"] == "loop"
        # The control has one curve, which begins at zero.
        offset = start if in_loop else 0
        style: Any = "-"
        label = "loop"
        colour = LOOP
        if not in_loop:
            label = "one-shot control"
            colour = CONTROL
        elif step["iteration"] in rejected:
            label = "rejected"
            colour = BAD
            style = "--"
        _draw_curve(axis, curve, offset, color=colour, ls=style)
        # A line without points, for its colour and its label.
        keys[label] = Line2D([], [], color=colour, linestyle=style, label=label)
        if in_loop:
            _draw_iteration_start(axis, offset, step["iteration"])
            # The next curve begins where the tokens of this step end.
            last_tokens, _ = curve[-1]
            start += step["tokens"] or last_tokens
    axis.xaxis.set_major_formatter(short_tick)
    axis.set_xlabel("recovery tokens since the start of the arm")
    axis.margins(0.02, 0.08)
    _set_loss_limits(axis, curves)
    lines = list(keys.values())
    add_key(figure, lines, columns=3, gap=0.5)


def _thinned(curve: Curve, max_points: int) -> Curve:
    """At most so many points of a curve, and its last."""
    stride = math.ceil(len(curve) / max_points)
    last = curve[-1]
    return [*curve[::stride], last]


def _draw_curve(axis: Any, curve: Curve, offset: int, **style: str) -> None:
    x = [offset + tokens for tokens, _ in curve]
    y = [loss for _, loss in curve]
    # A line of one point is not seen.
    marker = "o" if x[0] == x[-1] else ""
    # Thicker than the grid, thinner than a mark.
    axis.plot(x, y, marker=marker, linewidth=1.5, markersize=4, **style)


def _draw_iteration_start(axis: Any, tokens: int, iteration: int) -> None:
    """A dotted line with the iteration's number."""
    axis.axvline(tokens, color=GRID, linewidth=0.8, linestyle=DOTS)
    # At its upper end, to the right.
    axis.annotate(
        str(iteration),
        xy=(tokens, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        color=MUTED,
        va="top",
        fontsize=8.5,
    )


def _set_loss_limits(axis: Any, curves: dict[str, Curve]) -> None:
    """From zero, unless a loss is negative."""
    losses: list[float] = []
    for curve in curves.values():
        losses += [loss for _, loss in curve]
    low = min(0, *losses)
    high = max(losses) * 1.1  # some room above the highest
    axis.set_ylim(low, high or 1)


def _widths(figure: Any, result: Result, wide: bool) -> None:
    """A skyline per checkpoint: as many towers as layers, as high as each layer's FFN is wide, or has experts.

    Of a mixture whose experts all stay, as high as each of them is wide.
    """
    rows = result["rows"]
    set_size(figure, wide, 2.7)
    axis = figure.subplots()
    num_layers = max(len(row["widths"]) for row in rows)
    gap = max(1.0, num_layers * 0.3)
    # Hundreds of towers would make the page large, and nobody would see them.
    num_towers = num_layers * len(rows)
    skyline = _towers if num_towers <= MAX_TOWERS else _outline
    count_experts = experts_removed(result)
    ticks, labels = [], []
    start = 0.0
    for row in rows:
        heights = [row["scores"]["experts"]] * len(row["widths"]) if count_experts else row["widths"]
        outline, edges = skyline(heights, start)
        colour = mark_of(row).colour
        axis.stairs(outline, edges, fill=True, color=colour, alpha=0.85)
        # A label in the middle of the room for all layers, also below a model with fewer.
        ticks.append(start + num_layers / 2)
        in_loop = row["arm"] == "loop"
        labels.append(iteration_label(row) if in_loop else "control")
        start += num_layers + gap
    axis.set_xticks(ticks, labels)
    axis.tick_params(axis="x", length=0)
    # Many labels do not fit beside each other.
    max_upright = 12 if wide else 5
    if len(rows) > max_upright:
        rotation = 90 if len(rows) > 20 else 60
        axis.tick_params(axis="x", labelrotation=rotation)
    axis.set_xlabel("iteration; one bar for each layer")


def _towers(widths: list[int], start: float) -> Skyline:
    """Towers with a gap between them."""
    heights: list[int] = []
    edges = [start]
    for width in widths:
        # A tower, then a gap of height 0.
        heights += [width, 0]
        end = edges[-1] + 1
        edges += [end - GAP, end]
    return heights, edges


def _outline(widths: list[int], start: float) -> Skyline:
    """The same as one outline: equal neighbours are one step, which keeps the page small."""
    heights: list[int] = []
    edges: list[float] = []
    before = None
    for position, width in enumerate(widths):
        if width != before:
            heights.append(width)
            edges.append(start + position)
        before = width
    # The end of the last one.
    edges.append(start + len(widths))
    return heights, edges


def _speed(figure: Any, result: Result, wide: bool) -> None:
    """How many times as fast the final model is as the dense one: a bar from 1 for each measure."""
    from matplotlib.ticker import MaxNLocator

    rows = speed_rows.rows(result["speed"])
    # In inches, with the labels of the axis.
    bar_height = 0.3 if wide else 0.32
    set_size(figure, wide, 0.6 + bar_height * len(rows))
    axis = figure.subplots()
    times = [row.times for row in rows]
    positions = range(len(rows))
    # A bar begins at the dense model's 1.
    lengths = [value - 1 for value in times]
    colours = [BAD if value < 1 else LOOP for value in times]
    axis.barh(positions, lengths, left=1, height=0.62, color=colours)
    for position, value in enumerate(times):
        _draw_number(axis, value, position)
    # The dense model.
    axis.axvline(1, color=MUTED, linewidth=1)
    # Room for the numbers at the bars' ends.
    low = min(1.0, *times)
    high = max(1.0, *times)
    share = 0.1 if wide else 0.25
    room = share * max(high - low, 0.1)
    room_below = room if low < 1 else room / 4
    axis.set_xlim(low - room_below, high + room)
    labels = [row.label for row in rows]
    axis.set_yticks(positions, labels)
    # The first row at the top.
    axis.invert_yaxis()
    # Vertical lines instead of horizontal ones.
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    # With these steps 1 is among the ticks.
    num_ticks = 6 if wide else 3
    locator = MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10])
    axis.xaxis.set_major_locator(locator)
    axis.set_xlabel("times as fast as the dense model")


def _draw_number(axis: Any, value: float, position: int) -> None:
    """The speed-up at the end of its bar, on the side that the bar points to."""
    faster = value >= 1
    axis.annotate(
        f"{value:.2f}",
        xy=(value, position),
        xytext=(4 if faster else -4, 0),
        textcoords="offset points",
        va="center",
        ha="left" if faster else "right",
        color=INK,
        fontsize=8.5,
    )
