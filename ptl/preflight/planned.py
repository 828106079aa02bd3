"""What a plan comes to for a model whose sizes are known: widths are rounded as prune rounds them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from ptl.config.schedule import Iteration, Prune, Schedule, plan, removal
from ptl.errors import InputError
from ptl.model.dimensions import (
    EXPERT_MULTIPLE,
    ModelDimensions,
    experts_for,
    width_for,
    with_experts,
    with_width,
)
from ptl.units import numbered


def sizes(dimensions: ModelDimensions, schedule: Schedule, prune: Prune) -> list[tuple[Iteration, int]]:
    """The iterations, each with the parameters after it."""
    return [(iteration, after.params) for iteration, after in dimensions_after(dimensions, schedule, prune)]


def dimensions_after(
    dimensions: ModelDimensions,
    schedule: Schedule,
    prune: Prune,
) -> list[tuple[Iteration, ModelDimensions]]:
    """The iterations, each with the model's sizes after it.

    Where layers go, the parameters are what is asked for, and prune ends below.
    """
    total = removal(dimensions.params, schedule.target)
    remaining = dimensions
    planned = []
    for iteration in plan(schedule, prune):
        asked = dimensions.params - int(iteration.progress * total)
        after = replace(remaining, params=min(asked, remaining.params))
        # A target that neurons or experts cannot reach is refused elsewhere.
        with suppress(InputError):
            if iteration.unit == "neurons":
                width = width_for(remaining, asked, prune.width_multiple)
                after = remaining = with_width(remaining, width)
            elif iteration.unit == "experts":
                after = remaining = with_experts(remaining, experts_for(remaining, asked))
        planned.append((iteration, after))
    return planned


def idle_warnings(dimensions: ModelDimensions, schedule: Schedule, prune: Prune) -> list[str]:
    """A warning of iterations that find nothing left to remove, because an earlier one was rounded below their goal."""
    before = dimensions.params
    idle = []
    for iteration, after in sizes(dimensions, schedule, prune):
        if iteration.unit in ("neurons", "experts") and after == before:
            idle.append(iteration.index)
        before = after
    if not idle:
        return []
    if prune.target == "experts":
        return [
            f"one of the {dimensions.experts} experts in every layer is more than the next step of the plan, so that "
            f"nothing is left to remove for {numbered('iteration', idle)}, which will only train: set "
            "schedule.cuts=uniform, or take fewer iterations"
        ]
    rounded = f"prune.width_multiple={prune.width_multiple} rounds the widths of this model"
    lower = "lower it, "
    if dimensions.experts and prune.width_multiple != "auto" and prune.width_multiple <= EXPERT_MULTIPLE:
        rounded = f"multiples of {EXPERT_MULTIPLE} neurons, the least that experts can have, round their widths"
        lower = ""
    return [
        f"{rounded} so far down that nothing is left to remove for {numbered('iteration', idle)}, which will only "
        f"train: {lower}set schedule.cuts=uniform, or take fewer iterations"
    ]
