"""Rows of a result, from the records of the steps: scored checkpoints, steps, and the checkpoint at the end."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]  # of a step, as it was committed: metadata and pointer
Records = dict[str, Record]  # by the step's name, in the order of the result
Row = dict[str, Any]


def evaluations(records: Records, *arms: str) -> Records:
    """The records of the evaluate steps of these arms."""
    chosen = {}
    for name, record in records.items():
        metadata = record["metadata"]
        if metadata["stage"] == "evaluate" and metadata["arm"] in arms:
            chosen[name] = record
    return chosen


def rows(records: Records, original: int) -> list[Row]:
    """A row for each evaluate step; `original` is the number of parameters of the dense model."""
    removed_layers = _removed_layers(records)
    table = []
    for name in evaluations(records, "loop", "control"):
        row = _row(name, records, original)
        # Of the iteration's prune step; the dense model has none.
        row["removed_layers"] = removed_layers.get(name.replace("evaluate", "prune"), [])
        # Of all benchmarks, with costs.
        row["scores"] = records[name]["metadata"]["scores"]
        table.append(row)
    return table


def _row(name: str, records: Records, original: int) -> Row:
    metadata = records[name]["metadata"]
    scores = metadata["scores"]
    first = scores["tasks"][0]
    # What was scored: after a rejection it is not what the loop continues with.
    checkpoint = metadata["checkpoint"]
    gate = dict(metadata["verdict"])
    # The dense model was not recovered.
    recover = records.get(name.replace("evaluate", "recover"))
    return {
        "arm": metadata["arm"],
        "iteration": metadata["iteration"],
        "params": scores["params"],
        # The score of the first benchmark, with its interval.
        "accuracy": first["accuracy"],
        "low": first["low"],
        "high": first["high"],
        "items": first["items"],
        "task": first["task"],
        "recovery_tokens": recover["metadata"]["tokens"] if recover else 0,  # of this iteration alone
        "verdict": gate.pop("decision"),
        "uri": checkpoint["uri"],
        "digest": checkpoint["digest"],
        "share_removed": _share_removed(scores["params"], original),
        "step": name,
        "gate": gate,  # reason and numbers of the verdict
        "widths": scores["widths"],  # of the FFN, by layer
    }


def _removed_layers(records: Records) -> dict[str, list[int]]:
    """What each prune step removed, in the dense model's numbers: a step counts the layers that its input had."""
    num_layers = len(records["evaluate-0"]["metadata"]["scores"]["widths"])
    dense = records["import-model"]["pointer"]["digest"]
    remaining = {dense: list(range(num_layers))}  # by the checkpoint's digest
    removed: dict[str, list[int]] = {}
    for name, record in records.items():
        metadata = record["metadata"]
        pointer = record["pointer"]
        layers = remaining.get(pointer["parent_digest"])
        if layers is None or metadata["stage"] not in ("prune", "recover"):
            continue
        # A recover step has none, but the next iteration begins from its checkpoint.
        removed[name] = [layers[index] for index in sorted(metadata.get("removed_layers", ()))]
        remaining[pointer["digest"]] = [layer for layer in layers if layer not in removed[name]]
    return removed


def final(records: Records, original: int) -> Row:
    """The checkpoint that the last evaluation of the loop passed on; never a rejected one."""
    *_, last = evaluations(records, "loop").values()
    pointer = last["metadata"]["accepted"]
    keys = ("uri", "digest", "params", "run_id", "model_id", "model_version")
    checkpoint = {key: pointer[key] for key in keys}
    checkpoint["share_removed"] = _share_removed(pointer["params"], original)
    return checkpoint


def _share_removed(params: int, original: int) -> float:
    return round(1 - params / original, 6)


def steps(records: Records) -> list[Row]:
    """A row for each step: its checkpoint, how long it worked, and what it decided."""
    return [_step_row(name, record) for name, record in records.items()]


def _step_row(name: str, record: Record) -> Row:
    metadata = record["metadata"]
    pointer = record["pointer"]
    # Only evaluations have a verdict, only recover steps train.
    verdict = metadata.get("verdict", {})
    return {
        "uri": pointer["uri"],
        "digest": pointer["digest"],
        "parent_digest": pointer["parent_digest"],
        "run_id": pointer["run_id"],  # of the step in MLflow
        "model_id": pointer["model_id"],
        "step": name,
        "arm": metadata["arm"],
        "iteration": metadata["iteration"],
        "stage": metadata["stage"],
        "seconds": metadata["seconds"],  # of work
        "whole_seconds": metadata["whole_seconds"],  # with loading libraries and checkpoints
        "params": pointer["params"],
        "model_version": pointer["model_version"],
        "decision": verdict.get("decision", ""),
        "reason": verdict.get("reason", ""),
        "tokens": metadata.get("tokens", 0),
    }
