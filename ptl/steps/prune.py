"""The prune step: one iteration's share of a model's widths, experts or layers is removed."""

from __future__ import annotations

from ptl.config.chat import Chat
from ptl.config.run import Calibration
from ptl.config.schedule import Prune, removal
from ptl.evaluation import gate
from ptl.model import checkpoint
from ptl.steps import answers
from ptl.steps.call import Call, Metadata, iterations_until, schedule_of
from ptl.steps.step import Step


def prune(call: Call) -> None:
    """Remove this iteration's share."""
    # After a stop by the gate there is nothing to prune.
    if call.stopped:
        return call.pass_through()
    arguments = _arguments(call)
    with Step(call, key=arguments, reads=answers.reads(arguments["calibration"])) as step:
        if step.record is None:
            # torch is imported by the work alone: a step that was done before needs none.
            from ptl.pruning.prune import prune_checkpoint

            # What the result depends on is what the work is given.
            source = step.fetch_model()
            text = answers.calibration(step, arguments["calibration"], arguments["chat"])
            report = prune_checkpoint(source, step.folder, **arguments | {"calibration": text})
            checkpoint.write_mlflow_model(step.folder)
            step.publish(report)
    return None


def _arguments(call: Call) -> Metadata:
    """Settings of the pruning, and how many parameters it leaves."""
    model = call.inputs["model"]
    pruning = call.section(Prune, "prune")
    schedule = schedule_of(call)
    iteration = iterations_until(call.iteration, schedule, pruning)[-1]
    removed_at_end = removal(model.original_params, schedule.target)
    planned = model.original_params - int(iteration.progress * removed_at_end)
    return {
        # As planned, but a rejection may have halved the step.
        "goal": gate.goal(model.params, planned, model.gate),
        # What the widths are chosen for, and which an earlier iteration has chosen
        "end": model.original_params - removed_at_end,
        "chosen": model.chosen,
        "unit": iteration.unit,
        "prune": pruning,
        "calibration": call.section(Calibration, "calibration"),
        "chat": call.section(Chat, "chat"),
        "seed": call.settings["seed"],
    }
