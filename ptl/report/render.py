"""The lineage as a page people read: HTML, Markdown, model card and terminal table, all from one result."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.address import runs_page
from ptl.evaluation import speed_rows
from ptl.report import evidence, exports, limits, side_by_side, tables, wording
from ptl.report.answer import answer
from ptl.report.cells import level, settings, short
from ptl.report.model_card import front_matter
from ptl.report.plots import draw
from ptl.report.result import Result, build, total_tokens, work_seconds
from ptl.report.result_rows import Records
from ptl.report.side_by_side import in_cell
from ptl.units import duration

if TYPE_CHECKING:
    from rich.table import Table

PAPER = "Prune-Tune Loop, arXiv 2602.04919"
WIDE = 100  # columns of a terminal from which cells of the table have space between them
# Of the table's rows, by their verdict; `gate off` has the terminal's own colour.
COLOURS = {"accepted": "green", "rejected": "red", "control": "yellow"}


def write_report(records: Records, settings: dict[str, Any], out: Path) -> Result:
    """Make the result of a run from the records of its steps and write it and its pages into `out`."""
    return render(build(records, settings), out)


def render(result: Result, out: Path) -> Result:
    """Write result.json, report.html, report.md and README.md (the model card): the same result, the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    # All pages show the same sentences and tables; only the HTML has pictures.
    variables = _variables(result)
    only_html = {"pictures": draw(result), "table_caption": wording.table_caption(result)}
    pages = {
        "report.html": _template("report.html.j2", variables | only_html),
        "report.md": _template("report.md.j2", variables),
        "README.md": front_matter(result) + _template("model_card.md.j2", variables),
        "result.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    return result


def terminal_text(result: Result, report: str) -> str:
    """The table, the verdict, and where the report (`report` says it) and MLflow's page are."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    # In 80 columns the table has just room.
    padding = 1 if console.width >= WIDE else 0
    with console.capture() as captured:
        console.print(_terminal_table(result, padding))
        for sentence in [f"{answer(result).text}.", wording.verdict(result), *wording.notes(result)]:
            console.print(escape(sentence), highlight=False)
        for line in (f"\nReport: {report}", f"MLflow: {_mlflow_page(result)}"):
            console.print(escape(line), highlight=False, soft_wrap=True)
    return captured.get().rstrip()


def _mlflow_page(result: Result) -> str:
    server = result["mlflow"]["url"]
    if not server:
        return "run `ptl up --ui` and open the address it prints"
    return runs_page(server.rstrip("/"), result["mlflow"]["experiment_id"], result["mlflow_run_id"])


def _terminal_table(result: Result, padding: int) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(f"{result['name']} (seed {result['seed']})"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, padding),
    )
    table.add_column("Iteration", no_wrap=True)
    for heading in ("Params", "Removed", "Accuracy", "Interval", "Items", "Recovery\ntokens"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("Verdict", no_wrap=True)
    for row in tables.iterations(result):
        # The page says `one-shot control`, which is too long here.
        label = row["label"].removeprefix("one-shot ")
        if row["final"]:
            label += " [bold](final)[/]"
        table.add_row(
            label,
            row["params"],
            row["removed"],
            row["accuracy"],
            row["interval"],
            row["num_items"],
            row["tokens"],
            escape(row["verdict"]),
            style=COLOURS.get(row["verdict"]),
        )
    return table


def _variables(result: Result) -> dict[str, Any]:
    """What the templates show."""
    speed = result["speed"]
    return {
        "result": result,
        "paper": PAPER,
        # Sentences.
        "answer": answer(result),
        "verdict": wording.verdict(result),
        "limits": limits.sentences(result),
        "remarks": wording.remarks(result),
        "not_needed": wording.not_needed(result),
        "table_caption": wording.table_caption(result, drawn=False),
        "accuracy_caption": wording.accuracy_caption(result),
        "loss_caption": wording.loss_caption(result),
        "speed_setting": speed_rows.setting(speed),
        "speed_disturbed": speed_rows.disturbance(speed),
        "evidence_caption": evidence.caption(result),
        # Tables.
        "evidence": evidence.groups(result),
        "checks": evidence.checks(result),
        "changed": side_by_side.kinds(result),
        "iterations": tables.iterations(result),
        # All checkpoints were scored on the same benchmarks.
        "task_names": [task["task"] for task in result["rows"][0]["scores"]["tasks"]],
        "has_experts": tables.has_experts(result),
        "experts_removed": tables.experts_removed(result),
        "layers_removed": any(row["removed_layers"] for row in result["rows"]),
        "columns": [name for name, _ in tables.columns(result)],
        "costs": tables.costs(result),
        "exports": exports.tables(result),
        "speed_rows": [row.cells for row in speed_rows.rows(speed)],
        "steps_without_record": tables.steps_without_record(result),
        "links": tables.links(result),
        "settings": settings(result["settings"]),
        # Numbers.
        "started": _date(result["started"]),
        "work_seconds": work_seconds(result),
        "loop_tokens": total_tokens(result, "loop"),
        "level": level(result),
    }


def _date(seconds: float) -> str:
    """Unix time as a date and hour."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%d %B %Y, %H:%M UTC")


def _template(name: str, variables: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # StrictUndefined: a result of another version fails instead of leaving gaps.
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters |= {"md": _md, "duration": duration, "short": short, "in_cell": in_cell, "digest": _digest}
    return env.get_template(name).render(variables)


def _md(text: Any) -> str:
    """Text that a Markdown table cell shows as it is: no markup, no new cell, no new line."""
    # HTML first: Markdown would pass it through.
    escaped = str(text).replace("&", "&amp;")
    escaped = escaped.replace("<", "&lt;")
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
    return " ".join(escaped.split())


def _digest(digest: str) -> str:
    """The beginning of a digest, enough to distinguish the checkpoints of a run."""
    return digest.removeprefix("sha256:")[:12]
