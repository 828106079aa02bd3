"""The schedule among a step's settings: prune has the sizes, recover the tokens, import and report all of it."""

from __future__ import annotations

from ptl.config.goal import BY_GOAL
from ptl.config.run import check
from ptl.config.schedule import Iteration, Prune, Schedule, plan
from ptl.errors import InputError
from ptl.steps.call import Call, Metadata

# Of the schedule, what may be among a step's settings.
FIELDS = ("iterations", "target", "cuts", "recovery_tokens", "tokens")
# For the fields that have no default, in steps that have no use for them.
UNUSED = {"target": 0.5, "recovery_tokens": 0}


def schedule_of(call: Call) -> Schedule:
    """The schedule among a step's settings, checked; the import's may have a goal. Raises InputError."""
    settings = schedule_settings(call.settings)
    # Only the import sees the goal and the dense model: what it found travels with the checkpoints.
    if settings.get("target") == BY_GOAL and "model" in call.inputs:
        settings["target"] = call.inputs["model"].target_params
    return check(Schedule, UNUSED | settings, "schedule")


def schedule_settings(settings: Metadata) -> Metadata:
    """The schedule's fields among a step's settings, with the goal in the place of `target`. Raises InputError."""
    fields = {name: settings[name] for name in FIELDS if name in settings}
    goal = settings.get("goal")
    if goal and fields["target"] != BY_GOAL:
        raise InputError(
            f"{fields['target']:g}, and the run has the goal {goal}",
            field="target",
            remedy="set target to 0, or goal to {}",
        )
    return fields | {"target": goal} if goal else fields


def iterations_until(call: Call, prune: Prune) -> list[Iteration]:
    """The plan of a run, from its first iteration to that of the step. Raises InputError for one outside of it."""
    iterations = plan(schedule_of(call), prune)
    index = call.step.iteration
    if not 1 <= index <= len(iterations):
        raise InputError(
            f"{index} is outside 1..{len(iterations)}, the iterations of this schedule",
            field="iteration",
        )
    return iterations[:index]
