"""What changed in the answers from one checkpoint to another: paired comparisons, regressions and improvements."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ptl.evaluation.paired import Item, paired
from ptl.report.result_rows import Records, Row

MAX_CHANGED = 250  # regressions, and improvements, that the report shows: a page of a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer that the report shows


def paired_comparisons(records: Records, final: str, gate: Row) -> Row:
    """The final checkpoint against the dense one and against the control, item by item, on the first task.

    `final` is the step that scored it, `gate` the config of the gate.
    """
    if not final:
        return {}
    task = records[final]["metadata"]["scores"]["tasks"][0]["task"]
    after = _items(final, records)
    steps = {"dense": "evaluate-0", "control": "control-evaluate"}
    comparisons = {}
    for label, name in steps.items():
        # Where no iteration passed, the dense model is the final one.
        if name == final:
            continue
        old, new = [], []
        for key, item in _items(name, records).items():
            if key in after and item["task"] == task:
                old.append(int(item["correct"]))
                new.append(int(after[key]["correct"]))
        # Either evaluation may have no items: then there is nothing to compare.
        if old:
            comparisons[label] = asdict(paired(old, new, gate["margin"], gate["alpha"]))
    return comparisons


def examples(records: Records, final: str) -> Row:
    """Items whose outcome changed from the dense model to the final one, where the records carry their items."""
    after = _items(final, records)
    before = _items("evaluate-0", records)
    compared = [key for key in before if key in after]
    if not compared or final == "evaluate-0":
        return {}
    regressions, improvements = [], []
    for key in compared:
        old, new = before[key], after[key]
        # Right before and wrong after, or the other way round.
        if old["correct"] > new["correct"]:
            regressions.append(_changed(old, new))
        elif new["correct"] > old["correct"]:
            improvements.append(_changed(old, new))
    return {
        "step": final,
        "compared": len(compared),
        "num_regressions": len(regressions),
        "num_improvements": len(improvements),
        # Those that the page has room for.
        "regressions": regressions[:MAX_CHANGED],
        "improvements": improvements[:MAX_CHANGED],
    }


def shortened(value: Any) -> str:
    """A text, or the number of a choice, as the report shows it: at most `MAX_TEXT` characters."""
    text = str(value)
    if len(text) <= MAX_TEXT:
        return text
    return text[:MAX_TEXT] + " […]"


def _items(step: str, records: Records) -> dict[tuple[str, Any], Item]:
    """The items of an evaluate step by task and id; empty where it has no record, or its record no items."""
    if step not in records:
        return {}
    items = records[step]["metadata"].get("items", [])
    return {(item["task"], item["id"]): item for item in items}


def _changed(old: Item, new: Item) -> dict[str, str]:
    """An item with the answers of both models."""
    return {
        "task": old["task"],
        "id": old["id"],
        "prompt": shortened(old["prompt"]),
        "target": shortened(old["target"]),
        "before": shortened(old["answer"]),
        "after": shortened(new["answer"]),
    }
