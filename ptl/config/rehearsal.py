"""The rehearsal of a run: the same steps with about a hundredth of the work, so that all of them run within minutes.

What decides how a step works stays: model, data, stages and their batches, tasks, control, the number of iterations,
the size to end with. What only decides how long it works shrinks, and nothing may end the loop early: neither the gate
nor a guard. Pure and torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ptl.config.cluster import TRAINED, Resources
from ptl.config.flat_settings import flat_settings
from ptl.config.recover import Grpo, NextToken, RecoverStage, Recovery
from ptl.config.run import Calibration, Config, Evaluate, Gate, Speed, Task, check
from ptl.config.schedule import Schedule, plan

SUFFIX = "-rehearsal"  # of the run, its experiment and its registered model
LONGEST_NAME = 63  # characters of a config's name

SHARE = Fraction(1, 100)  # of tokens, steps and sequences
# ... but not fewer than a step needs to do something, ...
STAGE_TOKENS = 256  # of each stage in each iteration
SEQUENCES = 4  # of calibration
# ... nor more than shows that it works, where a run is a large one.
MOST_TOKENS = 500_000

# What has no size of its own to take a hundredth of.
ITEMS = 8  # of each benchmark
NEW_TOKENS = 64  # of an answer
GENERATIONS = 2  # answers to a prompt that GRPO compares
SPEED_TOKENS, SPEED_ITEMS = 4, 2
NEVER = 1e-300  # a significance level that no fall of the accuracy reaches

MANY = 10**9  # tokens, to see how stages divide them


@dataclass(frozen=True)
class Change:
    """A field that has another value in the rehearsal."""

    field: str  # dotted, without the indices of lists
    run: tuple[Any, ...]  # its values; several of a list's entries
    rehearsal: tuple[Any, ...]


def rehearsal(config: Config, gpus: int | None) -> Config:
    """The rehearsal of a run, on a machine with so many GPUs; None: where the run itself will be, on a cluster."""
    if gpus is None:
        gpus = config.resources.accelerators_of("recover")
    else:
        config = _fitting(config, gpus)
    iterations = len(plan(config.schedule, config.prune))
    schedule = _schedule(config, iterations)
    nodes = config.resources.nodes_of(TRAINED)
    stages = [_stage(stage, iterations, nodes, gpus) for stage in config.recover]
    shrunk = _with(
        config,
        name=config.name[: LONGEST_NAME - len(SUFFIX)].rstrip("-") + SUFFIX,
        calibration=_calibration(config.calibration),
        schedule=schedule,
        recover=tuple(_with(stage, save_steps=_save_steps(stage, schedule, iterations)) for stage in stages),
        evaluate=_evaluate(config.evaluate),
        gate=_gate(config.gate),
        storage=_storage(config),
    )
    # Fields that were set one by one must fit together.
    return check(Config, shrunk.model_dump(), "the rehearsal")


def is_rehearsal(settings: Mapping[str, Any]) -> bool:
    """Whether a config, as a dict, is that of a rehearsal: a user may have given one such name, but not both."""
    experiment = settings.get("storage", {}).get("experiment", "")
    return str(settings.get("name", "")).endswith(SUFFIX) and str(experiment).endswith(SUFFIX)


def _with(section: Any, **values: Any) -> Any:
    return section.model_copy(update=values)


def _part(number: int, fewest: int) -> int:
    """A hundredth of a number, but not below the fewest that make sense, nor above the number itself."""
    return min(number, max(fewest, math.ceil(SHARE * number)))


def _calibration(calibration: Calibration) -> Calibration:
    # Of few prompts, answered by a model that has hardly recovered, none may be right: then `self` is an error.
    return _with(
        calibration,
        num_sequences=_part(calibration.num_sequences, SEQUENCES),
        answers="given",
    )


def _schedule(config: Config, iterations: int) -> Schedule:
    """Few tokens, equally distributed, or the first of many iterations would get none."""
    schedule = config.schedule
    budgets = Recovery(stages=config.recover).budgets(MANY)
    shares = [Fraction(budget, MANY) for budget in budgets if budget is not None]
    # None: reinforcement learning alone, which its steps limit.
    fewest = iterations * math.ceil(STAGE_TOKENS / min(shares)) if shares else 0
    tokens = _part(schedule.recovery_tokens, fewest)
    changes: dict[str, Any] = {
        "tokens": "uniform",
        "recovery_tokens": min(tokens, max(fewest, MOST_TOKENS)),
    }
    # The gate ends the loop at the target. The small last parts of a cubic curve may reach it iterations too early,
    # since widths are rounded. Where layers come last, equal parts would be another plan.
    if config.gate.enabled and config.prune.target != "neurons_then_layers":
        changes["cuts"] = "uniform"
    return _with(schedule, **changes)


def _stage(stage: RecoverStage, iterations: int, nodes: int, gpus: int) -> RecoverStage:
    """A stage with its own batches, except for GRPO, whose batches are answers that take long to write."""
    stage = _with(stage, logging_steps=1)
    if not isinstance(stage, Grpo):
        return stage
    generations = min(stage.num_generations, GENERATIONS)
    return _with(
        stage,
        steps=_part(stage.steps, iterations),
        num_generations=generations,
        batch_size=generations * nodes * (stage.processes or max(1, gpus)),  # divides among groups and processes
        accumulation=1,
        max_completion_length=min(stage.max_completion_length, NEW_TOKENS),
        guard_prompts=0,
    )


def _save_steps(stage: RecoverStage, schedule: Schedule, iterations: int) -> int:
    """Optimizer steps after which each iteration has saved a training checkpoint at least once."""
    if not isinstance(stage, NextToken):
        return 1
    # As if all sequences were of full length: shorter ones are more steps.
    share = Fraction(str(stage.share or 1))
    steps = int(share * schedule.recovery_tokens / iterations) // (stage.batch_size * stage.max_length)
    return min(stage.save_steps, max(1, steps))


def _evaluate(evaluate: Evaluate) -> Evaluate:
    tasks = tuple(_task(task) for task in evaluate.tasks)
    return _with(evaluate, tasks=tasks, speed=_speed(evaluate.speed))


def _task(task: Task) -> Task:
    return _with(
        task,
        limit=min(task.limit or ITEMS, ITEMS),
        max_new_tokens=min(task.max_new_tokens or NEW_TOKENS, NEW_TOKENS),
    )


def _speed(speed: Speed) -> Speed:
    return _with(
        speed,
        repeats=min(speed.repeats, 1),
        new_tokens=min(speed.new_tokens, SPEED_TOKENS),
        items=min(speed.items, SPEED_ITEMS),
    )


def _gate(gate: Gate) -> Gate:
    """A gate that works and accepts everything: a rejection would leave later steps without work."""
    return _with(gate, alpha=NEVER, strict=False) if gate.enabled else gate


def _storage(config: Config) -> Any:
    """Where its numbers are not beside those of real runs, and its models take no alias from theirs."""
    storage = config.storage
    changes = {"experiment": storage.experiment + SUFFIX}
    # By default it is the config's name, which has the suffix.
    if storage.registered_model is not None:
        changes["registered_model"] = storage.registered_model[: 250 - len(SUFFIX)] + SUFFIX
    return _with(storage, **changes)


def _fitting(config: Config, gpus: int) -> Config:
    """The run as a machine with these GPUs can execute it."""
    requested = config.resources.accelerators_of("recover")
    stages = tuple(_fitting_stage(stage, gpus, requested) for stage in config.recover)
    evaluate = config.evaluate
    requested = config.resources.accelerators_of("evaluate")
    evaluate = _with(
        evaluate,
        backend=evaluate.backend if gpus else "hf",
        processes=_processes(evaluate.processes, requested, gpus, lambda _: True),
    )
    return _with(config, recover=stages, evaluate=evaluate, resources=_one_node(config.resources, gpus))


def _one_node(resources: Resources, gpus: int) -> Resources:
    """On a machine with GPUs one node has them all; on CPUs as many groups of processes as nodes."""
    own = resources.of_step(TRAINED)
    if not gpus or own.nodes == 1:
        return resources
    return _with(resources, steps={**resources.steps, TRAINED: _with(own, nodes=1)})


def _fitting_stage(stage: RecoverStage, gpus: int, requested: int) -> RecoverStage:
    def divides(count: int) -> bool:
        return stage.batch_size % (stage.accumulation * count) == 0

    processes = _processes(stage.processes, requested, gpus, divides)
    changes: dict[str, Any] = {"processes": processes}
    if (processes or gpus) <= 1:
        changes["sharding"] = "none"
    if gpus == 0:
        changes["dtype"] = "float32"
        if isinstance(stage, Grpo) and stage.rollouts == "vllm":
            changes["rollouts"] = "transformers"
    return _with(stage, **changes)


def _processes(configured: int | None, requested: int, gpus: int, divides: Callable[[int], bool]) -> int | None:
    """The processes of a step for which the run requests accelerators: its own, or the most that these GPUs can have.

    None is one for each GPU of the machine. Of a run without accelerators nothing changes: its processes are on CPUs.
    """
    count = configured or requested
    if requested and count > gpus:
        # A batch is divided among them; one process takes any.
        count = next((fewer for fewer in range(gpus, 1, -1) if divides(fewer)), 1)
    elif configured or not requested:
        return configured
    return configured if count == (configured or max(1, gpus)) else count


def changes(config: Config, rehearsed: Config) -> list[Change]:
    """Every field in which the two differ, in the order of the config; entries of lists are taken together."""
    run = flat_settings(config.model_dump(mode="json"))
    shrunk = flat_settings(rehearsed.model_dump(mode="json"))
    together: dict[str, list[tuple[Any, Any]]] = {}
    for name in dict.fromkeys([*shrunk, *run]):
        field = ".".join(part for part in name.split(".") if not part.isdecimal())
        together.setdefault(field, []).append((run.get(name), shrunk.get(name)))

    differences = []
    for field, pairs in together.items():
        before, after = zip(*pairs, strict=True)
        if before != after:
            differences.append(Change(field, _distinct(before), _distinct(after)))
    return differences


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


# What was not rehearsed where a field has another value; the value of the run goes into the braces.
LEFT_OUT = {
    "dtype": "{} precision",
    "sharding": "sharding by {}",
    "processes": "{} processes",
    "rollouts": "answers by {}",
    "backend": "evaluation by {}",
    "answers": "calibration on the model's own answers",
}


def left_out(config: Config, rehearsed: Config, gpus: int | None) -> list[str]:
    """What of the run is not rehearsed on a machine with so many GPUs (None: where the run itself will be).

    It needs GPUs that are not there, or fails where there are few data.
    """
    resources = config.resources
    run = _with_processes(config, lambda step: resources.accelerators_of(step) or gpus or 1)
    shrunk = _with_processes(rehearsed, lambda step: (resources.accelerators_of(step) if gpus is None else gpus) or 1)
    parts: list[str] = []
    for change in changes(run, shrunk):
        _, _, name = change.field.rpartition(".")
        if name in LEFT_OUT:
            left = [value for value in change.run if value not in change.rehearsal]
            parts += [LEFT_OUT[name].format(value) for value in left]
    return list(dict.fromkeys(parts))  # training and evaluation may lack the same


def _with_processes(config: Config, default: Callable[[str], int]) -> Config:
    """The config with all numbers of processes written out; `default` is that of a kind of step."""
    stages = tuple(_with(stage, processes=stage.processes or default("recover")) for stage in config.recover)
    evaluate = _with(config.evaluate, processes=config.evaluate.processes or default("evaluate"))
    return _with(config, recover=stages, evaluate=evaluate)
