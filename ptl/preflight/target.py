"""The target of a schedule as a number: of a goal in memory or speed, the parameters that a model ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptl.config.goal import Goal, MemoryGoal, SpeedGoal
from ptl.config.run import Config
from ptl.config.schedule import Prune, Schedule
from ptl.errors import InputError
from ptl.model import hub
from ptl.model.dimensions import check_unit
from ptl.model.goals import UNITS, Dense, Needs, dense_model
from ptl.units import counted, memory_beside

TOKENS = 4096  # of each sequence in the KV cache, where a goal does not say


def resolved(schedule: Schedule, prune: Prune, folder: Path) -> Schedule:
    """The schedule with a number as its target, for the model whose config.json is in `folder`.

    Raises InputError for a goal that the dense model has already reached, or that no pruning reaches.
    """
    goal = schedule.target
    if not isinstance(goal, Goal):
        return schedule
    return schedule.model_copy(update={"target": float(params(goal, prune, folder))})


def params(goal: Goal, prune: Prune, folder: Path) -> int:
    """The parameters of the largest model that reaches a goal. Raises InputError as `resolved`."""
    return _params_at_goal(goal, prune, dense_model(folder))


def with_number(config: Config) -> Config:
    """The config with a number as its schedule's target; of a model on the hub only config.json is read."""
    if not isinstance(config.schedule.target, Goal):
        return config
    folder = hub.locate(config.model.path, config.model.revision, ["config.json"])
    return config.model_copy(update={"schedule": resolved(config.schedule, config.prune, folder)})


def record(goal: Goal, folder: Path) -> dict[str, Any]:
    """A goal with what it takes to say whether a checkpoint reaches it; for the import step's record."""
    dense = dense_model(folder)
    needs = dense.needs()
    if isinstance(goal, SpeedGoal):
        return {"kind": "speed", "times": goal.speed, "dense": needs.flops_per_token}
    tokens = _tokens(goal, dense)
    return {
        "kind": "memory",
        "memory": goal.memory,
        "bytes": goal.bytes,
        "dense": needs.memory(goal.sequences, tokens, goal.itemsize),
        "sequences": goal.sequences,
        "tokens": tokens,
        "dtype": goal.dtype,
        "itemsize": goal.itemsize,
        "cached_numbers_per_layer": needs.cached_numbers // dense.sizes.num_hidden_layers,
    }


def sentence(config: Config) -> str:
    """What a goal means for the model: the parameters to get down to, and what it needs now; empty without a goal."""
    goal = config.schedule.target
    if not isinstance(goal, Goal):
        return ""
    dense = dense_model(hub.locate(config.model.path, config.model.revision, ["config.json"]))
    most = _params_at_goal(goal, config.prune, dense)
    state = _state(goal, dense, dense.needs())
    return f"schedule.target: {_wanted(goal, dense)}: at most {most:,} parameters; the dense model: {state}"


def _params_at_goal(goal: Goal, prune: Prune, dense: Dense) -> int:
    """The parameters of the largest model that reaches the goal, whatever `prune` makes it of."""
    reached = _reached_by(goal, dense)
    if reached(dense.needs()):
        raise InputError(
            f"the dense model reaches {_wanted(goal, dense)} already: {_state(goal, dense, dense.needs())}",
            field=goal.field,
            remedy="lower it, or give a share of the parameters to remove",
        )
    check_unit(dense.sizes.num_experts, dense.sizes.narrowable, prune.target)
    unit = prune.target if prune.target in UNITS else "neurons"
    needs = dense.largest(unit, reached)
    # Of which units a mixed removal takes how many is not known before.
    flops_of_both = prune.target not in UNITS and isinstance(goal, SpeedGoal)
    if needs is not None:
        return needs.params - (_without_flops(dense, reached) if flops_of_both else 0)
    # So many parameters have so few FLOPs whatever was removed; the KV cache is as large as before if neurons were.
    # Not in a mixture, where a layer takes more FLOPs with it than neurons with as many parameters.
    with_layers = dense.largest("layers", reached)
    if with_layers is not None and flops_of_both and not dense.sizes.num_experts:
        return with_layers.params
    smallest = {
        "neurons": "no FFN neuron left",
        "layers": "one layer",
        "experts": f"the {dense.sizes.num_experts_per_tok} experts that each token is sent to",
    }[unit]
    possible = [other for other in UNITS if other != "neurons" or dense.sizes.narrowable]
    raise InputError(
        f"{_wanted(goal, dense)} cannot be reached: with {smallest} it is {_state(goal, dense, dense.smallest(unit))}, "
        f"and now {_state(goal, dense, dense.needs())}",
        field=goal.field,
        remedy=_remedy(goal, prune, dense, [other for other in possible if dense.largest(other, reached)]),
    )


def _without_flops(dense: Dense, reached: Callable[[Needs], bool]) -> int:
    """Parameters without FLOPs (norms, biases) in as many layers as can go before layers alone reach the goal.

    By them a model with fewer layers has more FLOPs than one with as many parameters and fewer neurons. In a mixture it
    has fewer, as a token meets only some of the experts that neurons are taken from.
    """
    most = dense.sizes.num_hidden_layers - 1
    removed = next((number for number in range(most) if reached(dense.needs(number + 1, "layers"))), most)
    before, after = dense.needs(), dense.needs(removed, "layers")
    products = (before.flops_per_token - after.flops_per_token) // 2
    # Parameters of neurons with as many products
    of_neurons = products * max(1, dense.sizes.num_experts) // max(1, dense.sizes.num_experts_per_tok)
    return max(0, before.params - after.params - of_neurons)


def _remedy(goal: Goal, prune: Prune, dense: Dense, others: list[str]) -> str:
    """What makes a goal that cannot be reached possible; `others`: the units that reach it alone."""
    remedies = ["lower it"] if isinstance(goal, SpeedGoal) else ["raise it", "lower sequences or tokens"]
    if prune.target == "experts" and others:
        more = f"remove {' or '.join(others)} (prune.target={others[0]})"
        reason = ": whole experts take no FLOPs with them but the router's" if isinstance(goal, SpeedGoal) else ""
        remedies.append(more + reason)
    elif "layers" in others and isinstance(goal, MemoryGoal):
        remedies.append("remove layers alone, which take their KV cache with them (prune.target=layers)")
    elif "layers" in others:
        remedies.append("remove layers alone (prune.target=layers)")
    return ", or ".join(remedies)


def _reached_by(goal: Goal, dense: Dense) -> Callable[[Needs], bool]:
    """Whether a model with such needs reaches the goal."""
    if isinstance(goal, SpeedGoal):
        flops = dense.needs().flops_per_token
        return lambda needs: needs.flops_per_token * goal.speed <= flops
    tokens = _tokens(goal, dense)
    return lambda needs: needs.memory(goal.sequences, tokens, goal.itemsize) <= goal.bytes


def _tokens(goal: MemoryGoal, dense: Dense) -> int:
    """Tokens of each sequence. Raises InputError for more than the model can read."""
    context = dense.context
    if goal.tokens is None:
        return TOKENS if context is None else min(TOKENS, context)
    if context is not None and goal.tokens > context:
        raise InputError(
            f"{goal.tokens:,} is more than the model's context of {context:,} tokens",
            field="schedule.target.tokens",
            remedy="lower it",
        )
    return goal.tokens


def _wanted(goal: Goal, dense: Dense) -> str:
    """The goal in words."""
    if isinstance(goal, SpeedGoal):
        return f"{goal.speed:g} times the speed"
    cache = f"a KV cache for {counted(goal.sequences, 'sequence')} of {_tokens(goal, dense):,} tokens"
    return f"{goal.memory} for weights and {cache} in {goal.dtype}"


def _state(goal: Goal, dense: Dense, needs: Needs) -> str:
    """How near a model with such needs is to the goal."""
    if isinstance(goal, SpeedGoal):
        flops = dense.needs().flops_per_token
        return f"{flops / needs.flops_per_token:.2f} times ({needs.flops_per_token:,} FLOPs per token)"
    needed = needs.memory(goal.sequences, _tokens(goal, dense), goal.itemsize)
    return memory_beside(needed, goal.memory)
