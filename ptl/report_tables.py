"""A result as the formatted rows of the report's tables: iterations, costs, the gate's numbers, steps."""

from __future__ import annotations

import re
from typing import Any

from ptl.cells import accuracy, comparison, dotted, first_task, interval, percent, score
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
    # The drawn intervals share one scale.
    lows = [row["low"] or 0 for row in rows]
    highs = [row["high"] or 0 for row in rows]
    low = min(lows, default=0)
    high = max(highs, default=1)
    final = final_row(result)
    table = []
    for row in rows:
        cells = _iteration(row)
        cells["final"] = row is final
        cells["bar"] = _bar(row, low, high)
        table.append(cells)
    return table


def _iteration(row: Row) -> dict[str, Any]:
    layers = row.get("removed_layers") or ()
    return {
        "label": "one-shot control" if row["arm"] == "control" else iteration_label(row),
        "arm": row["arm"],
        "params": f"{row['params']:,}",
        "removed": percent(row["share_removed"]),
        "accuracy": accuracy(first_task(row)),
        "interval": interval(first_task(row)),
        "num_items": f"{row['items']:,}",
        "tokens": f"{row['recovery_tokens']:,}",
        "verdict": row["verdict"],
        "shape": _width_range(row["widths"]),
        "layers": len(row["widths"]) or "",
        "removed_layers": ", ".join(map(str, layers)),
        "tasks": [{**task, "score": score(task)} for task in row["scores"]["tasks"]],
        "gate": gate_numbers(row["gate"]),
    }


def iteration_label(row: Row) -> str:
    """The number of a row's iteration, or `dense`."""
    return str(row["iteration"] or "dense")


def _bar(row: Row, low: float, high: float) -> list[float]:
    """Ends and middle of a row's interval, in percent of the way from `low` to `high`; empty without an interval."""
    if row["low"] is None:
        return []
    scale = 100 / (high - low or 1)
    return [round((row[key] - low) * scale, 1) for key in ("low", "accuracy", "high")]


def _width_range(widths: list[int]) -> str:
    """The FFN widths of a model's layers, from the smallest to the largest."""
    if not widths:
        return ""
    low, high = min(widths), max(widths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def gate_numbers(gate: dict[str, Any]) -> list[tuple[str, str]]:
    """A verdict's reason and numbers, one pair of name and text for each."""
    values = {key: value for key, value in gate.items() if key != "numbers"}
    values.update(gate.get("numbers") or {})
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict) and "p_different" in value:
            pairs.append((f"against the {key}", comparison(value)))
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs.append((_spaced(key), f"{value:,}"))
        else:
            pairs += [(_spaced(name), text) for name, text in dotted(value, key)]
    return pairs


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def columns(result: Result) -> list[tuple[str, Row]]:
    """The rows that are set side by side: dense, final (unless it is the dense one), control."""
    dense = dense_row(result)
    final = final_row(result)
    named = [("Dense", dense), ("One-shot control", control_row(result))]
    if final is not dense:
        named.insert(1, ("Final", final))
    return [(name, row) for name, row in named if row is not None]


def costs(result: Result) -> list[tuple[str, list[str]]]:
    """What each of dense, final and control costs: label -> one cell per column of `columns`."""
    models = [row["scores"] for _, row in columns(result)]
    table = []
    for key, label in COSTS.items():
        numbers = [scores.get(key) for scores in models]
        if None not in numbers:
            table.append((label, _with_ratios(numbers)))
    return table


def _with_ratios(numbers: list[Any]) -> list[str]:
    """Numbers, all but the first with how many times the first they are."""
    first, *others = numbers
    ratios = [f"{number:,} ({number / (first or 1):.2f}x)" for number in others]
    return [f"{first:,}", *ratios]


def links(result: Result) -> dict[str, str]:
    """The address of each step's MLflow run; empty without a base URL, and never another scheme than http."""
    url = result["mlflow"]["url"].rstrip("/")
    experiment = result["mlflow"]["experiment_id"]
    is_web = bool(re.match(r"https?://", url))
    addresses = {}
    for step in result["steps"]:
        run_id = step["run_id"]
        linked = is_web and run_id
        addresses[step["step"]] = f"{url}/#/experiments/{experiment}/runs/{run_id}" if linked else ""
    return addresses


def steps_without_record(result: Result) -> list[dict[str, str]]:
    """Steps that left no record, with the reason: not needed by the loop, then not finished by a failed control."""
    table = []
    for key in ("not_needed", "not_finished"):
        state = _spaced(key)
        steps = result.get(key) or ()
        table += [{"step": step["step"], "reason": f"{state}: {step['reason']}"} for step in steps]
    return table
