"""The prune step: one iteration's share of neurons or layers is removed."""

from __future__ import annotations

from ptl.config.run import Calibration
from ptl.config.schedule import Prune, removal
from ptl.evaluation import gate
from ptl.model import mlflow_flavor
from ptl.steps.call import Call, iterations_until, schedule_of
from ptl.steps.step import Step, limit_threads


def prune(call: Call) -> None:
    """Remove this iteration's share of neurons or layers."""
    # After a stop by the gate there is nothing to prune.
    if call.stopped:
        return call.pass_through()
    model = call.inputs["model"]
    pruning = call.section(Prune, "prune")
    calibration = call.section(Calibration, "calibration")
    seed = call.settings["seed"]
    schedule = schedule_of(call)
    iteration = iterations_until(call.iteration, schedule, pruning)[-1]

    # Parameters to end with: as planned, but a rejection may have halved the step.
    removed_at_end = removal(model.original_params, schedule.target)
    planned_goal = model.original_params - int(iteration.progress * removed_at_end)
    goal = gate.goal(model.params, planned_goal, model.gate)

    key = {"goal": goal, "unit": iteration.unit, "prune": pruning, "calibration": calibration, "seed": seed}
    with Step(call, key=key) as step:
        if step.record is None:
            # torch is imported by the work alone: a step that was done before needs none.
            from ptl.pruning.prune import prune_checkpoint

            limit_threads(model.params)
            source = step.fetch(model)
            report = prune_checkpoint(
                source, step.folder, pruning, calibration, unit=iteration.unit, goal=goal, seed=seed
            )
            mlflow_flavor.write(step.folder)
            step.publish(report)
    return None
