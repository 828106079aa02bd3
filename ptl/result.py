"""The records of all steps -> `result.json`: the machine-readable truth from which report and table are made."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

Record = dict[str, Any]
Result = dict[str, Any]

STAGES = {"import": 0, "prune": 1, "recover": 2, "evaluate": 3}
RUN = ("run_id", "mlflow_run_id", "experiment_id", "mlflow_url")
MAX_CHANGED = 250  # regressions, and improvements, that the report shows: a page of a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer that the report shows


def build(records: dict[str, Record], settings: dict[str, Any]) -> Result:
    """Everything that the report shows, from the committed records of the steps and the effective config.

    `settings` is the config as a dict; beside its fields it may name where the run is tracked (`RUN`) and, under
    `control_failed`, why the control arm did not finish. An evaluate record may carry its items under the fact `items`:
    paired comparisons and examples are made from them. Steps that the loop did not need have no record: they are listed
    under `not_needed` with the reason, those that a failed control never completed under `not_finished`. `speed` is
    what the step that ended the loop measured of the dense and the final model. `recovery_tokens` of a row are those of
    its own iteration. Everything is ordered by arm, iteration and stage: the arms run at the same time, and model
    versions are numbered as they happen to be registered.
    """
    run = {key: settings.get(key) or "" for key in RUN}
    failed = _control_failed(records, settings.get("control_failed"))
    settings = {key: value for key, value in settings.items() if key not in (*RUN, "control_failed")}
    imported = records["import-model"]
    names = sorted((name for name in records if "stage" in records[name].get("metadata", {})), key=_order(records))
    original = imported["metadata"].get("params") or imported["pointer"].get("params", 0)
    removed = _removed_layers(names, records)
    rows = [_row(name, records, original, removed) for name in names if records[name]["metadata"].get("scores")]
    result = {
        "run_id": run["run_id"],
        "mlflow_run_id": run["mlflow_run_id"],
        "seed": settings.get("seed", 0),
        "versions": dict(sorted(imported["metadata"].get("versions", {}).items())),
        "rows": rows,
        "final": _final(names, records, original),
        "name": settings.get("name", "ptl"),
        "model": {key: imported["metadata"].get(key) or "" for key in ("model", "revision", "license")},
        "original_params": original,
        "host": imported["metadata"].get("host", ""),
        "started": imported["metadata"].get("started"),
        **_times([records[name]["metadata"] for name in names]),
        "confidence": settings.get("evaluate", {}).get("confidence", 0.95),
        "mlflow": {"url": run["mlflow_url"], "experiment_id": str(run["experiment_id"])},
        "steps": [_step(name, records[name]) for name in names],
        "not_needed": _not_needed(records, settings),
        "control_failed": failed,
        "not_finished": _not_finished(records, failed),
        "speed": next((s for name in names if (s := records[name]["metadata"].get("speed"))), {}),
        "decontaminated": _decontaminated(records),
        "curves": {name: c for name in names if (c := records[name]["metadata"].get("curve"))},
        "paired": _paired(names, records, settings.get("gate") or {}),
        "examples": _examples(names, records),
        "settings": settings,
    }
    return dict(json.loads(json.dumps(result)))  # exactly what result.json holds: lists, no tuples


def final_row(result: Result) -> dict[str, Any] | None:
    """The row of the checkpoint that the run ends with; None where it was never scored."""
    rows = [row for row in result["rows"] if row["arm"] == "loop" and row["digest"] == result["final"]["digest"]]
    return rows[-1] if rows else None


def row_of(result: Result, arm: str, iteration: int | None = None) -> dict[str, Any] | None:
    """The last row of an arm, or that of one iteration."""
    rows = [r for r in result["rows"] if r["arm"] == arm and iteration in (None, r["iteration"])]
    return rows[-1] if rows else None


def overlap(a: dict[str, Any], b: dict[str, Any]) -> bool | None:
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


def _order(records: dict[str, Record]) -> Any:
    def key(name: str) -> tuple[Any, ...]:
        metadata = records[name]["metadata"]
        return metadata.get("arm") == "control", metadata.get("iteration", 0), STAGES.get(metadata["stage"], 9), name

    return key


def _scored(name: str, records: dict[str, Record]) -> Record:
    """The checkpoint that an evaluate step scored: after a rejection it is not the one that goes on."""
    if records[name]["metadata"].get("checkpoint"):
        return dict(records[name]["metadata"]["checkpoint"])
    parent = name.replace("evaluate", "recover") if name != "evaluate-0" else "import-model"
    pointer: Record = records.get(parent, records[name])["pointer"]
    return pointer


def _row(name: str, records: dict[str, Record], original: int, removed: dict[str, list[int]]) -> dict[str, Any]:
    metadata, pointer = records[name]["metadata"], _scored(name, records)
    scores, first = metadata["scores"], metadata["scores"]["tasks"][0]
    recover = records.get(name.replace("evaluate", "recover"), {"metadata": {}})["metadata"]
    params = scores.get("params") or pointer.get("params", 0)
    verdict = metadata.get("verdict") or {}
    return {
        "arm": metadata.get("arm", "loop"),
        "iteration": metadata.get("iteration", 0),
        "params": params,
        "accuracy": first["accuracy"],
        "low": first["low"],
        "high": first["high"],
        "items": first["items"],
        "task": first["task"],
        "recovery_tokens": recover.get("tokens", 0),
        "verdict": verdict.get("decision", "baseline" if name == "evaluate-0" else ""),
        "uri": pointer["uri"],
        "digest": pointer["digest"],
        "share_removed": _share(params, original),
        "step": name,
        "gate": {key: value for key, value in verdict.items() if key != "decision"},
        "widths": list(scores.get("widths", [])),
        "removed_layers": removed.get(name.replace("evaluate", "prune"), []),
        "scores": scores,
    }


def _removed_layers(names: list[str], records: dict[str, Record]) -> dict[str, list[int]]:
    """What each prune step removed, in the dense model's numbers: a step counts the layers that were left to it."""
    dense = records.get("evaluate-0", {"metadata": {}})["metadata"].get("scores") or {}
    left = {records["import-model"]["pointer"]["digest"]: list(range(len(dense.get("widths") or ())))}
    removed: dict[str, list[int]] = {}
    for name in names:
        metadata, pointer = records[name]["metadata"], records[name]["pointer"]
        before = left.get(pointer.get("parent_digest", ""))
        if before is None or metadata["stage"] not in ("prune", "recover"):
            continue
        gone = set(metadata.get("removed_layers", ()) if metadata["stage"] == "prune" else ())
        removed[name] = [layer for i, layer in enumerate(before) if i in gone]
        left[pointer["digest"]] = [layer for i, layer in enumerate(before) if i not in gone]
    return removed


def _final(names: list[str], records: dict[str, Record], original: int) -> dict[str, Any]:
    """What the last loop evaluation passed on (its fact `accepted`, else its pointer); never a rejected checkpoint."""
    loop = [n for n in names if records[n]["metadata"].get("arm", "loop") == "loop"]
    evaluated = [n for n in loop if records[n]["metadata"]["stage"] == "evaluate"]
    last = records[(evaluated or loop)[-1]]
    pointer = last["metadata"].get("accepted") or last["pointer"]
    keys = ("uri", "digest", "params", "run_id", "model_id", "model_version")
    return {key: pointer.get(key, "") for key in keys} | {"share_removed": _share(pointer.get("params", 0), original)}


def _share(params: int, original: int) -> float:
    return round(1 - params / original, 6) if original and params else 0.0


def _step(name: str, record: Record) -> dict[str, Any]:
    metadata, pointer = record["metadata"], record["pointer"]
    own = {key: pointer.get(key, "") for key in ("uri", "digest", "parent_digest", "run_id", "model_id")}
    return own | {
        "step": name,
        "arm": metadata.get("arm", "loop"),
        "iteration": metadata.get("iteration", 0),
        "stage": metadata["stage"],
        "seconds": metadata.get("seconds", 0.0),
        "whole_seconds": metadata.get("whole_seconds", 0.0),
        "params": pointer.get("params", 0),
        "model_version": pointer.get("model_version", ""),
        "decision": (metadata.get("verdict") or {}).get("decision", ""),
        "reason": (metadata.get("verdict") or {}).get("reason", "") or metadata.get("reason", ""),
        "tokens": metadata.get("tokens", 0) if metadata["stage"] == "recover" else 0,
    }


def _times(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """`wall_seconds` from the first start to the last end, and `idle_seconds` of them in which no step was at work.

    A step's record has the times of the attempt that committed it: a pause between two sessions, the start-up of a
    step and an attempt that failed are all idle. None for records that do not say when their steps started.
    """
    if not steps or any(metadata.get("started") is None for metadata in steps):
        return {"wall_seconds": None, "idle_seconds": None}
    spans = [(f["started"], f["started"] + (f.get("whole_seconds") or f.get("seconds", 0.0))) for f in steps]
    first = until = min(start for start, _ in spans)
    idle = 0.0
    for start, end in sorted(spans):
        idle += max(0.0, start - until)
        until = max(until, end)
    return {"wall_seconds": round(until - first, 1), "idle_seconds": round(idle, 1)}


def _control_failed(records: dict[str, Record], reason: str | None) -> str:
    """Why the control has no score, as one line; empty where its evaluation was committed, whatever failed after it."""
    if not reason or "control-evaluate" in records:
        return ""
    return _shortened(" ".join(str(reason).split())).rstrip(".")


def _not_finished(records: dict[str, Record], failed: str) -> list[dict[str, Any]]:
    """Steps of a failed control arm that left no record."""
    steps = ("control-prune", "control-recover", "control-evaluate") if failed else ()
    return [{"step": step, "iteration": 1, "reason": failed} for step in steps if step not in records]


def _decontaminated(records: dict[str, Record]) -> dict[str, Any]:
    """How many training rows of the loop were compared with the benchmarks and left out; {} where nothing was asked."""
    metadata = [record["metadata"] for record in records.values() if "rows_compared" in record["metadata"]]
    loop = [each for each in metadata if each.get("arm") == "loop"]
    if not loop:
        return {}
    last = max(loop, key=lambda each: each["rows_compared"])  # each iteration reads the data from its start
    return {
        "rows": last["rows_compared"],
        "dropped": last["rows_dropped"],
        "items": max(each["benchmark_items"] for each in loop),
        "short": max(each["benchmark_items_short"] for each in loop),
        "not_compared": sorted({name for each in loop for name in each["not_compared"]}),
    }


def _not_needed(records: dict[str, Record], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps of the plan that passed their input through, as the gate's state at the end of the loop says."""
    evaluated = [record["metadata"] for record in records.values() if record["metadata"]["stage"] == "evaluate"]
    states = [
        (metadata.get("accepted") or {}).get("gate") or {} for metadata in evaluated if metadata.get("arm") == "loop"
    ]
    reason = next((state["reason"] for state in states if state.get("stopped")), "its record was not found")
    return [
        {"step": step, "iteration": i, "reason": reason}
        for i in range(1, (settings.get("schedule") or {}).get("iterations", 0) + 1)
        for step in (f"prune-{i}", f"recover-{i}", f"evaluate-{i}")
        if step not in records
    ]


def _final_step(names: list[str], records: dict[str, Record]) -> str:
    """The evaluate step that scored the final checkpoint; empty where none did."""
    final = _final(names, records, 0)["digest"]
    loop = [
        n for n in names if records[n]["metadata"].get("arm", "loop") == "loop" and records[n]["metadata"].get("scores")
    ]
    return next((name for name in reversed(loop) if _scored(name, records)["digest"] == final), "")


def _items(name: str, records: dict[str, Record]) -> dict[tuple[str, str], dict[str, Any]]:
    found = records.get(name, {"metadata": {}})["metadata"].get("items") or []
    return {(str(item["task"]), str(item["id"])): item for item in found}


def _paired(names: list[str], records: dict[str, Record], gate: dict[str, Any]) -> dict[str, Any]:
    """The final checkpoint against the dense one and against the control, item by item, on the first task."""
    from ptl.paired import paired

    final, found = _final_step(names, records), {}
    task = records[final]["metadata"]["scores"]["tasks"][0]["task"] if final else ""
    after = _items(final, records)
    for label, name in (("dense", "evaluate-0"), ("control", "control-evaluate")):
        before = _items(name, records)
        both = [key for key in before if key in after and key[0] == task]
        if both and name != final:
            old, new = ([int(items[key]["correct"]) for key in both] for items in (before, after))
            found[label] = asdict(paired(old, new, gate.get("margin", 0.02), gate.get("alpha", 0.05)))
    return found


def _examples(names: list[str], records: dict[str, Record]) -> dict[str, Any]:
    """Items whose outcome changed from the dense model to the final one, where the records carry their items."""
    final = _final_step(names, records)
    before, after = _items("evaluate-0", records), _items(final, records)
    pairs = [(before[key], after[key]) for key in before if key in after]
    if not pairs or final == "evaluate-0":
        return {}
    lost = [(old, new) for old, new in pairs if old["correct"] and not new["correct"]]
    won = [(old, new) for old, new in pairs if new["correct"] and not old["correct"]]
    return {
        "step": final,
        "compared": len(pairs),
        "lost": len(lost),
        "won": len(won),
        "regressions": [_changed(old, new) for old, new in lost[:MAX_CHANGED]],
        "improvements": [_changed(old, new) for old, new in won[:MAX_CHANGED]],
    }


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """An item with the answers of both models."""
    texts = {"prompt": old.get("prompt"), "target": old.get("target")}
    texts |= {"before": old.get("answer"), "after": new.get("answer")}
    short = {key: _shortened("" if text is None else text) for key, text in texts.items()}
    return {"task": str(old["task"]), "id": str(old["id"]), **short}


def _shortened(text: Any) -> str:
    text = str(text)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " […]"
