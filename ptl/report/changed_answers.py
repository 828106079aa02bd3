"""What changed in the answers from one checkpoint to another: paired comparisons, regressions and improvements."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ptl.report.result_rows import Records, Row, evaluations

Item = dict[str, Any]  # of a benchmark, with the model's answer; `correct` is 0 or 1
Key = tuple[str, str]  # task and id of an item

MAX_CHANGED = 250  # regressions, and improvements, that the report shows: a page of a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer that the report shows


def final_step(records: Records, final_digest: str) -> str:
    """The evaluate step of the loop that scored the final checkpoint; empty where none did."""
    step = ""
    for name, record in evaluations(records, "loop").items():
        checkpoint = record["metadata"]["checkpoint"]
        # It may have been scored twice: the last time counts.
        if checkpoint["digest"] == final_digest:
            step = name
    return step


def paired_comparisons(records: Records, final: str, gate: Row) -> Row:
    """The final checkpoint against the dense one and against the control, item by item, on the first task.

    `final` is the step that scored it, `gate` the config of the gate.
    """
    from ptl.evaluation.paired import paired

    if not final:
        return {}
    task = _first_task(final, records)
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
            comparison = paired(old, new, gate["margin"], gate["alpha"])
            comparisons[label] = asdict(comparison)
    return comparisons


def examples(records: Records, final: str) -> Row:
    """Items whose outcome changed from the dense model to the final one, where the records carry their items."""
    after = _items(final, records)
    num_compared = 0
    regressions, improvements = [], []
    for key, old in _items("evaluate-0", records).items():
        if key not in after:
            continue
        num_compared += 1
        new = after[key]
        # Right before and wrong after, or the other way round.
        if old["correct"] > new["correct"]:
            regressions.append(_changed(old, new))
        elif new["correct"] > old["correct"]:
            improvements.append(_changed(old, new))
    if not num_compared or final == "evaluate-0":
        return {}
    return {
        "step": final,
        "compared": num_compared,
        "num_regressions": len(regressions),
        "num_improvements": len(improvements),
        # Those that the page has room for.
        "regressions": regressions[:MAX_CHANGED],
        "improvements": improvements[:MAX_CHANGED],
    }


def shortened(text: str) -> str:
    """A text as the report shows it, of at most `MAX_TEXT` characters."""
    if len(text) <= MAX_TEXT:
        return text
    return text[:MAX_TEXT] + " […]"


def _first_task(step: str, records: Records) -> str:
    """The benchmark whose score is the run's accuracy."""
    tasks = records[step]["metadata"]["scores"]["tasks"]
    return str(tasks[0]["task"])


def _items(step: str, records: Records) -> dict[Key, Item]:
    """The items of an evaluate step by task and id; empty where it has no record, or its record no items."""
    if step not in records:
        return {}
    items = records[step]["metadata"].get("items", [])
    return {(item["task"], str(item["id"])): item for item in items}


def _changed(old: Item, new: Item) -> dict[str, str]:
    """An item with the answers of both models."""
    return {
        "task": str(old["task"]),
        "id": str(old["id"]),
        "prompt": _text(old, "prompt"),
        "target": _text(old, "target"),
        "before": _text(old, "answer"),
        "after": _text(new, "answer"),
    }


def _text(item: Item, key: str) -> str:
    """A text of an item; empty where it has none, as the answer of one that is judged by likelihood."""
    value = item.get(key)
    return "" if value is None else shortened(str(value))
