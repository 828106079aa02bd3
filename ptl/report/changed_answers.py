"""What changed in the answers from one checkpoint to another: paired comparisons, regressions and improvements."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ptl.errors import InputError
from ptl.evaluation.paired import Item, match, paired
from ptl.log import say
from ptl.report.result_rows import Records, Row

MAX_CHANGED = 250  # regressions, and improvements, that the report shows: a page of a megabyte at most
MAX_TEXT = 600  # characters of a prompt or an answer that the report shows
REFERENCES = {"dense": "evaluate-0", "control": "control-evaluate"}  # what the final checkpoint is compared with

Items = list[Item]  # of an evaluation


def paired_comparisons(records: Records, final: str, gate: Row) -> Row:
    """The final checkpoint against the dense one and the control, item by item: task -> `dense`, `control` -> numbers.

    `final` is the step that scored it, `gate` the config of the gate. A task without right and wrong answers has none.
    The first task is tested as the gate tests it. The others share the significance level as in `ptl compare`.
    """
    if not final:
        return {}
    after = _items(final, records)
    tested = {item["task"] for item in after}
    tasks = [score["task"] for score in records[final]["metadata"]["scores"]["tasks"]]
    comparisons: Row = {task: {} for task in tasks}
    for label, step in REFERENCES.items():
        # Where no iteration passed, the dense model is the final one.
        if step == final:
            continue
        outcomes = _outcomes(_items(step, records), after)
        for task in tasks:
            # Either evaluation may have no items: then there is nothing to compare.
            if task in outcomes:
                alpha = gate["alpha"] if task == tasks[0] else gate["alpha"] / len(tested)
                comparisons[task][label] = asdict(paired(*outcomes[task], gate["margin"], alpha))
    return comparisons


def _outcomes(before: Items, after: Items, warn: bool = True) -> dict[str, tuple[list[int], list[int]]]:
    """By task, the 0/1 outcomes of the items that both evaluations have; none of a task that asked them otherwise."""
    outcomes = {}
    for task in dict.fromkeys(item["task"] for item in before):
        if any(item["task"] == task for item in after):
            try:
                outcomes[task] = match(before, after, task)
            except InputError as error:
                if warn:
                    say("report", f"warning: {task} is not compared: {error.problem}")
    return outcomes


def examples(records: Records, final: str) -> Row:
    """Items whose outcome changed from the dense model to the final one, where the records carry their items."""
    after = _items(final, records)
    before = _items("evaluate-0", records)
    tasks = _outcomes(before, after, warn=False)  # `paired_comparisons` has warned
    if not tasks or final == "evaluate-0":
        return {}
    answers = {(item["task"], item["id"]): item for item in after}
    compared = [(old, answers[old["task"], old["id"]]) for old in before if old["task"] in tasks]
    regressions, improvements = [], []
    for old, new in compared:
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


def _items(step: str, records: Records) -> Items:
    """The items of an evaluate step; none where it has no record, or its record no items."""
    return records[step]["metadata"].get("items", []) if step in records else []


def _changed(old: Item, new: Item) -> Row:
    """An item with the answers of both models, and whether the token limit cut them."""
    return {
        "task": old["task"],
        "id": old["id"],
        "prompt": shortened(old["prompt"]),
        "target": shortened(old["target"]),
        "before": shortened(old["answer"]),
        "after": shortened(new["answer"]),
        "before_truncated": old["truncated"],
        "after_truncated": new["truncated"],
    }
