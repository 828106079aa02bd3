"""The records of all steps -> `result.json`: the machine-readable truth from which report and table are made."""

from __future__ import annotations

import json
from typing import Any

from ptl import changed_answers, result_rows

Record = dict[str, Any]  # of a step, as it was committed: metadata and pointer
Records = dict[str, Record]  # by the step's name
Result = dict[str, Any]
Row = dict[str, Any]  # of a scored checkpoint

STAGES = {"import": 0, "prune": 1, "recover": 2, "evaluate": 3}
RUN = ("run_id", "mlflow_run_id", "experiment_id", "mlflow_url")


def build(records: Records, settings: dict[str, Any]) -> Result:
    """Everything that the report shows, from the committed records of the steps and the effective config.

    `settings` is the config as a dict; beside its fields it may name where the run is tracked (`RUN`) and, under
    `control_failed`, why the control arm did not finish. An evaluate record may carry its items in its metadata:
    paired comparisons and examples are made from them. Steps that the loop did not need have no record: they are listed
    under `not_needed` with the reason, those that a failed control never completed under `not_finished`. `speed` is
    what the step that ended the loop measured of the dense and the final model. `recovery_tokens` of a row are those of
    its own iteration. Everything is ordered by arm, iteration and stage: the arms run at the same time, and model
    versions are numbered as they happen to be registered.
    """
    records = {name: records[name] for name in sorted(records, key=lambda name: _order(name, records[name]))}
    config = {key: value for key, value in settings.items() if key not in (*RUN, "control_failed")}
    tracked = {key: settings.get(key) or "" for key in RUN}
    control_failed = _control_failed(records, settings.get("control_failed"))
    imported = records["import-model"]["metadata"]
    final = result_rows.final(records, imported["params"])
    gate = config.get("gate") or {}
    result = {
        "run_id": tracked["run_id"],
        "mlflow_run_id": tracked["mlflow_run_id"],
        "seed": config.get("seed", 0),
        "versions": dict(sorted(imported.get("versions", {}).items())),
        "rows": result_rows.rows(records, imported["params"]),
        "final": final,
        "name": config.get("name", "ptl"),
        "model": {key: imported.get(key) or "" for key in ("model", "revision", "license")},
        "original_params": imported["params"],
        "host": imported.get("host", ""),
        "started": imported.get("started"),
        **_times(records),
        "confidence": config.get("evaluate", {}).get("confidence", 0.95),
        "mlflow": {"url": tracked["mlflow_url"], "experiment_id": str(tracked["experiment_id"])},
        "steps": result_rows.steps(records),
        "not_needed": _not_needed(records, config),
        "control_failed": control_failed,
        "not_finished": _not_finished(records, control_failed),
        "speed": _speed(records),
        "decontaminated": _decontaminated(records),
        "curves": _curves(records),
        "paired": changed_answers.paired_comparisons(records, final["digest"], gate),
        "examples": changed_answers.examples(records, final["digest"]),
        "settings": config,
    }
    return dict(json.loads(json.dumps(result)))  # exactly what result.json holds: lists, no tuples


def final_row(result: Result) -> Row | None:
    """The row of the checkpoint that the run ends with; None where it was never scored."""
    final = result["final"]["digest"]
    rows = [row for row in result["rows"] if row["arm"] == "loop" and row["digest"] == final]
    return rows[-1] if rows else None


def dense_row(result: Result) -> Row | None:
    """The row of the dense model; None where it was never scored."""
    rows = [row for row in result["rows"] if row["arm"] == "loop" and row["iteration"] == 0]
    return rows[-1] if rows else None


def control_row(result: Result) -> Row | None:
    """The row of the one-shot control; None where the run has none, or it did not finish."""
    rows = [row for row in result["rows"] if row["arm"] == "control"]
    return rows[-1] if rows else None


def overlap(a: Row, b: Row) -> bool | None:
    """Whether two rows' intervals share a point; None where one has no interval."""
    if None in (a["low"], a["high"], b["low"], b["high"]):
        return None
    return bool(a["low"] <= b["high"] and b["low"] <= a["high"])


def total_tokens(result: Result, arm: str) -> int:
    """Recovery tokens of all steps of an arm, rejected iterations included."""
    return sum(step["tokens"] for step in result["steps"] if step["arm"] == arm)


def work_seconds(result: Result) -> float:
    """Seconds of work in all steps together, as if one had run after another."""
    return sum(step["seconds"] for step in result["steps"])


def _order(name: str, record: Record) -> tuple[bool, int, int, str]:
    metadata = record["metadata"]
    return metadata["arm"] == "control", metadata["iteration"], STAGES[metadata["stage"]], name


def _times(records: Records) -> dict[str, float | None]:
    """`wall_seconds` from the first start to the last end, and `idle_seconds` of them in which no step was at work.

    A step's record has the times of the attempt that committed it: a pause between two sessions, the start-up of a
    step and an attempt that failed are all idle. None for records that do not say when their steps started.
    """
    spans = []
    for record in records.values():
        metadata = record["metadata"]
        start = metadata.get("started")
        if start is None:
            return {"wall_seconds": None, "idle_seconds": None}
        end = start + (metadata.get("whole_seconds") or metadata["seconds"])
        spans.append((start, end))
    spans.sort()
    first, _ = spans[0]
    # Steps of the two arms overlap: `until` is where the work so far has ended.
    until, idle = first, 0.0
    for start, end in spans:
        idle += max(0.0, start - until)
        until = max(until, end)
    return {"wall_seconds": round(until - first, 1), "idle_seconds": round(idle, 1)}


def _control_failed(records: Records, reason: str | None) -> str:
    """Why the control has no score, as one line; empty where its evaluation was committed, whatever failed after it."""
    if not reason or "control-evaluate" in records:
        return ""
    line = " ".join(reason.split())
    return changed_answers.shortened(line).rstrip(".")


def _not_finished(records: Records, control_failed: str) -> list[dict[str, Any]]:
    """Steps of a failed control arm that left no record."""
    if not control_failed:
        return []
    steps = ("control-prune", "control-recover", "control-evaluate")
    return [{"step": step, "iteration": 1, "reason": control_failed} for step in steps if step not in records]


def _not_needed(records: Records, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps of the plan that passed their input through, as the gate's state at the end of the loop says."""
    reason = "its record was not found"
    for record in records.values():
        metadata = record["metadata"]
        gate = metadata.get("accepted", {}).get("gate") or {}
        if metadata["arm"] == "loop" and gate.get("stopped"):
            reason = gate["reason"]
            break
    skipped = []
    iterations = (config.get("schedule") or {}).get("iterations", 0)
    for iteration in range(1, iterations + 1):
        for stage in ("prune", "recover", "evaluate"):
            step = f"{stage}-{iteration}"
            if step not in records:
                skipped.append({"step": step, "iteration": iteration, "reason": reason})
    return skipped


def _speed(records: Records) -> dict[str, Any]:
    """What was measured of the dense and the final model; {} where nothing was asked."""
    for record in records.values():
        speed: dict[str, Any] = record["metadata"].get("speed") or {}
        if speed:
            return speed
    return {}


def _curves(records: Records) -> dict[str, Any]:
    """Losses of the recover steps: step -> pairs of tokens and loss."""
    curves = {name: record["metadata"].get("curve") for name, record in records.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _decontaminated(records: Records) -> dict[str, Any]:
    """How many training rows of the loop were compared with the benchmarks and left out; {} where nothing was asked."""
    counts = []
    for record in records.values():
        metadata = record["metadata"]
        if metadata["arm"] == "loop" and "rows_compared" in metadata:
            counts.append(metadata)
    if not counts:
        return {}
    last = max(counts, key=lambda count: count["rows_compared"])  # each iteration reads the data from its start
    not_compared: set[str] = set()
    for count in counts:
        not_compared.update(count["not_compared"])
    return {
        "rows": last["rows_compared"],
        "dropped": last["rows_dropped"],
        "items": max(count["benchmark_items"] for count in counts),
        "short": max(count["benchmark_items_short"] for count in counts),
        "not_compared": sorted(not_compared),
    }
