"""What a plan comes to for a model whose sizes are known: widths are rounded as prune rounds them."""

from __future__ import annotations

from contextlib import suppress

from ptl.config.schedule import Iteration, Prune, Schedule, plan, removal
from ptl.errors import InputError
from ptl.model.dimensions import ModelDimensions, width_for, with_width
from ptl.units import numbered


def sizes(dimensions: ModelDimensions, schedule: Schedule, prune: Prune) -> list[tuple[Iteration, int]]:
    """The iterations, each with the parameters after it.

    Where layers go, or `auto` chooses by the measured loss, these are what is asked for, and prune ends below.
    """
    total = removal(dimensions.params, schedule.target)
    remaining = dimensions
    planned = []
    for iteration in plan(schedule, prune):
        asked = dimensions.params - int(iteration.progress * total)
        after = min(asked, remaining.params)
        if iteration.unit == "neurons":
            # A target that neurons cannot reach is refused elsewhere.
            with suppress(InputError):
                width = width_for(remaining, asked, prune.width_multiple, prune.tensor_parallel)
                remaining = with_width(remaining, width)
                after = remaining.params
        planned.append((iteration, after))
    return planned


def idle_warnings(dimensions: ModelDimensions, schedule: Schedule, prune: Prune) -> list[str]:
    """A warning of iterations that find nothing left to remove, because an earlier one was rounded below their goal."""
    before = dimensions.params
    idle = []
    for iteration, after in sizes(dimensions, schedule, prune):
        if iteration.unit == "neurons" and after == before:
            idle.append(iteration.index)
        before = after
    if not idle:
        return []
    return [
        f"prune.width_multiple={prune.width_multiple} rounds the widths of this model so far down that nothing is left "
        f"to remove for {numbered('iteration', idle)}, which will only train: lower it, set "
        "schedule.cuts=uniform, or take fewer iterations"
    ]
