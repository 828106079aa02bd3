"""A matplotlib figure -> inline SVG that takes its colours from the page, for dark mode too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

# Paints a result on a matplotlib figure, in the wide version or the narrow one.
Painter = Callable[[Any, dict[str, Any], bool], None]

# Each colour stands for a CSS variable of the page and is replaced by it after drawing.
NAMES = ("ink", "muted", "grid", "loop", "control", "bad", "paper")
VARIABLES = {f"#0{i}0{i}0{i}": name for i, name in enumerate(NAMES, 1)}
INK, MUTED, GRID, LOOP, CONTROL, BAD, PAPER = VARIABLES
WIDE, NARROW = 8.4, 3.9  # inches of a figure's width: on a desktop and on a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, searchable, readable aloud
    "text.parse_math": False,  # a `$` in a name is not mathematics
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same layout on every machine
    "font.size": 9.5,
    "text.color": INK,
    # Axes: no frame, a title at the left.
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    # Horizontal lines only, below the data.
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


def set_size(figure: Any, wide: bool, height: float) -> None:
    """Make a figure as wide as the page, and `height` inches high."""
    figure.set_size_inches(WIDE if wide else NARROW, height)


def add_key(figure: Any, lines: list[Any], *, columns: int, gap: float) -> None:
    """A key of the lines or marks above the plot; `gap` is the space before a label, in font sizes."""
    figure.legend(
        handles=lines,
        loc="outside upper left",
        ncols=columns,
        handletextpad=gap,
        columnspacing=1.2,
    )


def picture(paint: Painter, result: dict[str, Any], wide: bool, name: str) -> str:
    """What `paint` draws on a figure, as an element of the page; `name` makes its ids unique there."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # the same bytes each time
        figure = Figure(layout="constrained")
        paint(figure, result, wide)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return inline(buffer.getvalue(), name)


def inline(svg: str, name: str) -> str:
    """An SVG file -> an element of the page: no prolog, metadata or page-wide style; own ids, CSS colours."""
    svg = re.sub(r"\s*<(metadata>|style ).*?</(metadata|style)>", "", svg, flags=re.S)
    _, view_box, _, content = re.split(r'<svg[^>]*(viewBox="[^"]*")([^>]*)>', svg, maxsplit=1)
    # Ids, and what refers to them.
    content = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', content)
    content = re.sub(r"url\(#", f"url(#{name}-", content)
    content = re.sub(r'xlink:href="#', f'href="#{name}-', content)
    # In tags only, so that numbers on the axes keep their digits.
    content = re.sub(r"<[^>]+>", _rounded, content)
    for colour, variable in VARIABLES.items():
        content = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", content)
    return f'<svg {view_box} aria-hidden="true" focusable="false">{content}'.rstrip()


def _rounded(tag: re.Match[str]) -> str:
    """A tag with its numbers to a tenth of a point, which is finer than a screen shows."""
    return re.sub(r"(\d\.\d)\d{2,}", r"\1", tag.group())
