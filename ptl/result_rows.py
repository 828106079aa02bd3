"""Rows of a result, from the records of the steps: scored checkpoints, steps, and the checkpoint at the end."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
Records = dict[str, Record]  # by the step's name, in the order of the result


def rows(records: Records, original: int) -> list[dict[str, Any]]:
    """A row for each evaluate step; `original` is the number of parameters of the dense model."""
    removed_layers = _removed_layers(records)
    evaluated = [name for name, record in records.items() if record["metadata"]["stage"] == "evaluate"]
    return [_row(name, records, original, removed_layers) for name in evaluated]


def _row(name: str, records: Records, original: int, removed_layers: dict[str, list[int]]) -> dict[str, Any]:
    metadata = records[name]["metadata"]
    # What was scored: after a rejection it is not what the loop continues with.
    checkpoint = metadata["checkpoint"]
    scores = metadata["scores"]
    first = scores["tasks"][0]
    verdict = metadata["verdict"]
    recover_name = name.replace("evaluate", "recover")
    recovery = records[recover_name]["metadata"] if recover_name in records else {}
    return {
        "arm": metadata["arm"],
        "iteration": metadata["iteration"],
        "params": scores["params"],
        "accuracy": first["accuracy"],
        "low": first["low"],
        "high": first["high"],
        "items": first["items"],
        "task": first["task"],
        "recovery_tokens": recovery.get("tokens", 0),
        "verdict": verdict["decision"],
        "uri": checkpoint["uri"],
        "digest": checkpoint["digest"],
        "share_removed": _share_removed(scores["params"], original),
        "step": name,
        "gate": {key: value for key, value in verdict.items() if key != "decision"},
        "widths": scores["widths"],
        "removed_layers": removed_layers.get(name.replace("evaluate", "prune"), []),
        "scores": scores,
    }


def _removed_layers(records: Records) -> dict[str, list[int]]:
    """What each prune step removed, in the dense model's numbers: a step counts the layers that its input had."""
    num_layers = len(records["evaluate-0"]["metadata"]["scores"]["widths"])
    dense = records["import-model"]["pointer"]["digest"]
    remaining = {dense: list(range(num_layers))}  # by the checkpoint's digest: its layers in the dense model's numbers
    removed: dict[str, list[int]] = {}
    for name, record in records.items():
        metadata, pointer = record["metadata"], record["pointer"]
        layers = remaining.get(pointer["parent_digest"])
        if layers is None or metadata["stage"] not in ("prune", "recover"):
            continue
        indices = metadata.get("removed_layers", ()) if metadata["stage"] == "prune" else ()
        removed[name] = [layer for i, layer in enumerate(layers) if i in indices]
        remaining[pointer["digest"]] = [layer for i, layer in enumerate(layers) if i not in indices]
    return removed


def final(records: Records, original: int) -> dict[str, Any]:
    """The checkpoint that the last evaluation of the loop passed on; never a rejected one."""
    metadata = [record["metadata"] for record in records.values()]
    accepted = [entry["accepted"] for entry in metadata if entry["arm"] == "loop" and entry["stage"] == "evaluate"]
    pointer = accepted[-1]
    keys = ("uri", "digest", "params", "run_id", "model_id", "model_version")
    checkpoint = {key: pointer[key] for key in keys}
    checkpoint["share_removed"] = _share_removed(pointer["params"], original)
    return checkpoint


def _share_removed(params: int, original: int) -> float:
    return round(1 - params / original, 6)


def steps(records: Records) -> list[dict[str, Any]]:
    """A row for each step: its checkpoint, how long it worked, and what it decided."""
    return [_step_row(name, record) for name, record in records.items()]


def _step_row(name: str, record: Record) -> dict[str, Any]:
    metadata, pointer = record["metadata"], record["pointer"]
    verdict = metadata.get("verdict") or {}
    lineage = {key: pointer[key] for key in ("uri", "digest", "parent_digest", "run_id", "model_id")}
    return {
        **lineage,
        "step": name,
        "arm": metadata["arm"],
        "iteration": metadata["iteration"],
        "stage": metadata["stage"],
        "seconds": metadata["seconds"],
        "whole_seconds": metadata.get("whole_seconds", 0.0),
        "params": pointer["params"],
        "model_version": pointer["model_version"],
        "decision": verdict.get("decision", ""),
        "reason": verdict.get("reason", "") or metadata.get("reason", ""),
        "tokens": metadata.get("tokens", 0) if metadata["stage"] == "recover" else 0,
    }
