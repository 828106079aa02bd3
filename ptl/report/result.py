"""The records of all steps -> `result.json`: the machine-readable truth from which report and table are made."""

from __future__ import annotations

import json
from typing import Any

from ptl.config.run import Evaluate
from ptl.data.training_amount import Amount
from ptl.report import changed_answers, export_rows, goal, result_rows
from ptl.report.result_rows import Record, Records, Row

Result = dict[str, Any]

STAGES = {"import": 0, "prune": 1, "recover": 2, "evaluate": 3, "export": 4}
SAME_SIZE = 0.005  # relative difference of parameters below which two models count as equally large
# What `settings` may hold beside the config: where the run is tracked.
RUN = ("run_id", "mlflow_run_id", "experiment_id", "mlflow_url")


def build(records: Records, settings: Row) -> Result:
    """Everything that the report shows, from the committed records of the steps and the effective config.

    `settings` is the config as a dict; beside its fields it may name where the run is tracked (`RUN`) and, under
    `control_failed`, why the control arm did not finish, and under `exports_failed`, why a form for another runtime was
    not made. An evaluate record may carry its items in its metadata:
    paired comparisons and examples are made from them.
    """
    # The arms run at the same time, and model versions are numbered as they happen to be registered.
    records = dict(sorted(records.items(), key=_order))
    config = dict(settings)
    tracked = {key: config.pop(key, None) or "" for key in RUN}
    control_failed = _control_failed(records, config.pop("control_failed", None))
    exports_failed = config.pop("exports_failed", {})
    imported = records["import-model"]["metadata"]
    rows = result_rows.rows(records, imported["params"])
    final = result_rows.final(records, imported["params"])
    scored = final_row({"rows": rows, "final": final})
    speed = _speed(records)
    result = {
        # The run.
        "run_id": tracked["run_id"],
        "mlflow_run_id": tracked["mlflow_run_id"],
        "seed": config["seed"],
        "versions": dict(sorted(imported["versions"].items())),
        # Checkpoints: the scored ones, and the one that the run ends with.
        "rows": rows,
        "final": final,
        "name": config["name"],
        "model": {
            "model": imported["model"],  # path or hub id
            "revision": imported["revision"],
            "license": imported.get("license", ""),
        },
        "original_params": imported["params"],
        "host": imported["host"],
        "started": imported["started"],  # unix time
        **_times(records),
        "confidence": Evaluate.confidence,
        "mlflow": {
            "url": tracked["mlflow_url"],
            "experiment_id": str(tracked["experiment_id"]),
        },
        # Steps, and why some left no record.
        "steps": result_rows.steps(records),
        "not_needed": _not_needed(records, config["schedule"]["iterations"]),
        "control_failed": control_failed,
        "not_finished": _not_finished(records, control_failed),
        # What was measured beside the scores, and a goal with what was reached; empty where nothing was.
        "speed": speed,
        "goal": goal.outcome(imported.get("goal", {}), scored, speed),
        # Forms for other runtimes.
        "exports": export_rows.rows(records, config.get("export", []), exports_failed),
        "decontaminated": _decontaminated(records),
        "sequences": _sequences(records),
        "curves": _curves(records),
        **_compared(records, scored, config["gate"]),
        "settings": config,
    }
    # Exactly what result.json holds: lists, no tuples.
    return dict(json.loads(json.dumps(result)))


def _compared(records: Records, scored: Row | None, gate: Row) -> Row:
    """What is known item by item of the final checkpoint; `scored` is its row."""
    step = scored["step"] if scored else ""
    comparisons = changed_answers.paired_comparisons(records, step, gate)
    first_task = scored["task"] if scored else ""
    return {
        "paired": comparisons.get(first_task, {}),  # on the first task
        "paired_tasks": comparisons,  # on each task
        "examples": changed_answers.examples(records, step),
    }


def arm_rows(result: Result, arm: str) -> list[Row]:
    """The rows of an arm in the order of its iterations; the loop's first is the dense model."""
    return [row for row in result["rows"] if row["arm"] == arm]


def dense_row(result: Result) -> Row:
    """The row of the dense model."""
    return arm_rows(result, "loop")[0]


def final_row(result: Result) -> Row | None:
    """The row of the checkpoint that the run ends with; None where it was never scored."""
    digest = result["final"]["digest"]
    # It may have been scored twice: the last time counts.
    for row in reversed(arm_rows(result, "loop")):
        if row["digest"] == digest:
            return row
    return None


def control_row(result: Result) -> Row | None:
    """The row of the one-shot control; None where the run has none, or it did not finish."""
    return next(iter(arm_rows(result, "control")), None)


def amount(result: Result) -> Amount:
    """What the loop trained beside what it removed."""
    sequences = result["sequences"]
    # Reinforcement learning trains on the model's own answers, and has no sequences.
    tokens = total_tokens(result, "loop") if sequences["sequences"] else 0
    return Amount(tokens, result["original_params"] - result["final"]["params"], sequences["passes"])


def total_tokens(result: Result, arm: str) -> int:
    """Recovery tokens of all steps of an arm, rejected iterations included."""
    return sum(step["tokens"] for step in result["steps"] if step["arm"] == arm)


def work_seconds(result: Result) -> float:
    """Seconds of work in all steps together, as if one had run after another."""
    return sum(step["seconds"] for step in result["steps"])


def _order(named: tuple[str, Record]) -> tuple[Any, ...]:
    """Arm, iteration and stage of a record with its name."""
    name, record = named
    metadata = record["metadata"]
    is_control = metadata["arm"] == "control"
    stage = STAGES[metadata["stage"]]
    return is_control, metadata["iteration"], stage, name


def _times(records: Records) -> dict[str, float]:
    """`wall_seconds` from the first start to the last end, and `idle_seconds` of them in which no step was at work.

    A step's record has the times of the attempt that committed it: a pause between two sessions, the start-up of a
    step and an attempt that failed are all idle.
    """
    spans = []
    for record in records.values():
        metadata = record["metadata"]
        start = metadata["started"]
        spans.append((start, start + metadata["whole_seconds"]))
    spans.sort()
    first, _ = spans[0]
    # Steps of the two arms overlap: `until` is where the work so far has ended.
    until = first
    idle = 0.0
    for start, end in spans:
        idle += max(0.0, start - until)
        until = max(until, end)
    return {
        "wall_seconds": round(until - first, 1),
        "idle_seconds": round(idle, 1),
    }


def _control_failed(records: Records, reason: str | None) -> str:
    """Why the control has no score, as one line; empty where its evaluation was committed, whatever failed after it."""
    if not reason or "control-evaluate" in records:
        return ""
    # The messages of some libraries have several lines.
    line = " ".join(reason.split())
    return changed_answers.shortened(line).rstrip(".")


def _not_finished(records: Records, control_failed: str) -> list[Row]:
    """Steps of a failed control arm that left no record."""
    if not control_failed:
        return []
    steps = ("control-prune", "control-recover", "control-evaluate")
    return [_missing(step, 1, control_failed) for step in steps if step not in records]


def _missing(step: str, iteration: int, reason: str) -> Row:
    """A step without a record."""
    return {"step": step, "iteration": iteration, "reason": reason}


def _not_needed(records: Records, num_iterations: int) -> list[Row]:
    """Steps of the plan that passed their input through, with the reason."""
    reason = _stopped(records)
    steps = []
    for iteration in range(1, num_iterations + 1):
        for stage in ("prune", "recover", "evaluate"):
            name = f"{stage}-{iteration}"
            if name not in records:
                steps.append(_missing(name, iteration, reason))
    return steps


def _stopped(records: Records) -> str:
    """Why the loop ended, as the gate's state at its end says."""
    for record in result_rows.evaluations(records, "loop").values():
        # The state that the gate hands on with what it accepted.
        gate = record["metadata"]["accepted"]["gate"]
        if gate.get("stopped"):
            return str(gate["reason"])
    return "its record was not found"


def _speed(records: Records) -> Row:
    """What the step that ended the loop measured of the dense and the final model."""
    for record in result_rows.evaluations(records, "loop").values():
        if record["metadata"]["speed"]:
            return dict(record["metadata"]["speed"])
    return {}


def _curves(records: Records) -> Row:
    """Losses of the recover steps: step -> pairs of tokens and loss."""
    curves = {name: record["metadata"].get("curve") for name, record in records.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _decontaminated(records: Records) -> Row:
    """How many training rows of the loop were compared with the benchmarks and left out."""
    counts = []
    not_compared: set[str] = set()
    for record in records.values():
        metadata = record["metadata"]
        if metadata["arm"] == "loop" and "rows_compared" in metadata:
            counts.append(metadata)
            not_compared.update(metadata["not_compared"])
    if not counts:
        return {}
    # Each iteration reads the data from its start: the longest has read all that others have.
    longest = max(counts, key=lambda count: int(count["rows_compared"]))
    return {
        "rows": longest["rows_compared"],
        "dropped": longest["rows_dropped"],
        "items": max(count["benchmark_items"] for count in counts),
        "short": max(count["benchmark_items_short"] for count in counts),  # too short to be compared
        "not_compared": sorted(not_compared),  # benchmarks whose items are not known
    }


def _sequences(records: Records) -> Row:
    """Sequences that the loop was trained on, those that max_length cut, and passes over the rows."""
    trained = [record["metadata"] for record in records.values() if "cut_sequences" in record["metadata"]]
    in_loop = [metadata for metadata in trained if metadata["arm"] == "loop"]
    totals = {name: sum(metadata[name] for metadata in in_loop) for name in ("sequences", "cut_sequences")}
    return {**totals, "passes": max((metadata["passes"] for metadata in in_loop), default=None)}
