"""The report's picture, drawn by matplotlib as inline SVG that takes its colours from the page, for dark mode too."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ptl.report.numbers import is_share
from ptl.report.result import Result, Row
from ptl.units import billions

# Colours of templates/report.mplstyle and of the lines drawn here -> CSS variables of the page.
NAMES = ("ink", "muted", "grid", "loop", "control", "bad", "paper")
VARIABLES = {f"#0{i}0{i}0{i}": name for i, name in enumerate(NAMES, 1)}
_, _, _, LOOP, CONTROL, BAD, _ = VARIABLES
STYLE = Path(__file__).parent / "templates/report.mplstyle"
SIZE = (8.4, 3.9)  # inches
# Kind of a scored checkpoint, in the order of the key -> colour and marker.
MARKS = {
    "dense": (LOOP, "s"),
    "loop": (LOOP, "o"),
    "rejected": (BAD, "X"),
    "one-shot control": (CONTROL, "D"),
}


def accuracy(result: Result) -> str:
    """Scores of the first task against parameters: an SVG element of the page, the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "accuracy"}, fname=STYLE):
        figure = Figure(SIZE)
        _draw(figure, result)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    # No prolog, metadata or style, which would be that of the page.
    svg = re.sub(r"\s*<(metadata>|style ).*?</(metadata|style)>", "", buffer.getvalue(), flags=re.S)
    _, view_box, content = re.split(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', svg, maxsplit=1)
    for colour, variable in VARIABLES.items():
        content = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", content)
    return f'<svg {view_box} aria-hidden="true" focusable="false">{content}'.rstrip()


def _draw(figure: Any, result: Result) -> None:
    """Marks with their intervals; the dense model is at the left."""
    axis = figure.subplots()
    axis.margins(0.08, 0.12)
    for kind, (colour, marker) in MARKS.items():
        rows = [row for row in result.rows if _kind(row) == kind]
        # Rounding may put a score a little outside of its interval; one without has a bar of no length.
        below = [0.0 if row.low is None else max(0.0, row.accuracy - row.low) for row in rows]
        above = [0.0 if row.high is None else max(0.0, row.high - row.accuracy) for row in rows]
        if rows:
            axis.errorbar(
                *_points(rows),
                yerr=[below, above],
                fmt=marker,
                color=colour,
                label=kind,
                zorder=3,
            )
    # A thin line through what the loop accepted, and a ring around the final checkpoint.
    path = [row for row in result.rows if _kind(row) in ("dense", "loop")]
    axis.plot(*_points(path), color=LOOP, linewidth=1.2, alpha=0.55)
    if result.final_row is not None:
        ring = _points([result.final_row])
        axis.plot(*ring, marker="o", color="none", markersize=13, markeredgecolor=LOOP)
    # A task's scores are all shares, or none is.
    if all(is_share(row.first) for row in result.rows):
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(lambda value, _: billions(int(value)))
    axis.set_xlabel("parameters (fewer to the right)")
    figure.legend(loc="outside upper left", ncols=4)


def _points(rows: list[Row]) -> tuple[list[int], list[float]]:
    return [row.params for row in rows], [row.accuracy for row in rows]


def _kind(row: Row) -> str:
    """The key of a checkpoint's mark."""
    if row.arm == "control":
        return "one-shot control"
    if row.verdict == "rejected":
        return "rejected"
    return "loop" if row.iteration else "dense"
