"""The import step: the dense model, checked and published as the checkpoint that a run starts from."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from ptl import __version__
from ptl.config.export import Export
from ptl.config.flat_settings import flat_settings
from ptl.config.goal import MemoryGoal
from ptl.config.recover import TrainingData
from ptl.config.run import Calibration, Evaluate, Gate, ModelSource, check
from ptl.config.schedule import Prune, Schedule
from ptl.errors import WorkError
from ptl.evaluation import gate
from ptl.lineage import tracking
from ptl.lineage.progress import MAX_EARLIER
from ptl.lineage.run_status import StepRun
from ptl.log import say
from ptl.model import mlflow_flavor
from ptl.report import provenance, run_page
from ptl.revision import own_revision
from ptl.steps import attempts, takeover
from ptl.steps.call import Call, Metadata, write_pointer
from ptl.steps.execution import execute
from ptl.steps.inputs import BENCHMARK_ITEMS, damage_report
from ptl.steps.iterations import schedule_of
from ptl.steps.machine import empty_folder
from ptl.steps.reporting import noting_errors
from ptl.storage import store
from ptl.storage.manifest import digest_of
from ptl.storage.store import Pointer


def import_model(call: Call) -> None:
    """Check the dense model and all that the run will need of it, then publish it."""
    from ptl.export.formats import check_exports
    from ptl.model.import_checkpoint import import_checkpoint
    from ptl.preflight import preflight

    settings = call.settings
    # What waits for what was compiled: a run parameter cannot switch the gate.
    gate_settings = call.section(Gate, "gate")
    gate.check_structure(gate_settings, settings["gated"])
    # All sections that the hub, the data and the benchmarks can be checked with, before anything expensive.
    sections: dict[str, Any] = {
        "schedule": schedule_of(call),
        "prune": call.section(Prune, "prune"),
        "calibration": call.section(Calibration, "calibration"),
        "training": call.section(TrainingData, "training"),
        "evaluate": call.section(Evaluate, "evaluate"),
        "gate": gate_settings,
    }
    path = settings["model"]
    revision = settings["revision"]
    folder, dimensions = preflight.preflight(path, revision or None, *sections.values())
    check_exports(folder, [check(Export, form, "export") for form in settings["exports"]])

    # The page of the pipeline run shows what it was started with, as soon as that is known to be right; when it is
    # resumed, also data that has changed. On one machine the run's id is its title.
    run = call.step.start(settings["run_name"] if attempts.on_a_cluster() else None)
    model = ModelSource(path=path, revision=revision or None)
    run_page.describe(
        run,
        flat_settings(to_jsonable_python({"model": model, **sections})),
        own_revision(),
        provenance.data_sets(*[sections[name] for name in ("calibration", "training", "evaluate")]),
    )
    _name_earlier_runs(run, settings["earlier_runs"])
    # First: they are cheap, and a benchmark that does not load is known before the model is copied.
    if sections["training"].decontaminate.tasks:
        _commit_items(run, sections["evaluate"], settings["seed"])

    def work(_src: None, dst: Path, _run: StepRun) -> Metadata:
        # From the folder that was checked: on the hub the model may have changed since.
        import_checkpoint(str(folder), None, dst)
        mlflow_flavor.write(dst)
        return {
            "model": path,
            "revision": revision,
            **goal,
            "params": dimensions.params,
            "versions": _versions(),
            "host": platform.node(),
        }

    goal = _goal(sections["schedule"], sections["prune"], folder)
    # The import has no parent: its key is the model.
    record = execute(call.step, None, {"source": model, **goal}, work)
    write_pointer(call.outputs["out"], record["pointer"])


def _name_earlier_runs(run: StepRun, earlier_runs: str) -> None:
    """Let the run's steps know by its page in MLflow which unfinished runs they may take over from."""
    names = re.findall(r"[^\s,]+", earlier_runs)[:MAX_EARLIER]
    for name in names:
        try:
            if store.committed(run.root, name, run.step) is None:
                say(run.step, f"earlier run {name} has no steps here that could be taken over")
        except WorkError as error:
            say(run.step, f"earlier run {name}: {error}")
    if names:
        tracking.name_earlier_runs(run, names)


def _commit_items(run: StepRun, evaluate: Evaluate, seed: int) -> None:
    """Publish the benchmarks' items for all recoveries of the run, which find their record by its id."""
    from ptl.evaluation.items import write_items

    with noting_errors(run):
        items = dataclasses.replace(run, step=BENCHMARK_ITEMS)
        key = takeover.key("", {"evaluate": evaluate, "seed": seed})
        committed = store.committed(run.root, run.run, items.step, key.digest)
        if committed is None:
            takeover.withdraw_outdated(items, key)
        elif damage_report(committed["pointer"]["digest"]).exists():
            store.withdraw(run.root, run.run, items.step)
            damage_report(committed["pointer"]["digest"]).unlink()
        else:
            return
        folder = empty_folder(run.step)
        number = write_items(folder, evaluate, seed)
        location = f"{run.artifact_uri}/{os.urandom(6).hex()}"
        pointer = Pointer(location, digest_of(store.publish(folder, location)), run_id=run.run_id, step=items.step)
        store.commit(run.root, run.run, items.step, takeover.record(key, pointer, {"stage": BENCHMARK_ITEMS}))
        say(run.step, f"{number:,} items of benchmarks, which recovery does not train on")


def _goal(schedule: Schedule, prune: Prune, folder: Path) -> Metadata:
    """What the steps that follow, and the report, need of a goal; nothing where the target is a number."""
    from ptl.preflight import target

    if not isinstance(schedule.target, MemoryGoal):
        return {}
    return {
        "target_params": target.params(schedule.target, prune, folder),
        "goal": target.record(schedule.target, folder),
    }


def _versions() -> dict[str, str]:
    """Of what a result may depend on."""
    from importlib.metadata import version

    # An image may have other ones than the machine that compiled the pipeline.
    return {
        "ptl": __version__,
        "python": platform.python_version(),
        **{library: version(library) for library in ("torch", "transformers", "safetensors")},
    }
