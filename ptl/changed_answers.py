"""What changed in the answers from one checkpoint to another: paired comparisons, regressions and improvements."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

Records = dict[str, dict[str, Any]]  # by the step's name, in the order of the result
Item = dict[str, Any]  # of a benchmark, with the model's answer

MAX_CHANGED = 250  # regressions, and improvements, that the report shows: a page of a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer that the report shows


def paired_comparisons(records: Records, final_digest: str, gate: dict[str, Any]) -> dict[str, Any]:
    """The final checkpoint against the dense one and against the control, item by item, on the first task."""
    from ptl.gate import paired

    final = _final_step(records, final_digest)
    if not final:
        return {}
    task = records[final]["metadata"]["scores"]["tasks"][0]["task"]
    after = _items(final, records)
    comparisons = {}
    for label, name in (("dense", "evaluate-0"), ("control", "control-evaluate")):
        before = _items(name, records)
        shared = [key for key in before if key in after and key[0] == task]
        if shared and name != final:
            old = [int(before[key]["correct"]) for key in shared]
            new = [int(after[key]["correct"]) for key in shared]
            comparison = paired(old, new, gate.get("margin", 0.02), gate.get("alpha", 0.05))
            comparisons[label] = asdict(comparison)
    return comparisons


def examples(records: Records, final_digest: str) -> dict[str, Any]:
    """Items whose outcome changed from the dense model to the final one, where the records carry their items."""
    final = _final_step(records, final_digest)
    before, after = _items("evaluate-0", records), _items(final, records)
    pairs = [(before[key], after[key]) for key in before if key in after]
    if not pairs or final == "evaluate-0":
        return {}
    regressions = [(old, new) for old, new in pairs if old["correct"] and not new["correct"]]
    improvements = [(old, new) for old, new in pairs if new["correct"] and not old["correct"]]
    return {
        "step": final,
        "compared": len(pairs),
        "num_regressions": len(regressions),
        "num_improvements": len(improvements),
        "regressions": [_changed(old, new) for old, new in regressions[:MAX_CHANGED]],
        "improvements": [_changed(old, new) for old, new in improvements[:MAX_CHANGED]],
    }


def shortened(text: str) -> str:
    """A text as the report shows it, of at most `MAX_TEXT` characters."""
    if len(text) <= MAX_TEXT:
        return text
    return text[:MAX_TEXT] + " […]"


def _final_step(records: Records, final_digest: str) -> str:
    """The evaluate step of the loop that scored the final checkpoint; empty where none did."""
    for name in reversed(records):
        metadata = records[name]["metadata"]
        is_evaluation = metadata["arm"] == "loop" and metadata["stage"] == "evaluate"
        if is_evaluation and metadata["checkpoint"]["digest"] == final_digest:
            return name
    return ""


def _items(name: str, records: Records) -> dict[tuple[str, str], Item]:
    """The items of an evaluate step by task and id; empty where it has no record, or its record no items."""
    if name not in records:
        return {}
    items = records[name]["metadata"].get("items") or []
    return {(str(item["task"]), str(item["id"])): item for item in items}


def _changed(old: Item, new: Item) -> dict[str, str]:
    """An item with the answers of both models."""
    texts = {
        "prompt": old.get("prompt"),
        "target": old.get("target"),
        "before": old.get("answer"),
        "after": new.get("answer"),
    }
    changed = {"task": str(old["task"]), "id": str(old["id"])}
    for key, text in texts.items():
        changed[key] = "" if text is None else shortened(str(text))
    return changed
