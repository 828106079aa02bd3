"""The export step: the final checkpoint in a form for another runtime, scored beside that of the dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.export import Export
from ptl.config.run import Calibration, Evaluate, Gate
from ptl.errors import WorkError
from ptl.evaluation import paired
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.steps.call import Call, Metadata, write_pointer
from ptl.steps.execution import execute
from ptl.steps.inputs import Items, fetch, fetch_items
from ptl.steps.machine import limit_threads
from ptl.steps.metrics import accuracy
from ptl.storage import store
from ptl.storage.store import Pointer, Record


def export(call: Call) -> None:
    """Write the final checkpoint in another form, and score that.

    The same is done to the dense model, whose form is not kept: what the form costs and what pruning costs are then
    separate numbers.
    """
    final = call.inputs["model"]
    dense = call.inputs["dense"]
    seed = call.settings["seed"]
    form = call.section(Export, "export")
    calibration = call.section(Calibration, "calibration")
    evaluate = call.section(Evaluate, "evaluate")
    gate = call.section(Gate, "gate")

    def work(src: Path, dst: Path, run: StepRun) -> Metadata:
        from ptl.export import formats

        limit_threads(final.params)
        # A run that ends with the dense model has one form only.
        folders = {"final": src} if final.digest == dense.digest else {"dense": fetch(dense), "final": src}
        # Beside `dst`, with its name in front: a retry starts from empty folders and removes those of killed attempts.
        made = {name: dst if name == "final" else dst.with_name(f"{dst.name}-{name}") for name in folders}
        report, items = formats.write_and_score(folders, made, form, calibration, evaluate, seed)
        for note in report.notes:
            say(call.step.name, note)
        scored = {name: _evaluation(run, checkpoint, call.settings["iterations"]) for name, checkpoint in compared}
        first = report.models["final"]["tasks"][0]
        return {
            "params": final.params,
            "bytes": report.models["final"]["bytes"],
            **accuracy(first),
            "export": {**form.model_dump(), "name": form.name},
            **dataclasses.asdict(report),
            "scored": {name: record["step"] for name, record in scored.items()},
            "pairs": _pairs(items, _references(scored, items["final"], form), gate),
        }

    compared = [("dense", dense), ("final", final)]
    settings = {
        "export": form,
        "dense": dense.digest,
        "calibration": calibration,
        "evaluate": evaluate,
        "gate": gate,
        "seed": seed,
    }
    record = execute(call.step, final, settings, work)
    write_pointer(call.outputs["out"], record["pointer"])
    metadata = record["metadata"]
    call.outputs["metrics"].metadata.update({name: metadata[name] for name in ("accuracy", "bytes")})


def _evaluation(run: StepRun, checkpoint: Pointer, iterations: int) -> Record:
    """The record of the loop's evaluation that scored a checkpoint."""
    for iteration in range(iterations + 1):
        record = store.committed(run.root, run.run, f"evaluate-{iteration}")
        if record and record["metadata"]["checkpoint"]["digest"] == checkpoint.digest:
            return record
    raise WorkError(
        f"no evaluation of this run has scored {checkpoint.uri}",
        field="model",
        remedy="start a new run, or restore the records of this one",
    )


def _references(scored: dict[str, Record], exported: Items, form: Export) -> dict[str, Items]:
    """The items of the loop's evaluations; of those with more items than a limited form, only the form's own."""
    items = {name: fetch_items(record) for name, record in scored.items()}
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
