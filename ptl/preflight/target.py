"""What a target comes to for a model: a goal in memory as a number of parameters, and the sizes after each iteration.

Only config.json is read.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptl.config.run import Config
from ptl.config.schedule import Iteration, MemoryGoal, Prune, Schedule, plan, removal
from ptl.errors import InputError
from ptl.model import hub, widths
from ptl.model.dimensions import ModelDimensions, check_unit, experts_for, layers_for, width_for
from ptl.preflight.forecast_model import Shape, shape_of
from ptl.units import counted, memory_beside

MOST = 0.95  # share of the parameters that may go
TOKENS = 4096  # of each sequence in the KV cache, where a goal does not say

SizePath = list[tuple[Iteration, ModelDimensions]]  # a model's sizes after each iteration


def resolved(schedule: Schedule, prune: Prune, folder: Path) -> Schedule:
    """The schedule with a number as its target, for the model whose config.json is in `folder`. Raises as `params`."""
    goal = schedule.target
    if not isinstance(goal, MemoryGoal):
        return schedule
    return schedule.model_copy(update={"target": float(params(goal, prune, folder))})


def with_number(config: Config) -> Config:
    """The config with a number as its schedule's target; of a model on the hub only config.json is read."""
    if not isinstance(config.schedule.target, MemoryGoal):
        return config
    folder = hub.locate(config.model.path, config.model.revision, ["config.json"])
    return config.model_copy(update={"schedule": resolved(config.schedule, config.prune, folder)})


def params(goal: MemoryGoal, prune: Prune, folder: Path) -> int:
    """The parameters of the largest model that fits into a goal's memory, whatever `prune` removes.

    Only layers take their KV cache with them for sure: of width the loss decides whether KV heads go, so that all of
    them count, and the model that is left may need less than the goal.
    Raises InputError for a goal that the dense model has already reached, or that the KV cache alone exceeds.
    """
    shape = shape_of(str(folder))
    model = shape.dimensions
    cache = _cached(goal, shape)
    excess = model.params + cache - goal.bytes // goal.itemsize  # numbers
    if excess <= 0:
        raise InputError(
            f"the dense model reaches {goal.memory} already: it needs {_needed(goal, shape)}",
            field="schedule.target.memory",
            remedy="lower it, or give a share of the parameters to remove",
        )
    if prune.target == "layers":
        layers = math.ceil(excess / (model.params_per_layer + cache // model.layers))
        excess = layers * model.params_per_layer
    if excess >= model.params:
        raise InputError(
            f"{goal.memory} cannot be reached: the dense model needs {_needed(goal, shape)}, of which "
            f"{memory_beside(cache * goal.itemsize, goal.memory)} are the KV cache: only removed layers are sure to "
            "shrink it",
            field="schedule.target.memory",
            remedy="raise it, or lower sequences or tokens"
            + ("" if prune.target == "layers" else ", or remove layers (prune.target=layers)"),
        )
    return model.params - excess


def record(goal: MemoryGoal, folder: Path) -> dict[str, Any]:
    """A goal with what it takes to say whether a checkpoint reaches it; for the import step's record."""
    shape = shape_of(str(folder))
    return {
        "memory": goal.memory,
        "bytes": goal.bytes,
        "dense": (shape.params + _cached(goal, shape)) * goal.itemsize,
        "sequences": goal.sequences,
        "tokens": _tokens(goal, shape),
        "dtype": goal.dtype,
        "itemsize": goal.itemsize,
        "cached_numbers_per_layer": shape.cached_numbers // shape.dimensions.layers,
    }


def sentence(config: Config) -> str:
    """What a goal means for the model: the parameters to get down to, and what it needs now; empty without a goal."""
    goal = config.schedule.target
    if not isinstance(goal, MemoryGoal):
        return ""
    folder = hub.locate(config.model.path, config.model.revision, ["config.json"])
    shape = shape_of(str(folder))
    return (
        f"schedule.target: {goal.memory} for weights and a KV cache for {counted(goal.sequences, 'sequence')} of "
        f"{_tokens(goal, shape):,} tokens in {goal.dtype}: at most {params(goal, config.prune, folder):,} parameters; "
        f"the dense model needs {_needed(goal, shape)}"
    )


def to_remove(params: int, schedule: Schedule) -> int:
    """How many of a model's parameters must go. Raises InputError for a target that leaves all or nothing."""
    total = removal(params, schedule.target)
    if not 0 < total < params:
        raise InputError(
            f"{schedule.target:g} is no size below the model's own {params:,} parameters",
            field="schedule.target",
            remedy="give a share between 0 and 1, or the number of parameters to end with",
        )
    if total > MOST * params:
        raise InputError(
            f"{schedule.target:g}: hardly anything is left, {params - total:,} of {params:,} parameters",
            field="schedule.target",
            remedy=f"remove at most {MOST:g} of them, or take a smaller model",
        )
    return total


def possible_paths(model: ModelDimensions, schedule: Schedule, prune: Prune) -> list[SizePath]:
    """The iterations, each with the model's sizes after it, rounded as prune rounds them: a path for each possible end.

    The first prune step chooses the end by the loss, and the first where that ranks nothing. All but width has one
    path. Raises InputError as `to_remove`, for a target that neurons, widths, experts or layers cannot reach, and for a
    repair of experts.
    """
    iterations = plan(schedule, prune)
    units = {iteration.unit for iteration in iterations}
    for unit in units:
        check_unit(model.experts, model.narrowable, unit, prune.repair)
    total = to_remove(model.params, schedule)
    ends = [model]
    if "width" in units:
        ends = widths.candidates(model, model.params - total, prune.width_multiple, prune.wanted)
    paths = []
    for end in ends:
        remaining: ModelDimensions = model
        path: SizePath = []
        for iteration in iterations:
            remaining = _after(
                remaining, iteration, model.params - int(iteration.progress * total), end, prune
            )
            path.append((iteration, remaining))
        paths.append(path)
    return paths


def ends(paths: list[SizePath]) -> list[ModelDimensions]:
    """The sizes that each path ends with."""
    return [path[-1][1] for path in paths]


def _after(
    model: ModelDimensions, iteration: Iteration, goal: int, end: ModelDimensions, prune: Prune
) -> ModelDimensions:
    """A model's sizes after an iteration that leaves it at most `goal` parameters."""
    if iteration.unit == "width":
        if iteration.last and goal < model.params:
            return end
        return widths.towards(model, end, goal, prune.width_multiple)
    if iteration.unit == "neurons":
        return replace(model, width=width_for(model, goal, prune.width_multiple))
    if iteration.unit == "experts":
        return replace(model, experts=experts_for(model, goal))
    return replace(model, layers=model.layers - layers_for(model, goal))


def _tokens(goal: MemoryGoal, shape: Shape) -> int:
    """Tokens of each sequence. Raises InputError for more than the model can read."""
    context = shape.context
    if goal.tokens is None:
        return TOKENS if context is None else min(TOKENS, context)
    if context is not None and goal.tokens > context:
        raise InputError(
            f"{goal.tokens:,} is more than the model's context of {context:,} tokens",
            field="schedule.target.tokens",
            remedy="lower it",
        )
    return goal.tokens


def _cached(goal: MemoryGoal, shape: Shape) -> int:
    """Numbers in the dense model's KV cache."""
    return goal.sequences * _tokens(goal, shape) * shape.cached_numbers


def _needed(goal: MemoryGoal, shape: Shape) -> str:
    """What the dense model needs, in the unit of the goal."""
    return memory_beside((shape.params + _cached(goal, shape)) * goal.itemsize, goal.memory)
