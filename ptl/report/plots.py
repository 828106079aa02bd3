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
    from matplotlib.lines import Line2D

    axis = figure.subplots()
    axis.margins(0.08, 0.12)
    by_kind: dict[str, list[Row]] = {kind: [] for kind in MARKS}
    for row in result.rows:
        by_kind[_kind(row)].append(row)
    keys = []
    for kind, rows in by_kind.items():
        colour, marker = MARKS[kind]
        if rows:
            _draw_marks(axis, colour, marker, rows)
            keys.append(Line2D([], [], marker=marker, color=colour, linestyle="", label=kind))
    # A thin line through what the loop accepted, and a ring around the final checkpoint.
    path = by_kind["dense"] + by_kind["loop"]
    axis.plot(
        [row.params for row in path],
        [row.accuracy for row in path],
        color=LOOP,
        linewidth=1.2,
        alpha=0.55,
    )
    final = result.final_row
    if final is not None:
        axis.plot(final.params, final.accuracy, "o", color="none", markersize=13, markeredgecolor=LOOP)
    # A task's scores are all shares, or none is.
    if all(is_share(row.first) for row in result.rows):
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(lambda value, _: billions(int(value)))
    axis.set_xlabel("parameters (fewer to the right)")
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

    scores = [row.accuracy for row in rows]
    # Rounding may put a score a little outside of its interval.
    below = [0.0 if row.low is None else max(0.0, row.accuracy - row.low) for row in rows]
    above = [0.0 if row.high is None else max(0.0, row.high - row.accuracy) for row in rows]
    params = [row.params for row in rows]
    bars = axis.errorbar(
        params,
        scores,
        yerr=[below, above],
        fmt=marker,
        color=colour,
        elinewidth=1.3,
        zorder=3,
    )
    if colour == CONTROL:
        # It ends at the loop's size: a few points to the right, its interval stays apart from the loop's.
        aside = ScaledTranslation(7 / 72, 0, axis.figure.dpi_scale_trans)
        for line in bars.get_children():
            line.set_transform(axis.transData + aside)
