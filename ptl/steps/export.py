"""The export step: the final checkpoint in a format for another runtime, scored beside that of the dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate, Gate
from ptl.errors import WorkError
from ptl.evaluation import paired
from ptl.log import say
from ptl.steps.call import Call, Metadata
from ptl.steps.reporting import accuracy
from ptl.steps.step import Step, limit_threads
from ptl.storage.store import Pointer, Record

Items = list[Metadata]  # of an evaluation


def export(call: Call) -> None:
    """Write the final checkpoint in another form, and score that.

    The same is done to the dense model, whose form is not kept: what the form costs and what pruning costs are then
    separate numbers.
    """
    form = call.section(Export, "export")
    calibration = call.section(Calibration, "calibration")
    evaluate = call.section(Evaluate, "evaluate")
    gate = call.section(Gate, "gate")
    key = {
        "export": form,
        "dense": call.inputs["dense"].digest,
        "calibration": calibration,
        "evaluate": evaluate,
        "gate": gate,
        "seed": call.settings["seed"],
    }
    with Step(call, key=key) as step:
        if step.record is None:
            source = step.fetch(call.inputs["model"])
            step.publish(_exported(step, source, form, calibration, evaluate, gate))
        assert step.record is not None
        metadata = step.record.metadata
        call.outputs["metrics"].metadata.update({name: metadata[name] for name in ("accuracy", "bytes")})


def _exported(
    step: Step,
    source: Path,
    form: Export,
    calibration: Calibration,
    evaluate: Evaluate,
    gate: Gate,
) -> Metadata:
    """Write and score both models' forms; what the record says of them."""
    from ptl.export import formats

    call, folder = step.call, step.folder
    final, dense = call.inputs["model"], call.inputs["dense"]
    limit_threads(final.params)
    # A run that ends with the dense model has one form only.
    folders = {"final": source} if final.digest == dense.digest else {"dense": step.fetch(dense), "final": source}
    # Beside the step's folder, with its name in front: a retry removes those of killed attempts.
    made = {name: folder if name == "final" else folder.with_name(f"{folder.name}-{name}") for name in folders}
    report, items = formats.write_and_score(folders, made, form, calibration, evaluate, call.settings["seed"])
    for note in report.notes:
        say(call.step, note)
    scored = {"dense": _evaluation(step, dense), "final": _evaluation(step, final)}
    return {
        "params": final.params,
        "bytes": report.models["final"]["bytes"],
        **accuracy(report.models["final"]["tasks"][0]),
        "export": {**form.model_dump(), "name": form.name},
        **dataclasses.asdict(report),
        "scored": {name: record.step for name, record in scored.items()},
        "pairs": _pairs(items, _references(step, scored, items["final"], form), gate),
    }


def _evaluation(step: Step, checkpoint: Pointer) -> Record:
    """The record of the loop's evaluation that scored a checkpoint."""
    for iteration in range(step.call.settings["iterations"] + 1):
        record = step.find(f"evaluate-{iteration}")
        if record and record.metadata["checkpoint"]["digest"] == checkpoint.digest:
            return record
    raise WorkError(
        f"no evaluation of this run has scored {checkpoint.uri}",
        field="model",
        remedy="start a new run, or restore the records of this one",
    )


def _references(step: Step, scored: dict[str, Record], exported: Items, form: Export) -> dict[str, Items]:
    """The items of the loop's evaluations; of those with more items than a limited form, only the form's own."""
    items = {name: step.fetch_items(record) for name, record in scored.items()}
    if form.limit is None:
        return items
    keys = {(item["task"], item["id"]) for item in exported}
    return {name: [item for item in its if (item["task"], item["id"]) in keys] for name, its in items.items()}


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
            pairs[task][name] = dataclasses.asdict(paired.paired(*outcomes, gate.margin, gate.alpha / len(tasks)))
    return pairs
