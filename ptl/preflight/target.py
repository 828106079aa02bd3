"""Turns a memory into a number of parameters, and that number into a model's sizes after each iteration.

Only config.json is read.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ptl import extras
from ptl.config.run import Config
from ptl.config.schedule import Iteration, MemoryGoal, Prune, Schedule, plan, removal
from ptl.errors import InputError, PtlError
from ptl.model import pretrained, widths
from ptl.model.dimensions import ModelDimensions, check_unit, experts_for, layers_for, width_for
from ptl.preflight.forecast_model import Shape, shape_of
from ptl.units import counted, memory_beside

MOST = 0.95  # share of the parameters that may go
TOKENS = 4096  # of each sequence in the KV cache, where a goal does not say
MEMORY_FIELD = "schedule.target.memory"

SizePath = list[tuple[Iteration, ModelDimensions]]  # a model's sizes after each iteration


def with_number(config: Config) -> tuple[Config, str]:
    """Return the config with a number of parameters as its target, and a sentence that says what a memory comes to.

    The sentence is empty where the target is a number already; then nothing is read.
    Raises InputError where the model's config cannot be read, and as `params_that_fit`.
    """
    goal = config.schedule.target
    if not isinstance(goal, MemoryGoal):
        return config, ""
    shape = _shape(goal, config.model.path, config.model.revision)
    params = params_that_fit(goal, config.prune, shape)
    schedule = config.schedule.model_copy(update={"target": float(params)})
    sentence = (
        f"schedule.target: {goal.memory} for weights and a KV cache for {counted(goal.sequences, 'sequence')} of "
        f"{_tokens(goal, shape):,} tokens in {goal.dtype}: at most {params:,} parameters; "
        f"the dense model needs {_needed(goal, shape)}"
    )
    return config.model_copy(update={"schedule": schedule}), sentence


def resolved(schedule: Schedule, prune: Prune, folder: Path) -> Schedule:
    """Return the schedule with a number as its target, for the model in a folder. Raises as `with_number`."""
    goal = schedule.target
    if not isinstance(goal, MemoryGoal):
        return schedule
    params = params_that_fit(goal, prune, _shape(goal, str(folder), None))
    return schedule.model_copy(update={"target": float(params)})


def params_that_fit(goal: MemoryGoal, prune: Prune, shape: Shape) -> int:
    """Return the parameters of the largest model that fits into a goal's memory, whatever `prune` removes.

    Removed layers are sure to take their KV cache with them. Whether KV heads go is decided by the loss, so all of them
    count, and the pruned model may need less memory than the goal.
    Raises InputError for a goal that the dense model has already reached, or that the KV cache alone exceeds.
    """
    model = shape.dimensions
    cache = _cached_numbers(goal, shape)
    excess = model.params + cache - goal.bytes // goal.itemsize  # numbers
    if excess <= 0:
        raise InputError(
            f"the dense model reaches {goal.memory} already: it needs {_needed(goal, shape)}",
            field=MEMORY_FIELD,
            remedy="lower it, or give a share of the parameters to remove",
        )
    remedy = "raise it, or lower sequences or tokens"
    if prune.target == "layers":
        cache_of_layer = cache // model.layers
        layers = math.ceil(excess / (model.params_per_layer + cache_of_layer))
        excess = layers * model.params_per_layer
    else:
        remedy += ", or remove layers (prune.target=layers)"
    if excess >= model.params:
        cache_memory = memory_beside(cache * goal.itemsize, goal.memory)
        raise InputError(
            f"{goal.memory} cannot be reached: the dense model needs {_needed(goal, shape)}, of which "
            f"{cache_memory} are the KV cache: only removed layers are sure to shrink it",
            field=MEMORY_FIELD,
            remedy=remedy,
        )
    return model.params - excess


def to_remove(params: int, schedule: Schedule) -> int:
    """Return how many of a model's parameters must go. Raises InputError for a target that leaves all or nothing."""
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
    """Return the iterations, each with the model's sizes after it, rounded as prune rounds them.

    There is one path for each set of sizes that the loop may end with. The first prune step chooses among them by the
    loss, and takes the first where the loss ranks none. All units but width have one path.
    Raises InputError as `to_remove`, for a target that the unit cannot reach, and for a repair of experts.
    """
    iterations = plan(schedule, prune)
    units = {iteration.unit for iteration in iterations}
    for unit in units:
        check_unit(model.experts, model.narrowable, unit, prune.repair)
    total = to_remove(model.params, schedule)
    possible_ends = [model]
    if "width" in units:
        possible_ends = widths.candidates(
            model, model.params - total, prune.width_multiple, prune.wanted
        )
    return [_path(model, end, iterations, total, prune) for end in possible_ends]


def ends(paths: list[SizePath]) -> list[ModelDimensions]:
    """Return the sizes with which each path ends."""
    return [path[-1][1] for path in paths]


def _path(
    model: ModelDimensions,
    end: ModelDimensions,
    iterations: list[Iteration],
    total: int,  # parameters to remove
    prune: Prune,
) -> SizePath:
    """Follow a model through all iterations to the sizes with which it ends."""
    path: SizePath = []
    remaining = model
    for iteration in iterations:
        goal = model.params - int(iteration.progress * total)
        remaining = _after(remaining, iteration, goal, end, prune)
        path.append((iteration, remaining))
    return path


def _after(
    model: ModelDimensions, iteration: Iteration, goal: int, end: ModelDimensions, prune: Prune
) -> ModelDimensions:
    """Return a model's sizes after an iteration that leaves it at most `goal` parameters."""
    if iteration.unit == "width":
        if iteration.last and goal < model.params:
            return end
        return widths.towards(model, end, goal, prune.width_multiple)
    if iteration.unit == "neurons":
        return replace(model, width=width_for(model, goal, prune.width_multiple))
    if iteration.unit == "experts":
        return replace(model, experts=experts_for(model, goal))
    return replace(model, layers=model.layers - layers_for(model, goal))


def _shape(goal: MemoryGoal, path: str, revision: str | None) -> Shape:
    """Read the model's shape. Raises InputError where this machine cannot read the model's config."""
    remedy = "give the number of parameters to end with"
    if not pretrained.can_build():
        raise extras.AbsentError(
            f"{goal.memory} becomes a number of parameters by the model's config, which torch and transformers read, "
            "and these are not installed",
            field=MEMORY_FIELD,
            remedy=f"{extras.install('prune')}, or {remedy}",
        )
    try:
        return shape_of(path, revision)
    except PtlError as error:
        raise type(error)(
            f"{goal.memory} becomes a number of parameters by the model's config, which cannot be read: {error}",
            field=MEMORY_FIELD,
            remedy=remedy,
        ) from error


def _tokens(goal: MemoryGoal, shape: Shape) -> int:
    """Return the tokens of each sequence. Raises InputError for more than the model can read."""
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


def _cached_numbers(goal: MemoryGoal, shape: Shape) -> int:
    """Count the numbers in the dense model's KV cache."""
    return goal.sequences * _tokens(goal, shape) * shape.cached_numbers


def _needed(goal: MemoryGoal, shape: Shape) -> str:
    """Say what memory the dense model needs, in the unit of the goal."""
    numbers = shape.params + _cached_numbers(goal, shape)
    return memory_beside(numbers * goal.itemsize, goal.memory)
