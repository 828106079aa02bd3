"""The prune step: one iteration's share of neurons or layers is removed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ptl.config.run import Calibration
from ptl.config.schedule import Prune, removal
from ptl.evaluation import gate
from ptl.lineage.run_status import StepRun
from ptl.model import mlflow_flavor
from ptl.steps.call import Call, Metadata, passes_through, write_pointer
from ptl.steps.execution import execute
from ptl.steps.iterations import iterations_until, schedule_of
from ptl.steps.machine import limit_threads


def prune(call: Call) -> None:
    """Remove this iteration's share of neurons or layers."""
    # After a stop by the gate there is nothing to prune.
    if passes_through(call, "out"):
        return
    parent = call.inputs["model"]
    seed = call.settings["seed"]
    pruning = call.section(Prune, "prune")
    calibration = call.section(Calibration, "calibration")
    iteration = iterations_until(call, pruning)[-1]

    # Parameters to end with: as planned, but a rejection may have halved the step.
    original_params = parent.original_params
    removed_at_end = removal(original_params, schedule_of(call).target)
    planned_goal = original_params - int(iteration.progress * removed_at_end)
    goal = gate.goal(parent.params, planned_goal, parent.gate)

    def work(src: Path, dst: Path, _run: StepRun) -> Metadata:
        # torch is imported by the work alone: a step that was done before needs none.
        from ptl.pruning.prune import prune_checkpoint

        limit_threads(parent.params)
        report = prune_checkpoint(src, dst, pruning, calibration, unit=iteration.unit, goal=goal, seed=seed)
        mlflow_flavor.write(dst)
        return dataclasses.asdict(report)

    # All that the result depends on, beside the parent.
    settings = {
        "goal": goal,
        "unit": iteration.unit,
        "prune": pruning,
        "calibration": calibration,
        "seed": seed,
    }
    record = execute(call.step, parent, settings, work)
    write_pointer(call.outputs["out"], record["pointer"])
