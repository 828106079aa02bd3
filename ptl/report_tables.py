"""A result as the formatted rows of the report's tables: iterations, costs, the gate's numbers, steps."""

from __future__ import annotations

import re
from typing import Any

from ptl import cells
from ptl.cells import first_task, percent
from ptl.result import Result, Row, control_row, dense_row, final_row

COSTS = {
    "params": "Parameters",
    "bytes": "Bytes",
    "flops_per_token": "FLOPs per token",
    "kv_bytes_per_token": "KV-cache bytes per token",
}


def iterations(result: Result) -> list[dict[str, Any]]:
    """The main table, formatted: a row for each scored checkpoint."""
    rows = result["rows"]
    final = final_row(result)
    # The drawn intervals share one scale.
    low = min(row["low"] or 0 for row in rows)
    high = max(row["high"] or 0 for row in rows)
    table = []
    for row in rows:
        line = _iteration(row)
        line["final"] = row is final
        line["bar"] = _bar(row, low, high)
        table.append(line)
    return table


def _iteration(row: Row) -> dict[str, Any]:
    task = first_task(row)
    widths = row["widths"]
    return {
        "label": "one-shot control" if row["arm"] == "control" else iteration_label(row),
        "arm": row["arm"],
        "params": f"{row['params']:,}",
        "removed": percent(row["share_removed"]),
        "accuracy": cells.accuracy(task),
        "interval": cells.interval(task),
        "num_items": f"{row['items']:,}",
        "tokens": f"{row['recovery_tokens']:,}",
        "verdict": row["verdict"],
        "shape": cells.span(min(widths), max(widths)),
        "layers": len(widths),
        "removed_layers": ", ".join(map(str, row["removed_layers"])),
        "tasks": [_task_cells(task) for task in row["scores"]["tasks"]],
        "gate": gate_numbers(row["gate"]),
    }


def iteration_label(row: Row) -> str:
    """The number of a row's iteration, or `dense`."""
    return str(row["iteration"] or "dense")


def _task_cells(task: dict[str, Any]) -> dict[str, Any]:
    return {**task, "score": cells.score(task)}


def _bar(row: Row, low: float, high: float) -> list[float]:
    """Ends and middle of a row's interval, in percent of the way from `low` to `high`; empty without an interval."""
    if row["low"] is None:
        return []
    scale = 100 / (high - low or 1)
    distances = [row[key] - low for key in ("low", "accuracy", "high")]
    return [round(distance * scale, 1) for distance in distances]


def gate_numbers(gate: dict[str, Any]) -> list[tuple[str, str]]:
    """A verdict's reason and numbers, one pair of name and text for each."""
    values = dict(gate)
    values.update(values.pop("numbers", {}))
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs.append((f"against the {key}", cells.comparison(value)))
        elif type(value) is int:  # a bool is none
            pairs.append((_spaced(key), f"{value:,}"))
        else:
            pairs += [(_spaced(name), text) for name, text in cells.settings({key: value})]
    return pairs


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def columns(result: Result) -> list[tuple[str, Row]]:
    """The rows that are set side by side: dense, final (unless it is the dense one), control."""
    dense, final, control = dense_row(result), final_row(result), control_row(result)
    side_by_side = [("Dense", dense)]
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
        table.append((label, _with_ratios(numbers)))
    return table


def _with_ratios(numbers: list[int]) -> list[str]:
    """Numbers, all but the first with how many times the first they are."""
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
    addresses = dict.fromkeys([step["step"] for step in result["steps"]], "")
    if re.match(r"https?://", url):
        for step in result["steps"]:
            addresses[step["step"]] = f"{url}/#/experiments/{experiment}/runs/{step['run_id']}"
    return addresses


def steps_without_record(result: Result) -> list[dict[str, str]]:
    """Steps that left no record, with the reason: not needed by the loop, then not finished by a failed control."""
    table = []
    for key in ("not_needed", "not_finished"):
        for step in result[key]:
            reason = f"{_spaced(key)}: {step['reason']}"
            table.append({"step": step["step"], "reason": reason})
    return table
