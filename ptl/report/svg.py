"""A matplotlib figure -> inline SVG that takes its colours from the page, for dark mode too."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

# Each colour stands for a CSS variable of the page and is replaced by it after drawing.
INK, MUTED, GRID, LOOP, CONTROL, BAD, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 8))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    LOOP: "loop",
    CONTROL: "control",
    BAD: "bad",
    PAPER: "paper",
}
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


def set_size(figure: Any, wide: bool, *, wide_height: float, narrow_height: float) -> None:
    """Make a figure as wide as the page, and so many inches high."""
    width = WIDE if wide else NARROW
    height = wide_height if wide else narrow_height
    figure.set_size_inches(width, height)


def add_key(figure: Any, lines: list[Any], *, columns: int, gap: float) -> None:
    """A key of the lines or marks above the plot; `gap` is the space before a label, in font sizes."""
    figure.legend(
        handles=lines,
        loc="outside upper left",
        ncols=columns,
        handletextpad=gap,
        columnspacing=1.2,
    )


def picture(draw: Callable[[Any], None], name: str) -> str:
    """What `draw` paints on a figure, as an element of the page; `name` makes its ids unique there."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {**STYLE, "svg.hashsalt": name}  # the same bytes each time
    with mpl.rc_context(style):
        figure = Figure(layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return inline(buffer.getvalue(), name)


def inline(svg: str, name: str) -> str:
    """An SVG file -> an element of the page: no prolog, metadata or page-wide style; own ids, CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"\s*<style .*?</style>", "", svg, flags=re.S)
    head, content = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    # Ids, and what refers to them.
    content = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', content)
    content = re.sub(r"url\(#", f"url(#{name}-", content)
    content = re.sub(r'xlink:href="#', f'href="#{name}-', content)
    # In tags only, so that numbers on the axes keep their digits.
    content = re.sub(r"<[^>]+>", _rounded, content)
    for colour, variable in VARIABLES.items():
        content = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", content)
    view_box = box.group() if box else ""
    return f'<svg {view_box} aria-hidden="true" focusable="false">{content}'.rstrip()


def _rounded(tag: re.Match[str]) -> str:
    """A tag with its numbers to a tenth of a point, which is finer than a screen shows."""
    return re.sub(r"(\d\.\d)\d{2,}", r"\1", tag.group())
