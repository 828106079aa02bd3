"""Warnings: settings that are allowed, and yet likely to waste a run. Pure and torch-free."""

from __future__ import annotations

from ptl.config.cluster import StepName
from ptl.config.recover import NextToken
from ptl.config.run import Config
from ptl.config.schedule import DEEP, DEEP_ITERATIONS, Prune, Schedule, plan, removal
from ptl.units import listed, numbered

FAIR = 0.25  # an iteration whose share of the tokens is below this part of its share of the removal is warned of
SOME_TOKENS = 10**9  # enough to divide


def warnings(config: Config) -> list[str]:
    """What `ptl validate`, `plan`, `run` and `submit` say before anything starts: field, value and remedy each."""
    of_the_gate = [*_starved_iterations(config), *_undecayed(config)] if config.gate.enabled else []
    return [*_idle_accelerators(config), *of_the_gate]


def depth_warnings(schedule: Schedule, params: int) -> list[str]:
    """A warning of too few iterations for a target that is no share, of a model whose size is known."""
    share = removal(params, schedule.target) / params
    if schedule.iterations != "auto" or schedule.num_iterations == DEEP_ITERATIONS or share < DEEP:
        return []
    return [
        f"schedule.iterations=auto is {schedule.num_iterations} where schedule.target is no share, and it removes "
        f"{100 * share:.0f} % of this model's {params:,} parameters: "
        f"set schedule.iterations={DEEP_ITERATIONS}"
    ]


def layer_warnings(schedule: Schedule, prune: Prune, params: int, params_per_layer: int) -> list[str]:
    """Warnings of iterations that are planned to remove less than a layer, of a model whose sizes are known."""
    total = removal(params, schedule.target)
    for_layers = [iteration for iteration in plan(schedule, prune) if iteration.unit == "layers"]
    starved = [iteration for iteration in for_layers if iteration.cut * total < params_per_layer]
    if not starved:
        return []
    names = numbered("iteration", [iteration.index for iteration in starved])
    most = max(int(iteration.cut * total) for iteration in starved)  # parameters
    return [
        f"prune.target={prune.target}, with schedule.cuts={schedule.cuts}: planned for {names} "
        f"are at most {most:,} parameters, and a layer has {params_per_layer:,}: a whole one goes, or none; "
        "set schedule.cuts=uniform, or fewer iterations for layers"
    ]


def _idle_accelerators(config: Config) -> list[str]:
    """Accelerators that a step holds and cannot use: one sentence for all kinds of steps."""
    resources = config.resources
    processes = [stage.processes for stage in config.recover]
    # None: as many as there are.
    used: dict[StepName, int | None] = {
        "import-model": 0,
        "prune": 1,
        "recover": None if None in processes else max(filter(None, processes)),
        "evaluate": config.evaluate.processes,
        "report": 0,
    }
    idle = []
    for step, uses in used.items():
        held = resources.accelerators_of(step)
        if uses is not None and held > uses:
            idle.append(f"{step} holds {held} and uses {uses or 'none'}")
    if not idle:
        return []
    return [
        f"resources.accelerators: {listed(idle)}: set the number that is used in "
        "resources.steps.<step>.accelerators, or raise the step's processes"
    ]


def _starved_iterations(config: Config) -> list[str]:
    """The gate judges right after each iteration, so recovery must not come iterations after the damage."""
    schedule = config.schedule
    if not schedule.recovery_tokens:  # GRPO alone, limited by its steps, which are shared out in the same way
        schedule = schedule.model_copy(update={"recovery_tokens": SOME_TOKENS})
    total = schedule.recovery_tokens
    for iteration in plan(schedule, config.prune):
        if iteration.tokens >= FAIR * iteration.cut * total:
            continue
        removed = 100 * float(iteration.cut)  # percent of the removal
        trained = 100 * iteration.tokens / total  # percent of the recovery
        # The first one is enough: the remedy is the same for all.
        return [
            f"schedule.tokens={schedule.tokens}, with schedule.cuts={schedule.cuts} and the gate on: iteration "
            f"{iteration.index} removes {removed:.0f} % of what goes in all and gets {trained:.1f} % of the recovery; "
            "the gate judges it right then, and a rejection halves the cuts that follow: set schedule.tokens=uniform"
        ]
    return []


def _undecayed(config: Config) -> list[str]:
    """Models are judged, and kept, as they are at the end of an iteration, which may be the last one accepted."""
    if config.schedule.num_iterations == 1:
        return []
    stages = [stage for stage in config.recover if isinstance(stage, NextToken)]
    decays = [stage.decay for stage in stages if stage.decay != "each"]
    if not decays:
        return []
    return [
        f"recover.decay={decays[0]:g}, with the gate on: early iterations are judged at the full learning rate, and a "
        "loop that the gate stops ends with such a model: set decay: each in every stage of recover"
    ]
