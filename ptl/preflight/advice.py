"""Warnings: settings that are allowed, and yet likely to waste a run."""

from __future__ import annotations

from ptl.config.cluster import StepName
from ptl.config.recover import NextToken
from ptl.config.run import Config
from ptl.config.schedule import DEEP, DEEP_ITERATIONS, Schedule, plan, removal
from ptl.model.dimensions import EXPERT_MULTIPLE, ModelDimensions
from ptl.preflight import target
from ptl.units import listed, numbered

FAIR = 0.25  # an iteration whose share of the tokens is below this part of its share of the removal is warned of
SOME_TOKENS = 10**9  # enough to divide


def warnings(config: Config) -> list[str]:
    """What `ptl validate`, `plan`, `run` and `submit` say before anything starts: field, value and remedy each."""
    of_the_gate = [*_starved_iterations(config), *_undecayed(config)] if config.gate.enabled else []
    return [*_idle_accelerators(config), *of_the_gate]


def model_warnings(config: Config, model: ModelDimensions) -> list[str]:
    """What can be said once the dense model's sizes are known; the schedule's target is a number."""
    return [
        *_too_few_iterations(config.schedule, model.params),
        *_nothing_to_remove(config, model),
    ]


def _too_few_iterations(schedule: Schedule, params: int) -> list[str]:
    """A target that is no share leaves `auto` without the share that it depends on."""
    share = removal(params, schedule.target) / params
    if schedule.iterations != "auto" or schedule.num_iterations == DEEP_ITERATIONS or share < DEEP:
        return []
    return [
        f"schedule.iterations=auto is {schedule.num_iterations} where schedule.target is no share, and it removes "
        f"{100 * share:.0f} % of this model's {params:,} parameters: "
        f"set schedule.iterations={DEEP_ITERATIONS}"
    ]


def _nothing_to_remove(config: Config, model: ModelDimensions) -> list[str]:
    """Iterations that find nothing left to remove, because an earlier one was rounded below their goal."""
    prune = config.prune
    before = model.params
    idle = []
    for iteration, after in target.after_iterations(model, config.schedule, prune):
        if after.params == before:
            idle.append(iteration.index)
        before = after.params
    if not idle:
        return []
    names = numbered("iteration", idle)
    if prune.target in ("layers", "neurons_then_layers") and after.width == model.width:
        reason = f"a layer has {model.params_per_layer:,} parameters, more than the next step of the plan"
        remedy = ""
    elif prune.target == "experts":
        reason = f"one of the {model.experts} experts in every layer is more than the next step of the plan"
        remedy = ""
    elif model.experts and prune.width_multiple != "auto" and prune.width_multiple <= EXPERT_MULTIPLE:
        reason = f"multiples of {EXPERT_MULTIPLE} neurons, the least that experts can have, round their widths down"
        remedy = ""
    else:
        reason = f"prune.width_multiple={prune.width_multiple} rounds the widths of this model down"
        remedy = "lower it, "
    return [
        f"{reason}, so that nothing is left to remove for {names}, which will only train: {remedy}"
        "set schedule.cuts=uniform, or take fewer iterations"
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
