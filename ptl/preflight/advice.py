"""Warnings: settings that are allowed, and yet likely to waste a run."""

from __future__ import annotations

from ptl.config.cluster import StepName
from ptl.config.run import Config
from ptl.config.schedule import plan
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import target
from ptl.units import listed, numbered

FAIR = 0.25  # an iteration whose share of the tokens is below this part of its share of the removal is warned of
SOME_TOKENS = 10**9  # enough to divide


def warnings(config: Config) -> list[str]:
    """What `ptl validate`, `plan`, `run` and `submit` say before anything starts: field, value and remedy each."""
    of_the_gate = [*_starved_iterations(config), *_undecayed(config)] if config.gate.enabled else []
    return [*_idle_accelerators(config), *of_the_gate]


def model_warnings(config: Config, model: ModelDimensions) -> list[str]:
    """Iterations that find nothing left to remove, as an earlier one was rounded below their goal.

    `model` has the dense model's sizes, and the schedule's target is a number.
    """
    before = model.params
    idle = []
    for iteration, after in target.after_iterations(model, config.schedule, config.prune):
        if after.params == before:
            idle.append(iteration.index)
        before = after.params
    if not idle:
        return []
    return [
        f"nothing is left to remove for {numbered('iteration', idle)}, as an earlier one removes more than its share: "
        f"{config.prune.target} go in whole, and widths by multiples (prune.width_multiple="
        f"{config.prune.width_multiple}): set schedule.cuts=uniform, or take fewer iterations"
    ]


def _idle_accelerators(config: Config) -> list[str]:
    """Accelerators that a step holds and cannot use: one sentence for all kinds of steps."""
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
        held = config.resources.accelerators_of(step)
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
    # As if there were many tokens: steps of GRPO alone are shared out in the same way.
    schedule = config.schedule.model_copy(update={"recovery_tokens": SOME_TOKENS})
    for iteration in plan(schedule, config.prune):
        trained = iteration.tokens / SOME_TOKENS  # share of the recovery
        if trained >= FAIR * iteration.cut:
            continue
        # The first one is enough: the remedy is the same for all.
        return [
            f"schedule.tokens={schedule.tokens}, with schedule.cuts={schedule.cuts} and the gate on: iteration "
            f"{iteration.index} removes {100 * float(iteration.cut):.0f} % of what goes in all and gets "
            f"{100 * trained:.1f} % of the recovery; the gate judges it right then, and a rejection halves the cuts "
            "that follow: set schedule.tokens=uniform"
        ]
    return []


def _undecayed(config: Config) -> list[str]:
    """Models are judged, and kept, as they are at the end of an iteration, which may be the last one accepted."""
    decays = [stage.decay for stage in config.recover if stage.method != "grpo" and stage.decay != "each"]
    if not decays or config.schedule.num_iterations == 1:
        return []
    return [
        f"recover.decay={decays[0]:g}, with the gate on: early iterations are judged at the full learning rate, and a "
        "loop that the gate stops ends with such a model: set decay: each in every stage of recover"
    ]
