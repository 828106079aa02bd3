"""The lineage as a page people read: HTML, Markdown, model card and terminal table, all from one result."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptl import speed_rows
from ptl.plots import draw, short
from ptl.result import Record, Result, build, final_row, total_tokens, work_seconds
from ptl.units import duration
from ptl.view import (
    accuracy_caption,
    columns,
    costs,
    flat,
    lines,
    loss_caption,
    not_needed,
    notes,
    percent,
    table_caption,
    verdict,
)

PAPER = "Prune-Tune Loop, arXiv 2602.04919"


def write_report(records: dict[str, Record], settings: dict[str, Any], out: Path) -> Result:
    """Make the result of a run from the records of its steps and write it and its pages into `out`."""
    return render(build(records, settings), out)


def render(result: Result, out: Path) -> Result:
    """Write result.json, report.html, report.md and README.md (the model card): the same result, the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    view = _view(result)
    pages = {
        "report.html": _template("report.html.j2", html=True, **view, pictures=draw(result)),
        "report.md": _template("report.md.j2", html=False, **view),
        "README.md": _front_matter(result) + _template("model_card.md.j2", html=False, **view),
        "result.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in pages.items():
        (out / name).write_text(text, encoding="utf-8")
    return result


def print_table(result: Result, out: Path | None = None) -> None:
    """Print the verdict and the table; with `out`, also where the page lies."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(
        title=escape(f"{result['name']} (seed {result['seed']})"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1 if console.width >= 100 else 0),
    )
    for heading in ("Iteration", "Params", "Removed", "Accuracy", "Interval", "Items", "Recovery\ntokens", "Verdict"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("Iteration", "Verdict") else "right")
    colours = {"accepted": "green", "rejected": "red", "control": "yellow"}  # not tested: the terminal's own
    for row in lines(result):
        label = "control" if row["arm"] == "control" else row["label"]
        table.add_row(
            label + " [bold](final)[/]" * row["final"],
            *(row[key] for key in ("params", "removed", "accuracy", "interval", "num_items", "tokens")),
            escape(row["verdict"]),
            style=colours.get(row["verdict"]),
        )
    console.print(table)
    for sentence in [verdict(result), *notes(result)]:
        console.print(escape(sentence), highlight=False)
    if out is not None:
        console.print(f"\nReport: {escape(str((out / 'report.html').resolve()))}", highlight=False, soft_wrap=True)
    where = result["mlflow"]["url"] or "run `ptl ui` and open the address it prints"
    console.print(f"MLflow: {escape(where)}", highlight=False)


def _view(result: Result) -> dict[str, Any]:
    tasks = list(dict.fromkeys(t["task"] for row in result["rows"] for t in row["scores"]["tasks"]))
    started = result["started"]
    return {
        "result": result,
        "verdict": verdict(result),
        "notes": notes(result),
        "not_needed": not_needed(result),
        "table_caption": table_caption(result),
        "accuracy_caption": accuracy_caption(result),
        "loss_caption": loss_caption(result),
        "layers_removed": any(row.get("removed_layers") for row in result["rows"]),
        "control_failed": result.get("control_failed") or "",
        "steps_without_record": _without_record(result),
        "lines": lines(result),
        "task_names": tasks,
        "columns": [name for name, _ in columns(result)],
        "costs": costs(result),
        "speed_rows": [row.cells for row in speed_rows.rows(result.get("speed") or {})],
        "speed_setting": speed_rows.setting(result.get("speed") or {}),
        "speed_disturbed": speed_rows.disturbance(result.get("speed") or {}),
        "settings": flat(result["settings"]),
        "started": datetime.fromtimestamp(started, UTC).strftime("%d %B %Y, %H:%M UTC") if started else "",
        "work_seconds": work_seconds(result),
        "wall_seconds": result.get("wall_seconds"),
        "loop_tokens": total_tokens(result, "loop"),
        "level": f"{result['confidence'] * 100:g} %",
        "links": {step["step"]: _link(result, step["run_id"]) for step in result["steps"]},
        "paper": PAPER,
    }


def _without_record(result: Result) -> list[dict[str, str]]:
    """Steps that left no record, in words: those the loop did not need, then those a failed control did not finish."""
    return [
        {"step": step["step"], "words": f"{state}: {step['reason']}"}
        for state, key in (("not needed", "not_needed"), ("not finished", "not_finished"))
        for step in result.get(key) or ()
    ]


def _link(result: Result, run_id: str) -> str:
    """The address of an MLflow run; empty without a base URL, and never another scheme than http."""
    url, experiment = result["mlflow"]["url"], result["mlflow"]["experiment_id"]
    if not run_id or not re.match(r"https?://", url):
        return ""
    return f"{url.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def _template(name: str, *, html: bool, **view: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=html, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    env.filters |= {"md": _md, "percent": percent, "duration": duration, "short": short, "digest": _digest}
    return env.get_template(name).render(**view)


def _md(text: Any) -> str:
    """Text that a Markdown table cell shows as it is: no markup, no new cell, no new line."""
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", str(text).replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(text.split())


def _digest(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _hub_name(source: str) -> str:
    """A hub id as it is; of a local path the last two parts, in the form the hub's metadata allows."""
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        return source
    return re.sub(r"[^\w.-]+", "-", "-".join(Path(source).parts[-2:])).strip("-.") or "unknown"


def _front_matter(result: Result) -> str:
    """The model card's metadata as the Hugging Face hub reads it."""
    import yaml

    final, training = final_row(result), result["settings"].get("training", {})
    tasks = final["scores"]["tasks"] if final else []
    card: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(result["model"]["model"]),
        "tags": ["pruning", "model-compression", "prune-tune-loop", "ptl"],
    }
    if result["model"]["license"]:
        card["license"] = result["model"]["license"]
    if training.get("sources"):
        card["datasets"] = [_hub_name(source["source"]) for source in training["sources"]]
    if tasks:
        names = [t.get("metric", "accuracy") for t in tasks]  # metric,filter: the hub knows the metric alone
        metrics = [name.partition(",")[0] for name in names]
        card["metrics"] = list(dict.fromkeys(metrics))
        results = [
            {
                "task": {"type": "text-generation", "name": "Text generation"},
                "dataset": {"type": _hub_name(t["task"]), "name": t["task"]},
                "metrics": [{"type": metric, "name": name, "value": round(t["accuracy"], 6)}],
            }
            for t, metric, name in zip(tasks, metrics, names, strict=True)
        ]
        card["model-index"] = [{"name": result["name"], "results": results}]
    return "---\n" + yaml.safe_dump(card, sort_keys=False, allow_unicode=True) + "---\n"
