"""The report's pictures, drawn by matplotlib as inline SVG that takes its colours from the page, for dark mode too."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl.evaluation import speed_rows
from ptl.report.numbers import is_share
from ptl.report.result import Result, Row
from ptl.units import billions

# Colours of templates/report.mplstyle and of the lines drawn here -> CSS variables of the page.
NAMES = ("ink", "muted", "grid", "loop", "control", "bad", "paper")
VARIABLES = {f"#0{i}0{i}0{i}": name for i, name in enumerate(NAMES, 1)}
INK, MUTED, GRID, LOOP, CONTROL, BAD, PAPER = VARIABLES
STYLE = Path(__file__).parent / "templates/report.mplstyle"
WIDTH = 8.4  # inches
MAX_POINTS = 4000  # of all loss curves together: keeps the page far below 1 MB
# Kind of a scored checkpoint, in the order of the key -> colour and marker.
MARKS = {
    "dense": (LOOP, "s"),
    "loop": (LOOP, "o"),
    "rejected": (BAD, "X"),
    "one-shot control": (CONTROL, "D"),
}


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

    with mpl.rc_context({"svg.hashsalt": name}, fname=STYLE):  # the same bytes each time
        figure = Figure((WIDTH, height))
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

    axis.margins(0.08, 0.12)
    by_kind: dict[str, list[Row]] = {kind: [] for kind in MARKS}
    for row in result.rows:
        by_kind[_kind(row)].append(row)
    present = {kind: rows for kind, rows in by_kind.items() if rows}
    for kind, rows in present.items():
        _draw_marks(axis, *MARKS[kind], rows)
    # A thin line through what the loop accepted, and a ring around the final checkpoint.
    path = by_kind["dense"] + by_kind["loop"]
    axis.plot([row.params for row in path], [row.accuracy for row in path], color=LOOP, linewidth=1.2, alpha=0.55)
    final = result.final_row
    if final is not None:
        axis.plot(final.params, final.accuracy, "o", color="none", markersize=13, markeredgecolor=LOOP)
    # A task's scores are all shares, or none is.
    if all(is_share(row.first) for row in result.rows):
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")
    axis.invert_xaxis()
    _count(axis, "parameters (fewer to the right)")
    keys = [Line2D([], [], marker=MARKS[kind][1], color=MARKS[kind][0], linestyle="", label=kind) for kind in present]
    figure.legend(handles=keys, loc="outside upper left", ncols=4)


def _kind(row: Row) -> str:
    """The key of a checkpoint's mark."""
    if row.arm == "control":
        return "one-shot control"
    if row.verdict == "rejected":
        return "rejected"
    return "loop" if row.iteration else "dense"


def _draw_marks(axis: Any, colour: str, marker: str, rows: list[Row]) -> None:
    """Marks of one kind with their intervals; a score without one has a bar of no length."""
    from matplotlib.transforms import ScaledTranslation

    x = [row.params for row in rows]
    y = [row.accuracy for row in rows]
    # Rounding may put a score a little outside of its interval.
    below = [max(0.0, row.accuracy - (row.accuracy if row.low is None else row.low)) for row in rows]
    above = [max(0.0, (row.accuracy if row.high is None else row.high) - row.accuracy) for row in rows]
    bars = axis.errorbar(x, y, yerr=[below, above], fmt=marker, color=colour, elinewidth=1.3, zorder=3)
    if colour == CONTROL:
        # It ends at the loop's size: a few points to the right, its interval stays apart from the loop's.
        aside = ScaledTranslation(7 / 72, 0, axis.figure.dpi_scale_trans)
        for line in bars.get_children():
            line.set_transform(axis.transData + aside)


def _losses(figure: Any, axis: Any, result: Result) -> None:
    """Training losses against the recovery tokens of the arm; the loop's curves follow one another."""
    stride = math.ceil(sum(map(len, result.curves.values())) / MAX_POINTS)
    rejected = [row.iteration for row in result.rows if row.verdict == "rejected"]
    lines = {}  # by label, for the key
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
        points = [*curve[::stride], curve[-1]]
        x = [offset + tokens for tokens, _ in points]
        # A line of one point is not seen.
        marker = "o" if x[0] == x[-1] else ""
        (lines[label],) = axis.plot(x, [loss for _, loss in points], style, color=colour, marker=marker, label=label)
        if step.arm == "loop":
            # A dotted line with the iteration's number at its upper end.
            axis.axvline(start, color=GRID, linewidth=0.8, linestyle=(0, (2, 3)))
            axis.text(start, 1, f" {step.iteration}", transform=axis.get_xaxis_transform(), color=MUTED, va="top")
            start += step.tokens or curve[-1][0]
    # From zero, unless a loss is negative.
    losses = [loss for curve in result.curves.values() for _, loss in curve]
    axis.set_ylim(min(0, *losses), 1.1 * max(losses) or 1)
    axis.margins(x=0.02)
    _count(axis, "recovery tokens since the start of the arm")
    figure.legend(handles=list(lines.values()), loc="outside upper left", ncols=3)


def _count(axis: Any, label: str) -> None:
    """Name the horizontal axis, whose numbers are counts: `82k`."""
    axis.xaxis.set_major_formatter(lambda value, _: billions(int(value)))
    axis.set_xlabel(label)


def _speed(_figure: Any, axis: Any, result: Result) -> None:
    """How many times as fast the final model is as the dense one: a bar from 1 for each measure."""
    rows = speed_rows.rows(result.speed)
    times = [row.times for row in rows]
    colours = [BAD if value < 1 else LOOP for value in times]
    bars = axis.barh([row.label for row in rows], [value - 1 for value in times], left=1, height=0.62, color=colours)
    axis.bar_label(bars, [f"{value:.2f}" for value in times], padding=4)
    axis.axvline(1, color=MUTED, linewidth=1)  # the dense model
    # Room for the numbers at the bars' ends; the first row at the top; vertical lines.
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    axis.set_xlabel("times as fast as the dense model")
