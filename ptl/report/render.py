"""A result as people read it: HTML, Markdown, the model card and the terminal's tables show the same parts of it.

The page's picture is drawn by matplotlib as inline SVG that takes its colours from the page, for dark mode too.
"""

from __future__ import annotations

import io
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptl.address import runs_page
from ptl.config.base import SUFFIXES, flat_settings
from ptl.evaluation import speed
from ptl.model.model_card import HUB_ID
from ptl.report import tables, words
from ptl.report.result import Result, Row
from ptl.report.tables import Table
from ptl.units import billions, duration

# Of the main table's rows in a terminal; `gate off` has its own colour.
COLOURS = {"accepted": "green", "rejected": "red", "control": "yellow"}
# Colours of templates/report.mplstyle and of the lines drawn here -> CSS variables of the page.
COLOUR_NAMES = ("ink", "muted", "grid", "loop", "control", "bad", "paper")
VARIABLES = {f"#0{i}0{i}0{i}": name for i, name in enumerate(COLOUR_NAMES, 1)}
_, _, _, LOOP, CONTROL, BAD, _ = VARIABLES
PLOT_STYLE = Path(__file__).parent / "templates/report.mplstyle"
PLOT_SIZE = (8.4, 3.9)  # inches
# Kind of a scored checkpoint, in the order of the key -> colour and marker.
MARKS = {
    "dense": (LOOP, "s"),
    "loop": (LOOP, "o"),
    "rejected": (BAD, "X"),
    "one-shot control": (CONTROL, "D"),
}


def render(result: Result, out: Path) -> None:
    """Write result.json, report.html, report.md and README.md (the model card): the same result, the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    pages = {
        "report.html": page("report.html.j2", result, html=True, picture=_accuracy_plot(result)),
        "report.md": page("report.j2", result, html=False),
        "README.md": f"---\n{_hub_metadata(result)}\n---\n{page('card.j2', result, html=False)}",
        "result.json": json.dumps(result.model_dump(mode="json"), indent=1, ensure_ascii=False)
        + "\n",
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")


def page(name: str, result: Result, *, html: bool, picture: str = "") -> str:
    """A template with the result and the functions that make tables and sentences of it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def markdown(value: Any) -> Any:
        return value if isinstance(value, Markup) else Markup(_markdown(value))

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        # Text is escaped as the page needs it; macros give what is written already.
        finalize=None if html else markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.globals |= {"tables": tables, "words": words, "speed": speed}
    env.filters |= {
        "duration": duration,
        "billions": billions,
        "date": _date,
        "public_name": _public_name,
    }
    settings = {
        key: value for key, value in flat_settings(result.settings).items() if value not in ("", [])
    }
    return env.get_template(name).render(
        result=result, html=html, picture=picture, settings=settings
    )


def _markdown(text: Any) -> str:
    """Text that a Markdown table cell shows as it is: no markup, no new cell, no new line."""
    # HTML first: Markdown would pass it through.
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;")
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
    return " ".join(escaped.split())


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%d %B %Y, %H:%M UTC")


def _hub_metadata(result: Result) -> str:
    """The card's metadata as YAML, as the Hugging Face hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    # The hub shows scores of what it holds: of the final checkpoint alone.
    scores = result.final_row.scores.tasks if result.final_row else ()
    scored = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.task,
            dataset_name=task.task,
            metric_type=words.metric(task),  # the hub does not know the filter
            metric_name=task.metric,
            metric_value=round(task.accuracy, 6),
        )
        for task in scores
    ]
    sources = [source["source"] for source in result.settings["training"]["sources"]]
    data = ModelCardData(
        model_name=result.name,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=result.model.base_model or None,
        license=result.model.license or None,
        license_name=result.model.license_name or None,
        license_link=result.model.license_link or None,
        tags=["pruning", "model-compression", "prune-tune-loop", "ptl"],
        datasets=list(filter(_is_hub_id, sources)) or None,
        metrics=list(dict.fromkeys(map(words.metric, scores))) or None,
        eval_results=scored or None,
    )
    return data.to_yaml()


def _is_hub_id(name: str) -> bool:
    """Return whether a name is that of a model or a data set on the hub; a local model's begins with a point."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(SUFFIXES)


def _public_name(source: str) -> str:
    """The name of training data as a published card shows it: of a local file without its folders."""
    return source if "://" in source or _is_hub_id(source) else Path(source).name


def terminal_text(result: Result, report: str, browse: str = "ptl up --ui") -> str:
    """The main table and that of each export, how the report begins, and where it (`report`) and MLflow's page are.

    `browse` is the command that opens MLflow's pages where no server has them.
    """
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    server = result.mlflow.url.rstrip("/")
    page = runs_page(server, result.mlflow.experiment_id, result.mlflow_run_id)
    with console.capture() as captured:
        console.print(f"{result.name} (seed {result.seed})", style="italic")
        console.print(_terminal_table(tables.iterations(result)))
        for export in result.exports:
            if not export.failed:
                console.print(_terminal_table(tables.export(result, export)[0]))
        console.print(words.first_line(result))
        for label, text in words.checks(result):
            console.print(f"{label}: {text}")
        # Addresses stay whole.
        console.print(f"\nReport: {report}", soft_wrap=True)
        console.print(
            f"MLflow: {page if server else f'run `{browse}` and open its address'}", soft_wrap=True
        )
    return captured.get().rstrip()


def _terminal_table(table: Table) -> Any:
    from rich import box
    from rich.table import Table as View
    from rich.text import Text

    # No padding: in 80 columns the main table has just room.
    view = View(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for heading in table.columns:
        view.add_column(
            heading, justify="right" if heading in table.numbers else "left", overflow="fold"
        )
    for row, kind in zip(table.rows, table.kinds or [""] * len(table.rows), strict=True):
        cells = [Text(cell.text) for cell in row]
        view.add_row(*cells, style=COLOURS.get(kind.rpartition(" ")[2]))
    return view


def _accuracy_plot(result: Result) -> str:
    """Scores of the first task against parameters: an SVG element of the page, the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "accuracy"}, fname=PLOT_STYLE):
        figure = Figure(PLOT_SIZE)
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
                *_points(rows), yerr=[below, above], fmt=marker, color=colour, label=kind, zorder=3
            )
    # A thin line through what the loop accepted, and a ring around the final checkpoint.
    path = [row for row in result.rows if _kind(row) in ("dense", "loop")]
    axis.plot(*_points(path), color=LOOP, linewidth=1.2, alpha=0.55)
    if result.final_row is not None:
        ring = _points([result.final_row])
        axis.plot(*ring, marker="o", color="none", markersize=13, markeredgecolor=LOOP)
    # A task's scores are all shares, or none is.
    if all(words.is_share(row.first) for row in result.rows):
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
