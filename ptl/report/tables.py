"""A result as the formatted rows of the report's tables: iterations, costs, the gate's numbers, steps."""

from __future__ import annotations

import re
from typing import Any

from ptl.report import cells
from ptl.report.result import Result, control_row, dense_row, final_row
from ptl.report.result_rows import Row

# Fields of a row's `scores`, with their label.
COSTS = {
    "params": "Parameters",
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
    tasks = row["scores"]["tasks"]
    label = iteration_label(row)
    return {
        "label": "one-shot control" if row["arm"] == "control" else label,
        "arm": row["arm"],
        "params": f"{row['params']:,}",
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
        "removed_layers": ", ".join(map(str, row["removed_layers"])),
        # For the tables further down.
        "tasks": [_task_cells(other) for other in tasks],
        "gate": gate_numbers(row["gate"]),
    }


def iteration_label(row: Row) -> str:
    """The number of a row's iteration, or `dense`."""
    return str(row["iteration"] or "dense")


def _task_cells(task: cells.Task) -> Row:
    """A task's score, formatted, beside its other fields."""
    return {**task, "score": cells.score(task)}


def _bar(row: Row, low: float, high: float) -> list[float]:
    """Ends and middle of a row's interval, in percent of the way from `low` to `high`; empty without an interval."""
    if row["low"] is None:
        return []
    # All intervals may be a point.
    scale = 100 / (high - low or 1)
    bar = []
    for key in ("low", "accuracy", "high"):
        distance = row[key] - low
        percent = round(distance * scale, 1)
        bar.append(percent)
    return bar


def gate_numbers(gate: dict[str, Any]) -> cells.Pairs:
    """A verdict's reason and numbers, one pair of name and text for each."""
    # The dense model's verdict has no numbers.
    values = dict(gate)
    numbers = values.pop("numbers", {})
    values.update(numbers)
    pairs: cells.Pairs = []
    for key, value in values.items():
        name = _spaced(key)
        # A paired comparison, a count, or a setting such as the margin.
        if isinstance(value, dict):
            text = cells.comparison(value)
            pairs.append((f"against the {key}", text))
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
    # Any but the dense one may be missing.
    dense = dense_row(result)
    final = final_row(result)
    control = control_row(result)
    side_by_side = [("Dense", dense)]
    # Where no iteration passed, the dense model is the final one.
    if final is not None and final is not dense:
        side_by_side.append(("Final", final))
    if control is not None:
        side_by_side.append(("One-shot control", control))
    return side_by_side


def costs(result: Result) -> list[tuple[str, list[str]]]:
    """What each of dense, final and control costs: label -> one cell per column of `columns`."""
    models = [row["scores"] for _, row in columns(result)]
    table = []
    for key, label in COSTS.items():
        numbers = [scores[key] for scores in models]
        texts = _with_ratios(numbers)
        table.append((label, texts))
    return table


def _with_ratios(numbers: list[int]) -> list[str]:
    """Numbers, all but the first with how many times the first they are."""
    # The first is the dense model's.
    first, *others = numbers
    texts = [f"{first:,}"]
    for number in others:
        ratio = number / first
        texts.append(f"{number:,} ({ratio:.2f}x)")
    return texts


def links(result: Result) -> dict[str, str]:
    """The address of each step's MLflow run; empty without a base URL, and never another scheme than http."""
    url = result["mlflow"]["url"].rstrip("/")
    experiment = result["mlflow"]["experiment_id"]
    # The result may come from anywhere: `javascript:` would run in the page.
    is_web_address = re.match(r"https?://", url)
    addresses = {}
    for step in result["steps"]:
        run_id = step["run_id"]
        address = f"{url}/#/experiments/{experiment}/runs/{run_id}"
        addresses[step["step"]] = address if is_web_address else ""
    return addresses


def steps_without_record(result: Result) -> list[dict[str, str]]:
    """Steps that left no record, with the reason: not needed by the loop, then not finished by a failed control."""
    table = []
    for key in ("not_needed", "not_finished"):
        state = _spaced(key)
        for step in result[key]:
            reason = f"{state}: {step['reason']}"
            table.append({"step": step["step"], "reason": reason})
    return table
