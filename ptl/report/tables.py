"""A result as the formatted rows of the report's tables: iterations, costs, the gate's numbers, steps."""

from __future__ import annotations

import re
from typing import Any

from ptl.address import runs_page
from ptl.report import cells
from ptl.report.result import Result, control_row, dense_row, final_row
from ptl.report.result_rows import Row

# Fields of a row's `scores`, with their label.
COSTS = {
    "params": "Parameters",
    "active_params": "Active parameters",  # of a mixture of experts
    "bytes": "Bytes",
    "flops_per_token": "FLOPs per token",
    "kv_bytes_per_token": "KV-cache bytes per token",
}


def iterations(result: Result) -> list[Row]:
    """The main table, formatted: a row for each scored checkpoint."""
    rows = result["rows"]
    final = final_row(result)
    # The drawn intervals share one scale; a score without an interval counts as 0.
    low = min(row["low"] or 0 for row in rows)
    high = max(row["high"] or 0 for row in rows)
    table = []
    for row in rows:
        line = _iteration(row)
        line["final"] = row is final
        line["bar"] = _bar(row, low, high)
        table.append(line)
    return table


def _iteration(row: Row) -> Row:
    task = cells.first_task(row)
    widths = row["widths"]
    return {
        "label": "one-shot control" if row["arm"] == "control" else iteration_label(row),
        "arm": row["arm"],
        "params": f"{row['params']:,}",
        "active": f"{row['scores']['active_params']:,}" if row["scores"]["experts"] else "",
        "removed": cells.percent(row["share_removed"]),
        # The score of the first benchmark.
        "accuracy": cells.accuracy(task),
        "interval": cells.interval(task),
        "num_items": f"{row['items']:,}",
        "tokens": f"{row['recovery_tokens']:,}",
        "verdict": row["verdict"],
        # What is left of the model, and what went in this iteration.
        "shape": cells.span(min(widths), max(widths)),
        "layers": len(widths),
        "experts": row["scores"]["experts"],
        "removed_layers": ", ".join(map(str, row["removed_layers"])),
        # For the tables further down.
        "tasks": [{**other, "score": cells.score(other)} for other in row["scores"]["tasks"]],
        "gate": gate_numbers(row["gate"]),
    }


def iteration_label(row: Row) -> str:
    """The number of a row's iteration, or `dense`."""
    return str(row["iteration"] or "dense")


def _bar(row: Row, low: float, high: float) -> list[float]:
    """Ends and middle of a row's interval, in percent of the way from `low` to `high`; empty without an interval."""
    if row["low"] is None:
        return []
    # All intervals may be a point.
    scale = 100 / (high - low or 1)
    ends = (row["low"], row["accuracy"], row["high"])
    return [round((value - low) * scale, 1) for value in ends]


def gate_numbers(gate: dict[str, Any]) -> cells.Pairs:
    """A verdict's reason and numbers, one pair of name and text for each."""
    pairs: cells.Pairs = []
    # The dense model's verdict has no numbers.
    values = {**gate, **gate.get("numbers", {})}
    for key, value in values.items():
        if key == "numbers":
            continue
        name = _spaced(key)
        # A paired comparison, a count, or a setting such as the margin.
        if isinstance(value, dict):
            pairs.append((f"against the {key}", cells.comparison(value)))
        elif type(value) is int:
            pairs.append((name, f"{value:,}"))
        else:
            pairs += cells.settings({name: value})
    return pairs


def _spaced(name: str) -> str:
    """The name of a field as words."""
    return name.replace("_", " ")


def columns(result: Result) -> list[tuple[str, Row]]:
    """The rows that are set side by side: dense, final (unless it is the dense one), control."""
    rows = {
        "Dense": dense_row(result),
        "Final": final_row(result),
        "One-shot control": control_row(result),
    }
    # Where no iteration passed, the dense model is the final one.
    if rows["Final"] is rows["Dense"]:
        del rows["Final"]
    return [(label, row) for label, row in rows.items() if row is not None]


def has_experts(result: Result) -> bool:
    """Whether the model is a mixture of experts, of whose parameters a token meets only a part."""
    return any(row["scores"]["experts"] for row in result["rows"])


def experts_removed(result: Result) -> bool:
    """Whether whole experts were removed from a mixture."""
    return len({row["scores"]["experts"] for row in result["rows"]}) > 1


def costs(result: Result) -> list[tuple[str, list[str]]]:
    """What each of dense, final and control costs: label -> one cell per column of `columns`."""
    table = []
    for key, label in COSTS.items():
        if key == "active_params" and not has_experts(result):
            continue
        dense, *others = [row["scores"][key] for _, row in columns(result)]
        # The others with how many times the dense model's cost they are.
        texts = [f"{dense:,}"]
        for number in others:
            ratio = number / dense
            texts.append(f"{number:,} ({ratio:.2f}x)")
        table.append((label, texts))
    return table


def links(result: Result) -> dict[str, str]:
    """The address of each step's MLflow run; empty without a base URL, and never another scheme than http."""
    url = result["mlflow"]["url"].rstrip("/")
    experiment = result["mlflow"]["experiment_id"]
    # The result may come from anywhere: `javascript:` would run in the page.
    is_web_address = re.match(r"https?://", url)
    addresses = {}
    for step in result["steps"]:
        page = runs_page(url, experiment, step["run_id"])
        addresses[step["step"]] = page if is_web_address else ""
    return addresses


def steps_without_record(result: Result) -> list[dict[str, str]]:
    """Steps that left no record, with the reason: not needed by the loop, then not finished by a failed control."""
    table = []
    for key in ("not_needed", "not_finished"):
        for step in result[key]:
            reason = f"{_spaced(key)}: {step['reason']}"
            table.append({"step": step["step"], "reason": reason})
    return table
