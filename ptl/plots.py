"""The report's pictures: a result -> inline SVG that takes its colours from the page, for dark mode too."""

from __future__ import annotations

import io
import re
from typing import Any

from ptl import speed_rows
from ptl.result import Result, final_row

# Each colour stands for a CSS variable of the page and is replaced by it after drawing.
INK, MUTED, GRID, LOOP, CONTROL, BAD, PAPER = (f"#0{i}0{i}0{i}" for i in range(1, 8))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", LOOP: "loop", CONTROL: "control", BAD: "bad", PAPER: "paper"}
MARGIN = 0.12  # of the scores' range, above and below them
MAX_POINTS = 4000  # of all loss curves together: keeps the page far below 1 MB
RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, searchable, readable aloud
    "text.parse_math": False,  # a `$` in a name is not mathematics
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same layout on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
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
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def draw(result: Result) -> dict[str, dict[str, str]]:
    """Every picture that the result has data for: name -> {"wide": svg, "narrow": svg} (desktop and phone)."""
    pictures = {"accuracy": _accuracy, "loss": _losses, "widths": _widths, "tasks": _tasks, "speed": _speed}
    wanted = {
        "accuracy": bool(result["rows"]),
        "loss": bool(result["curves"]),
        "widths": any(row["widths"] for row in result["rows"]),
        "tasks": any(len(row["scores"]["tasks"]) > 1 for row in result["rows"]),
        "speed": bool(speed_rows.rows(result.get("speed") or {})),
    }
    return {
        name: {size: _picture(paint, result, name, size) for size in ("wide", "narrow")}
        for name, paint in pictures.items()
        if wanted[name]
    }


def is_share(task: dict[str, Any]) -> bool:
    """Whether a score is a share of items, shown in percent; perplexities and other means have no interval."""
    return task.get("low") is not None and 0 <= task["accuracy"] <= 1


def begins_at_zero(rows: list[dict[str, Any]]) -> bool:
    """Whether the axis of the scores reaches down to zero, with its margin."""
    ends = [row[end] for row in rows for end in ("low", "accuracy", "high") if row[end] is not None]
    return min(ends) - MARGIN * (max(ends) - min(ends)) <= 0


def short(number: float) -> str:
    """A count in three or four characters: 950, 82 k, 1.23 M, 7 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _picture(paint: Any, result: Result, name: str, size: str) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ident = f"{name}-{size}"
    with mpl.rc_context(RC | {"svg.hashsalt": ident}):
        figure = Figure(layout="constrained")
        paint(figure, result, size == "wide")
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _inline(buffer.getvalue(), ident)


def _inline(svg: str, ident: str) -> str:
    """An SVG file -> an element of the page: no prolog, metadata or page-wide style; own ids, CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"\s*<style .*?</style>", "", svg, flags=re.S)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{ident}-\1"', body)
    body = re.sub(r"url\(#", f"url(#{ident}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{ident}-', body)
    # a tenth of a point is finer than a screen shows; in tags only, so that numbers on the axes keep their digits
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d{2,}", r"\1", tag.group()), body)
    for colour, variable in VARIABLES.items():
        body = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{variable})", body)
    return f'<svg {box.group() if box else ""} aria-hidden="true" focusable="false">{body}'.rstrip()


def _mark(row: dict[str, Any]) -> tuple[str, str, bool]:
    """Colour and marker of a row, and whether it is drawn a little aside."""
    if row["arm"] == "control":
        return CONTROL, "D", True
    if row["verdict"] == "rejected":
        return BAD, "X", False
    return LOOP, "o" if row["iteration"] else "s", False


def _points(axis: Any, result: Result, task: str | None) -> None:
    """One task's scores against parameters; the dense model is on the left, the smallest on the right."""
    from matplotlib.transforms import ScaledTranslation

    axis.margins(0.08, MARGIN)
    found: list[tuple[dict[str, Any], dict[str, Any]]]
    found = [(r, t) for r in result["rows"] for t in r["scores"]["tasks"] if task in (None, t["task"])]
    if task is None:
        found = [(row, row["scores"]["tasks"][0]) for row in result["rows"]]
    for colour, marker, aside in sorted({_mark(row) for row, _ in found}):
        own = [(row["params"], t) for row, t in found if _mark(row) == (colour, marker, aside)]
        x, y = [params for params, _ in own], [t["accuracy"] for _, t in own]
        low, high = ([t[end] if t[end] is not None else t["accuracy"] for _, t in own] for end in ("low", "high"))
        reach = [
            [max(0.0, v - end) for v, end in zip(y, low, strict=True)],
            [max(0.0, end - v) for v, end in zip(y, high, strict=True)],
        ]
        axis.update_datalim([*zip(x, low, strict=True), *zip(x, high, strict=True)])
        # The control ends at the loop's size: a few points aside, its interval stays apart from the loop's.
        place = axis.transData + ScaledTranslation(7 / 72 * aside, 0, axis.figure.dpi_scale_trans)
        given: Any = {"transform": place} if aside else {}
        axis.errorbar(x, y, yerr=reach, fmt="none", ecolor=colour, elinewidth=1.3, capsize=3, **given)
        axis.plot(x, y, marker, color=colour, markersize=8 if marker == "X" else 6, markeredgecolor=PAPER, **given)
    final = final_row(result)
    ring = [(row["params"], t["accuracy"]) for row, t in found if row == final]
    axis.plot([x for x, _ in ring], [y for _, y in ring], "o", color="none", markersize=13, markeredgecolor=LOOP)
    path = [(r["params"], t["accuracy"]) for r, t in found if r["arm"] == "loop" and r["verdict"] != "rejected"]
    axis.plot([x for x, _ in path], [y for _, y in path], color=LOOP, linewidth=1.2, alpha=0.55, zorder=1)
    if all(is_share(t) for _, t in found):
        axis.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")
    axis.autoscale_view()
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(lambda value, _: short(value))


def _key(figure: Any, result: Result, *, wide: bool) -> None:
    """A key of the marks that occur, above the plot."""
    from matplotlib.lines import Line2D

    rows = result["rows"]
    marks = [
        ("dense", "s", LOOP, any(r["iteration"] == 0 for r in rows)),
        ("loop", "o", LOOP, any(r["iteration"] and r["arm"] == "loop" and r["verdict"] != "rejected" for r in rows)),
        ("rejected", "X", BAD, any(r["verdict"] == "rejected" for r in rows)),
        ("one-shot control", "D", CONTROL, any(r["arm"] == "control" for r in rows)),
    ]
    lines = [Line2D([], [], marker=m, color=c, linestyle="", label=name) for name, m, c, there in marks if there]
    figure.legend(handles=lines, loc="outside upper left", ncols=4 if wide else 2, handletextpad=0.2, columnspacing=1.2)


def _accuracy(figure: Any, result: Result, wide: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches((8.4, 3.9) if wide else (3.9, 3.7))
    axis = figure.subplots()
    _points(axis, result, None)
    axis.xaxis.set_major_locator(MaxNLocator(7 if wide else 4))
    axis.set_xlabel("parameters (fewer to the right)")
    _key(figure, result, wide=wide)


def _tasks(figure: Any, result: Result, wide: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    tasks = list(dict.fromkeys(t["task"] for row in result["rows"] for t in row["scores"]["tasks"]))
    columns = min(3, len(tasks)) if wide else 1
    lines = -(-len(tasks) // columns)
    figure.set_size_inches((8.4, 2.3 * lines + 0.4) if wide else (3.9, 2.3 * lines + 0.6))
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, task in zip(axes, tasks, strict=False):
        _points(axis, result, task)
        axis.set_title(task if len(task) <= 28 else task[:27] + "…")
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.yaxis.set_major_locator(MaxNLocator(4))
    for axis in list(figure.axes)[len(tasks) :]:
        axis.set_axis_off()
    _key(figure, result, wide=wide)


def _losses(figure: Any, result: Result, wide: bool) -> None:
    from matplotlib.lines import Line2D

    figure.set_size_inches((8.4, 3.3) if wide else (3.9, 3.2))
    axis = figure.subplots()
    rejected = {row["iteration"] for row in result["rows"] if row["arm"] == "loop" and row["verdict"] == "rejected"}
    most, start, arms = max(20, MAX_POINTS // len(result["curves"])), 0, {}
    for step in result["steps"]:
        curve = result["curves"].get(step["step"])
        if not curve:
            continue
        control = step["arm"] == "control"
        offset = 0 if control else start
        curve = curve[:: -(-len(curve) // most)] + curve[-1:]
        bad = not control and step["iteration"] in rejected
        colour, label = (CONTROL, "one-shot control") if control else (BAD, "rejected") if bad else (LOOP, "loop")
        style: Any = "--" if bad else "-"
        mark = "o" if len({t for t, _ in curve}) == 1 else ""  # a line of one point is not seen
        x, y = [offset + t for t, _ in curve], [loss for _, loss in curve]
        axis.plot(x, y, marker=mark, color=colour, linewidth=1.5, ls=style, markersize=4)
        arms[label] = Line2D([], [], color=colour, linestyle=style, label=label)
        if not control:
            axis.axvline(offset, color=GRID, linewidth=0.8, linestyle=(0, (2, 3)))
            axis.annotate(
                str(step["iteration"]), (offset, 1), (3, -2), xycoords=("data", "axes fraction"), color=MUTED,
                textcoords="offset points", va="top", fontsize=8.5,
            )  # fmt: skip
            start += step["tokens"] or curve[-1][0]
    axis.xaxis.set_major_formatter(lambda value, _: short(value))
    axis.set_xlabel("recovery tokens since the start of the arm")
    axis.margins(0.02, 0.08)
    losses = [loss for curve in result["curves"].values() for _, loss in curve]
    axis.set_ylim(min(0, *losses), max(losses) * 1.1 or 1)
    figure.legend(handles=list(arms.values()), loc="outside upper left", ncols=3, handletextpad=0.5, columnspacing=1.2)


def _widths(figure: Any, result: Result, wide: bool) -> None:
    """A skyline per checkpoint: as many towers as layers, as high as each layer's FFN is wide."""
    rows = [row for row in result["rows"] if row["widths"]]
    figure.set_size_inches((8.4, 2.7) if wide else (3.9, 2.7))
    axis = figure.subplots()
    layers = max(len(row["widths"]) for row in rows)
    gap, ticks = max(1.0, layers * 0.3), []
    for i, row in enumerate(rows):
        left = i * (layers + gap)
        colour = _mark(row)[0]
        if layers * len(rows) <= 500:  # towers with a gap between them
            heights = [h for w in row["widths"] for h in (w, 0)]
            edges = [left] + [left + k + x for k in range(len(row["widths"])) for x in (0.86, 1)]
        else:  # one outline: equal neighbours are one step, which keeps the page small
            steps = [(k, w) for k, w in enumerate(row["widths"]) if k == 0 or w != row["widths"][k - 1]]
            heights, edges = [w for _, w in steps], [left + k for k, _ in steps] + [left + len(row["widths"])]
        axis.stairs(heights, edges, fill=True, color=colour, alpha=0.85)
        ticks.append((left + layers / 2, "control" if row["arm"] == "control" else str(row["iteration"] or "dense")))
    axis.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    axis.tick_params(axis="x", length=0)
    if len(rows) > (12 if wide else 5):
        axis.tick_params(axis="x", labelrotation=90 if len(rows) > 20 else 60)
    axis.set_xlabel("iteration; one bar for each layer")


def _speed(figure: Any, result: Result, wide: bool) -> None:
    """How many times as fast the final model is as the dense one: a bar from 1 for each measure."""
    from matplotlib.ticker import MaxNLocator

    rows = speed_rows.rows(result["speed"])
    figure.set_size_inches((8.4, 0.6 + 0.3 * len(rows)) if wide else (3.9, 0.6 + 0.32 * len(rows)))
    axis = figure.subplots()
    times = [row.times for row in rows]
    colours = [LOOP if value >= 1 else BAD for value in times]
    axis.barh(range(len(rows)), [value - 1 for value in times], left=1, height=0.62, color=colours)
    for place, value in enumerate(times):
        side = 1 if value >= 1 else -1
        axis.annotate(
            f"{value:.2f}", (value, place), (4 * side, 0), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right", color=INK, fontsize=8.5,
        )  # fmt: skip
    axis.axvline(1, color=MUTED, linewidth=1)
    low, high = min(1.0, *times), max(1.0, *times)
    room = (0.1 if wide else 0.25) * max(high - low, 0.1)  # for the numbers at the bars' ends
    axis.set_xlim(low - (room if low < 1 else room / 4), high + room)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.grid(True, axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(6 if wide else 3, steps=[1, 2, 2.5, 5, 10]))  # 1 is among the ticks
    axis.set_xlabel("times as fast as the dense model")
