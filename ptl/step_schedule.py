"""The part of the schedule that a step is given: prune the sizes, recover the tokens, import and report all of it."""

from __future__ import annotations

from ptl.call import Call
from ptl.config import Iteration, Prune, Schedule, check, plan
from ptl.errors import InputError

FIELDS = ("iterations", "target", "cuts", "recovery_tokens", "tokens")
NOT_GIVEN = {"target": 0.5, "recovery_tokens": 0}  # for the fields that have no default; a step reads what it is given


def schedule_of(call: Call) -> Schedule:
    """The schedule among a step's settings, checked. Raises InputError."""
    settings = {name: call.settings[name] for name in FIELDS if name in call.settings}
    return check(Schedule, NOT_GIVEN | settings, "schedule")


def iterations_until(call: Call, prune: Prune) -> list[Iteration]:
    """The plan of a run, from its first iteration to that of the step. Raises InputError for one outside of it."""
    iterations = plan(schedule_of(call), prune)
    index = call.step.iteration
    if not 1 <= index <= len(iterations):
        problem = f"{index} is outside 1..{len(iterations)}, the iterations of this schedule"
        raise InputError(problem, field="iteration")
    return iterations[:index]
