"""What the pages of registered versions say: where a checkpoint comes from, what it scored, and how to get it."""

from __future__ import annotations

from typing import Any

from ptl.config.dag import arm_of, iteration_of
from ptl.lineage import registry
from ptl.lineage.run_status import StepRun
from ptl.steps.call import Metadata
from ptl.steps.metrics import accuracy
from ptl.storage.store import Pointer, Record
from ptl.units import size

Records = dict[str, Record]  # by step


def score_tags(scores: Metadata, checkpoint: Pointer) -> Metadata:
    """The tags of a version that say how good and how small it is."""
    first = scores["tasks"][0]
    # Tags are texts: more digits would only be noise.
    numbers = {name: f"{value:.4g}" for name, value in accuracy(first).items() if name != "items"}
    return {
        "task": first["task"],
        "items": first["items"],
        **numbers,
        "share_removed": f"{_share_removed(checkpoint):.4f}",
    }


def is_registered(record: Record) -> bool:
    """Whether a record is that of an evaluation whose own checkpoint was accepted as a version."""
    metadata = record["metadata"]
    if metadata["stage"] != "evaluate":
        return False
    accepted = metadata["accepted"]
    # What is passed on after a rejection was scored by an earlier step.
    is_own = accepted["digest"] == metadata["checkpoint"]["digest"]
    return bool(accepted["model_version"] and is_own)


def describe(run: StepRun, records: Records, registered_model: str) -> None:
    """Give the versions of a run, of which `records` has all steps, their descriptions, and tags of their lineage."""
    registered = {step: record["metadata"] for step, record in records.items() if is_registered(record)}
    numbers = {
        metadata["accepted"]["digest"]: metadata["accepted"]["model_version"] for metadata in registered.values()
    }
    for step, metadata in registered.items():
        prune = records[step.replace("evaluate", "prune")]
        parent = numbers.get(prune["pointer"]["parent_digest"], "")
        criterion = prune["metadata"]["criterion"]
        checkpoint = Pointer(**metadata["accepted"])
        number = checkpoint.model_version
        text = _description(f"{registered_model}/{number}", step, metadata, criterion, parent, run.run)
        tags = {"criterion": criterion, "parent_version": parent or "the dense model"}
        tags |= score_tags(metadata["scores"], checkpoint)
        registry.describe(registered_model, number, checkpoint.model_id, text, tags)


def register_exports(run: StepRun, records: Records, final: Pointer, registered_model: str) -> None:
    """Each form of the final checkpoint as a version, found by the tag `ptl.export`; repeating it changes nothing."""
    for step, record in records.items():
        metadata = record["metadata"]
        if metadata["stage"] != "export":
            continue
        name = metadata["export"]["name"]
        pointer = Pointer(**record["pointer"])
        parent = final.model_version
        tags = {"step": step, "export": name, "parent_version": parent or "the dense model"}
        tags |= score_tags(metadata["models"]["final"], pointer)
        version = registry.register(run, registered_model, pointer, tags)
        text = (
            f"**{_score(metadata['models']['final']['tasks'][0])}** as {name}, {size(metadata['bytes'])}: a form of "
            f"{f'version {parent}' if parent else 'the dense model'}.\n\n"
            f"Run `{run.run}`, made by `{step}`. Get it: `ptl fetch models:/{registered_model}/{version} DIR`."
        )
        registry.describe(registered_model, version, pointer.model_id, text, tags)


def _share_removed(checkpoint: Pointer) -> float:
    return 1 - checkpoint.params / checkpoint.original_params


def _description(
    version: str,  # NAME/NUMBER
    step: str,
    metadata: Metadata,
    criterion: str,
    parent: str,
    run: str,
) -> str:
    """A version's description, in Markdown."""
    checkpoint = Pointer(**metadata["accepted"])
    where = f"iteration {iteration_of(step)} of the loop"
    if arm_of(step) == "control":
        where = "the control (one-shot pruning)"
    made_from = f"version {parent}" if parent else "the dense model"
    what = (
        f"**{_score(metadata['scores']['tasks'][0])}** with {checkpoint.params:,} parameters "
        f"({_share_removed(checkpoint):.1%} removed): {where}, made from {made_from} by the criterion `{criterion}`."
    )
    how = (
        f"Run `{run}`, scored by `{step}`. Get it: `ptl fetch models:/{version} DIR`, or "
        f'`mlflow.transformers.load_model("models:/{version}")`.'
    )
    return f"{what}\n\n{how}"


def _score(task: dict[str, Any]) -> str:
    """A task's score, with its interval where it has one."""
    if task["low"] is None:
        return f"{task['metric']} {task['accuracy']:.4g} on {task['task']}"
    low, high = 100 * task["low"], 100 * task["high"]
    return f"{task['accuracy']:.1%} (interval {low:.1f} to {high:.1f}) on {task['items']} items of {task['task']}"
