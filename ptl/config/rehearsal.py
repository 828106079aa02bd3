"""The rehearsal of a run: the same steps with about a hundredth of the work, so that all of them run within minutes.

What decides how a step works stays: model, data, stages and their batches, tasks, control, the number of iterations,
the size to end with. What only decides how long it works shrinks, and nothing may end the loop early: neither the gate
nor a guard. Pure and torch-free.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from ptl.config.base import flat_settings
from ptl.config.cluster import TRAINED
from ptl.config.recover import RecoverStage, Recovery
from ptl.config.run import Config, check

SUFFIX = "-rehearsal"  # of the names of the run and its experiment
LONGEST_NAME = 63  # characters

SHARE = 100  # of the tokens one of so many, but ...
STAGE_TOKENS = 256  # ... not fewer of each stage in each iteration, ...
MANY = 1_000_000  # tokens whose division among the stages shows their shares
MOST_TOKENS = 500_000  # ... nor more in all
SEQUENCES = 4  # of calibration
ITEMS = 8  # of each benchmark
NEW_TOKENS = 64  # of an answer
GENERATIONS = 2  # answers to a prompt that GRPO compares
# Fields whose value a rehearsal replaces where it cannot be tried.
NOT_REHEARSED = ("recover.dtype", "recover.sharding", "evaluate.backend")
NEVER = 1e-300  # a significance level that no fall of the accuracy reaches


class Change(NamedTuple):
    """A field that has another value in the rehearsal."""

    field: str  # dotted
    run: Any  # its value; None: unset
    rehearsal: Any


def rehearsal(config: Config, gpus: int | None) -> Config:
    """The rehearsal of a run, on a machine with so many GPUs; None: where the run itself will be, on a cluster."""
    settings = config.model_dump()
    if gpus is not None:
        _fit_machine(settings, config, gpus)
    settings["name"] = config.name[: LONGEST_NAME - len(SUFFIX)].rstrip("-") + SUFFIX
    # Its numbers are not beside those of real runs.
    settings["storage"]["experiment"] += SUFFIX
    calibration = settings["calibration"]
    calibration["num_sequences"] = min(calibration["num_sequences"], SEQUENCES)
    settings["prune"]["repair"] = min(settings["prune"]["repair"], SEQUENCES)
    training = settings["training"]
    if training["answers"] == "self":  # so few and short ones that none need be correct, nor end
        training |= {
            "num_prompts": min(training["num_prompts"], SEQUENCES),
            "samples": min(training["samples"], 2),
        }
        training |= {"max_new_tokens": min(training["max_new_tokens"], NEW_TOKENS), "keep": "all"}
    for task in settings["evaluate"]["tasks"]:
        task["limit"] = min(task["limit"] or ITEMS, ITEMS)
        task["samples"] = min(task["samples"], 2)
        task["max_new_tokens"] = min(task["max_new_tokens"] or NEW_TOKENS, NEW_TOKENS)
    speed = settings["evaluate"]["speed"]
    speed["repeats"] = min(speed["repeats"], 1)
    settings["schedule"] |= _schedule(config)
    # it works, and accepts everything: a rejection would leave later steps without work
    if config.gate.enabled:
        settings["gate"] |= {"alpha": NEVER, "strict": False, "retention": None}
    gpus_of_node = config.resources.accelerators_of(TRAINED) if gpus is None else gpus
    _shrink_stages(settings, config, max(1, gpus_of_node))
    # Fields that were set one by one must fit together.
    return check(Config, settings, "the rehearsal")


def is_rehearsal(name: str, experiment: str) -> bool:
    """Whether a run is a rehearsal, by its config's name and its experiment: a user may have given one such name."""
    return name.endswith(SUFFIX) and experiment.endswith(SUFFIX)


def _schedule(config: Config) -> dict[str, Any]:
    """Few tokens, equally distributed, or the first of many iterations would get none."""
    schedule = config.schedule
    budgets = filter(None, Recovery(stages=config.recover).budgets(MANY))  # GRPO may count in steps
    fewest = schedule.iterations * math.ceil(STAGE_TOKENS * MANY / min(budgets, default=MANY))
    tokens = min(math.ceil(schedule.recovery_tokens / SHARE), MOST_TOKENS)
    changes: dict[str, Any] = {
        "tokens": "uniform",
        "recovery_tokens": min(schedule.recovery_tokens, max(tokens, fewest)),
    }
    # The gate ends the loop at the target. The small last parts of a cubic curve may reach it iterations too early,
    # since widths are rounded. Where layers come last, equal parts would be another plan.
    if config.gate.enabled and config.prune.target != "neurons_then_layers":
        changes["cuts"] = "uniform"
    return changes


def _shrink_stages(settings: dict[str, Any], config: Config, gpus: int) -> None:
    """Stages keep their own batches, except for GRPO, whose batches are answers that take long to write."""
    iterations = config.schedule.iterations
    nodes = settings["resources"]["steps"].get(TRAINED, {}).get("nodes", 1)
    budgets = Recovery(stages=config.recover).budgets(
        settings["schedule"]["recovery_tokens"] // iterations
    )
    for stage, budget, of_run in zip(settings["recover"], budgets, config.recover, strict=True):
        if of_run.method != "grpo":
            # Each iteration saves a training checkpoint; shorter sequences than these are more steps.
            steps = (budget or 0) // (of_run.batch_size * of_run.max_length)
            stage["save_steps"] = min(of_run.save_steps, max(1, steps))
        else:
            stage |= {
                "steps": min(of_run.steps, iterations),
                "num_generations": GENERATIONS,
                # a group for each process
                "batch_size": GENERATIONS * nodes * (stage["processes"] or gpus),
                "accumulation": 1,
                "max_completion_length": min(of_run.max_completion_length, NEW_TOKENS),
                "guard_prompts": 0,
                "save_steps": 1,
            }


def _fit_machine(settings: dict[str, Any], config: Config, gpus: int) -> None:
    """Change what a machine with so many GPUs cannot do of a run; one without accelerators stays as it is."""
    trained = settings["resources"]["steps"].get(TRAINED)
    if trained:
        trained["nodes"] = 1  # this one
    for stage, of_run in zip(settings["recover"], config.recover, strict=True):
        stage["processes"] = _processes(of_run, config.resources.accelerators_of(TRAINED), gpus)
        if (stage["processes"] or gpus) <= 1:
            stage["sharding"] = "none"
        if not gpus:
            stage["dtype"] = "float32"
    evaluate = settings["evaluate"]
    if not gpus:
        evaluate["backend"] = "hf"


def _processes(stage: RecoverStage, requested: int, gpus: int) -> int | None:
    """Those of a run that requests accelerators, or the most that these GPUs can have and divide a batch."""
    wanted = stage.processes or requested
    if not requested or wanted <= gpus:
        return wanted or None
    fewer = range(gpus, 1, -1)
    return next(
        (count for count in fewer if stage.batch_size % (stage.accumulation * count) == 0), 1
    )


def changes(config: Config, rehearsed: Config) -> list[Change]:
    """Every field in which the two differ, in the order of the config."""
    run = flat_settings(config.model_dump(mode="json"))
    shrunk = flat_settings(rehearsed.model_dump(mode="json"))
    names = dict.fromkeys([*shrunk, *run])
    return [
        Change(name, run.get(name), shrunk.get(name))
        for name in names
        if run.get(name) != shrunk.get(name)
    ]


def left_out(config: Config, rehearsed: Config) -> list[str]:
    """What of the run is not rehearsed: it needs GPUs that are not there."""
    parts = []
    for name, value, _ in changes(config, rehearsed):
        field = re.sub(r"\.\d+", "", name)
        if field in NOT_REHEARSED and value is not None:
            parts.append(f"{field}={value}")
    # By default there is one process for each GPU.
    requested = config.resources.accelerators_of(TRAINED)
    for before, after in zip(config.recover, rehearsed.recover, strict=True):
        processes = before.processes or requested
        if after.processes not in (processes, before.processes):
            parts.append(f"recover.processes={processes}")
    return list(dict.fromkeys(parts))  # stages may lack the same
