"""The export step: the final checkpoint in a format for another runtime, scored beside that of the dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.chat import Chat
from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate, Gate
from ptl.evaluation import paired
from ptl.log import say
from ptl.steps import answers
from ptl.steps.call import Call, Metadata
from ptl.steps.records import accuracy
from ptl.steps.step import Step

Items = list[Metadata]  # of an evaluation


def export(call: Call) -> None:
    """Write the final checkpoint in another form, and score that.

    The same is done to the dense model, whose form is not kept: what the form costs and what pruning costs are then
    separate numbers.
    """
    key = {
        "export": call.section(Export, "export"),
        "dense": call.inputs["dense"].digest,
        "calibration": call.section(Calibration, "calibration"),
        "evaluate": call.section(Evaluate, "evaluate"),
        "chat": call.section(Chat, "chat"),
        "gate": call.section(Gate, "gate"),
        "seed": call.settings["seed"],
    }
    with Step(call, key=key, reads=answers.reads(key["calibration"])) as step:
        record = step.record or step.publish(_exported(step, step.fetch_model()))
        shown = {name: record.metadata[name] for name in ("accuracy", "bytes")}
        call.outputs["metrics"].metadata.update(shown)


def _exported(step: Step, source: Path) -> Metadata:
    """Write and score both models' forms; what the record says of them."""
    from ptl.export import formats

    settings, call, folder = step.settings, step.call, step.folder
    form: Export = settings["export"]
    final, dense = call.inputs["model"], call.inputs["dense"]
    # A run that ends with the dense model has one form only.
    folders = (
        {"final": source}
        if final.digest == dense.digest
        else {"dense": step.fetch(dense), "final": source}
    )
    # Beside the step's folder, with its name in front: a retry removes those of killed attempts.
    made = {
        name: folder if name == "final" else folder.with_name(f"{folder.name}-{name}")
        for name in folders
    }
    text = answers.calibration(step, settings["calibration"], settings["chat"])
    iterations = call.settings["iterations"]
    scored = {
        "dense": step.evaluation_of(dense, iterations),
        "final": step.evaluation_of(final, iterations),
    }
    references = {name: step.fetch_items(record) for name, record in scored.items()}
    report, items = formats.write_and_score(
        folders, made, form, text, settings["evaluate"], settings["chat"], settings["seed"]
    )
    for note in report["notes"]:
        say(call.step, note)
    model = report["models"]["final"]
    return {
        "params": final.params,
        "bytes": model["bytes"],
        **accuracy(model["tasks"][0]),
        "export": {**form.model_dump(), "name": form.name},
        **report,
        "scored": {name: record.step for name, record in scored.items()},
        "pairs": _pairs(items, _limited(references, items["final"], form), settings["gate"]),
    }


def _limited(items: dict[str, Items], exported: Items, form: Export) -> dict[str, Items]:
    """The items of the loop's evaluations; of those with more items than a limited form, only the form's own."""
    if form.limit is None:
        return items
    keys = {(item["task"], item["id"]) for item in exported}
    return {
        name: [item for item in its if (item["task"], item["id"]) in keys]
        for name, its in items.items()
    }


def _pairs(exported: dict[str, Items], scored: dict[str, Items], gate: Gate) -> Metadata:
    """The final model's form against others, item by item: task -> reference -> numbers.

    References: `final` and `dense` as they were trained, and `dense_export`, the dense model in the same form.
    """
    references = dict(scored)
    if "dense" in exported:
        references["dense_export"] = exported["dense"]
    tasks = list(dict.fromkeys(item["task"] for item in exported["final"]))
    pairs: Metadata = {task: {} for task in tasks}
    for task in tasks:
        for name, items in references.items():
            outcomes = paired.match(items, exported["final"], task)
            pairs[task][name] = dataclasses.asdict(
                paired.paired(outcomes, gate.margin, gate.alpha / len(tasks))
            )
    return pairs
