"""The report's pictures, drawn by matplotlib as inline SVG that takes its colours from the page, for dark mode too."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

from ptl.evaluation import speed_rows
from ptl.report.numbers import is_share
from ptl.report.result import Result, Row
from ptl.units import billions

# Each colour stands for a CSS variable of the page and is replaced by it after drawing.
NAMES = ("ink", "muted", "grid", "loop", "control", "bad", "paper")
VARIABLES = {f"#0{i}0{i}0{i}": name for i, name in enumerate(NAMES, 1)}
INK, MUTED, GRID, LOOP, CONTROL, BAD, PAPER = VARIABLES
WIDTH = 8.4  # inches
MAX_POINTS = 4000  # of all loss curves together: keeps the page far below 1 MB
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, searchable, readable aloud
    "text.parse_math": False,  # a `$` in a name is not mathematics
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same layout on every machine
    "font.size": 9.5,
    "text.color": INK,
    # No frame; horizontal lines only, below the data.
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "legend.frameon": False,
    # The page's background shows through.
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
# Kind of a scored checkpoint, in the order of the key -> colour and marker.
MARKS = {
    "dense": (LOOP, "s"),
    "loop": (LOOP, "o"),
    "rejected": (BAD, "X"),
    "one-shot control": (CONTROL, "D"),
}

Curve = list[tuple[int, float]]  # tokens and loss


def draw(result: Result) -> dict[str, str]:
    """Every picture that the result has data for: name -> an SVG element of the page."""
    pictures = {"accuracy": _svg("accuracy", 3.9, _accuracy, result)}
    if result.curves:
        pictures["loss"] = _svg("loss", 3.3, _losses, result)
    rows = speed_rows.rows(result.speed)
    if rows:
        pictures["speed"] = _svg("speed", 0.6 + 0.3 * len(rows), _speed, result)
    return pictures


def _svg(name: str, height: float, paint: Callable[[Any, Any, Result], None], result: Result) -> str:
    """What `paint` draws on a figure of `height` inches and its only axes; `name` makes its ids unique in the page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # the same bytes each time
        figure = Figure((WIDTH, height), layout="constrained")
        paint(figure, figure.subplots(), result)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return inline(buffer.getvalue(), name)


def inline(svg: str, name: str) -> str:
    """An SVG file -> an element of the page: no prolog, metadata or page-wide style; own ids, CSS colours."""
    svg = re.sub(r"\s*<(metadata>|style ).*?</(metadata|style)>", "", svg, flags=re.S)
    _, view_box, _, content = re.split(r'<svg[^>]*(viewBox="[^"]*")([^>]*)>', svg, maxsplit=1)
    # Ids, and what refers to them.
    content = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', content)
    content = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", content).replace("xlink:href", "href")
    # Numbers to a tenth of a point, finer than a screen shows; in tags only: those on the axes keep their digits.
    content = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d{2,}", r"\1", tag.group()), content)
    for colour, variable in VARIABLES.items():
        content = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", content)
    return f'<svg {view_box} aria-hidden="true" focusable="false">{content}'.rstrip()


def _accuracy(figure: Any, axis: Any, result: Result) -> None:
    """Scores of the first task against parameters, with intervals: the dense model is at the left."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    axis.margins(0.08, 0.12)
    by_kind: dict[str, list[Row]] = {kind: [] for kind in MARKS}
    for row in result.rows:
        by_kind[_kind(row)].append(row)
    # The control ends at the loop's size: a few points to the right, its interval stays apart from the loop's.
    aside = axis.transData + ScaledTranslation(7 / 72, 0, figure.dpi_scale_trans)
    for kind, rows in by_kind.items():
        _draw_marks(axis, kind, rows, aside if kind == "one-shot control" else axis.transData)
    # A ring around the final checkpoint, and a thin line through what the loop accepted.
    axis.plot(*_points(filter(None, [result.final_row])), "o", color="none", markersize=13, markeredgecolor=LOOP)
    axis.plot(*_points(by_kind["dense"] + by_kind["loop"]), color=LOOP, linewidth=1.2, alpha=0.55, zorder=1)
    # A task's scores are all shares, or none is.
    if all(is_share(row.first) for row in result.rows):
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")
    axis.autoscale_view()
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(lambda value, _: billions(int(value)))
    axis.set_xlabel("parameters (fewer to the right)")
    keys = [
        Line2D([], [], marker=marker, color=colour, linestyle="", label=kind)
        for kind, (colour, marker) in MARKS.items()
        if by_kind[kind]
    ]
    _add_key(figure, keys)


def _kind(row: Row) -> str:
    """The key of a checkpoint's mark."""
    if row.arm == "control":
        return "one-shot control"
    if row.verdict == "rejected":
        return "rejected"
    return "loop" if row.iteration else "dense"


def _points(rows: Any) -> tuple[list[int], list[float]]:
    """All parameters and all scores, as matplotlib takes them."""
    points = [(row.params, row.accuracy) for row in rows]
    return [x for x, _ in points], [y for _, y in points]


def _draw_marks(axis: Any, kind: str, rows: list[Row], transform: Any) -> None:
    """Marks of one kind with their intervals; a score without one has a bar of no length."""
    colour, marker = MARKS[kind]
    x, y = _points(rows)
    ends = [(row.accuracy, row.accuracy) if row.low is None else (row.low, row.high) for row in rows]
    # Rounding may put a score a little outside of its interval.
    below = [max(0.0, score - low) for score, (low, _) in zip(y, ends, strict=True)]
    above = [max(0.0, high - score) for score, (_, high) in zip(y, ends, strict=True)]
    axis.update_datalim([(params, end) for params, pair in zip(x, ends, strict=True) for end in pair])
    lines = {"fmt": "none", "ecolor": colour, "elinewidth": 1.3, "capsize": 3}
    axis.errorbar(x, y, yerr=[below, above], transform=transform, **lines)
    axis.plot(x, y, marker, color=colour, markeredgecolor=PAPER, markersize=7, transform=transform)


def _losses(figure: Any, axis: Any, result: Result) -> None:
    """Training losses against the recovery tokens of the arm; the loop's curves follow one another."""
    from matplotlib.lines import Line2D

    stride = math.ceil(sum(map(len, result.curves.values())) / MAX_POINTS)
    rejected = [row.iteration for row in result.rows if row.verdict == "rejected"]
    keys = {}  # by label
    start = 0  # tokens of the loop so far
    for step in result.steps:
        curve = result.curves.get(step.step)
        if not curve:
            continue
        label, colour, style, offset = "loop", LOOP, "-", start
        if step.arm == "control":
            label, colour, offset = "one-shot control", CONTROL, 0
        elif step.iteration in rejected:
            label, colour, style = "rejected", BAD, "--"
        _draw_curve(axis, [*curve[::stride], curve[-1]], offset, color=colour, linestyle=style)
        keys[label] = Line2D([], [], color=colour, linestyle=style, label=label)
        if step.arm == "loop":
            # A dotted line with the iteration's number at its upper end.
            axis.axvline(start, color=GRID, linewidth=0.8, linestyle=(0, (2, 3)))
            ends = {"xycoords": ("data", "axes fraction"), "xytext": (3, -2), "textcoords": "offset points"}
            axis.annotate(str(step.iteration), (start, 1), **ends, color=MUTED, va="top", fontsize=8.5)
            start += step.tokens or curve[-1][0]
    axis.xaxis.set_major_formatter(lambda value, _: billions(int(value)))
    axis.set_xlabel("recovery tokens since the start of the arm")
    axis.margins(0.02, 0.08)
    # From zero, unless a loss is negative.
    losses = [loss for curve in result.curves.values() for _, loss in curve]
    axis.set_ylim(min(0, *losses), 1.1 * max(losses) or 1)
    _add_key(figure, list(keys.values()))


def _draw_curve(axis: Any, curve: Curve, offset: int, **style: str) -> None:
    x, y = [offset + tokens for tokens, _ in curve], [loss for _, loss in curve]
    # A line of one point is not seen.
    axis.plot(x, y, marker="o" if x[0] == x[-1] else "", linewidth=1.5, markersize=4, **style)


def _speed(_figure: Any, axis: Any, result: Result) -> None:
    """How many times as fast the final model is as the dense one: a bar from 1 for each measure."""
    from matplotlib.ticker import MaxNLocator

    rows = speed_rows.rows(result.speed)
    times = [row.times for row in rows]
    colours = [BAD if value < 1 else LOOP for value in times]
    bars = axis.barh([row.label for row in rows], [value - 1 for value in times], left=1, height=0.62, color=colours)
    axis.bar_label(bars, [f"{value:.2f}" for value in times], padding=4, color=INK, fontsize=8.5)
    axis.axvline(1, color=MUTED, linewidth=1)  # the dense model
    # Room for the numbers at the bars' ends.
    low, high = min(1.0, *times), max(1.0, *times)
    room = 0.1 * max(high - low, 0.1)
    axis.set_xlim(low - (room if low < 1 else room / 4), high + room)
    # The first row at the top, with vertical lines; with these steps 1 is among the ticks.
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_xlabel("times as fast as the dense model")


def _add_key(figure: Any, lines: list[Any]) -> None:
    """A key of the lines or marks above the plot."""
    figure.legend(handles=lines, loc="outside upper left", ncols=4, handletextpad=0.4, columnspacing=1.2)
