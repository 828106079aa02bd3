"""Warnings that need a forecast: what does not fit or cannot be divided, and GPUs that wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from ptl.config.dag import export_step, stage_of
from ptl.config.recover import Lora, NextToken
from ptl.config.run import Config
from ptl.preflight.forecast_model import Shape, training_memory
from ptl.preflight.forecast_steps import Assumptions, StepForecast, evaluate_step, prune_step
from ptl.preflight.gpus import GIB, GPUS
from ptl.units import listed, quantity

WAITING = 0.1  # share of a recovery's time from which waiting is warned of
# That are tried for a model that does not fit: GPUs of a node, and then nodes of as many.
COUNTS, NODES = (2, 4, 8), (2, 4, 8, 16, 32, 64)
FULL_NODE = 8  # GPUs

Change = Callable[[Config], Config]


def warnings(steps: Sequence[StepForecast], gpu: str, assumed: Assumptions) -> list[str]:
    """All of them, one sentence for each problem."""
    return [
        *_undivided(assumed),
        *_too_large(steps, gpu, assumed),
        *_waiting(steps, assumed),
        *_short_of_host_memory(steps, assumed),
    ]


def left_out(config: Config) -> list[str]:
    """A warning of steps of the run that the forecast does not have."""
    steps = [export_step(export) for export in config.export]
    if not steps:
        return []
    return [
        f"the forecast leaves out {listed(steps)}: each of them writes the dense and the final model once more, and "
        "scores both on all benchmarks, on `limit` items of each if the export has one"
    ]


def _undivided(assumed: Assumptions) -> list[str]:
    """A warning of a batch that a recovery on several nodes would refuse."""
    if assumed.nodes == 1:
        return []
    for stage in assumed.config.recover:
        parts = stage.accumulation * assumed.group(stage).count
        if stage.batch_size % parts:
            possible = -(-stage.batch_size // parts) * parts
            return [
                f"recover.batch_size={stage.batch_size} is no multiple of accumulation={stage.accumulation} times the "
                f"{assumed.group(stage).count} training processes of {assumed.nodes} nodes, and recover will refuse "
                f"it: set recover.batch_size={possible}"
            ]
    return []


def _too_large(steps: Sequence[StepForecast], gpu: str, assumed: Assumptions) -> list[str]:
    """The warning of the steps that do not fit: one for each kind of step, whose remedy is the same."""
    sentences = []
    for stage in ("prune", "recover", "evaluate"):
        large = [step for step in steps if stage_of(step.step) == stage and not step.fits]
        if not large:
            continue
        names = listed([step.step for step in large])
        # Models become smaller from one iteration to the next.
        needed = sorted({f"{step.memory / GIB:.0f}" for step in large}, key=int)
        amount = " to ".join(dict.fromkeys([needed[0], needed[-1]]))
        available = assumed.card.memory / GIB
        # A prune step scores the model before it, at first the dense one.
        params = max(step.params for step in large)
        shape = assumed.dense if stage == "prune" else assumed.dense.scaled(params, assumed.config.prune.target)
        remedy = _remedy(stage, shape, assumed)
        sentences.append(f"{names}: about {amount} GiB on each GPU, {gpu} has {available:.0f} GiB: {remedy}")
    return sentences


def _training(**fields: Any) -> Change:
    """A change of every stage of recover that has these fields."""

    def change(config: Config) -> Config:
        stages = [
            stage.model_copy(update={name: value for name, value in fields.items() if hasattr(stage, name)})
            for stage in config.recover
        ]
        return config.model_copy(update={"recover": tuple(stages)})

    return change


def _of(section: str, **fields: Any) -> Change:
    return lambda config: config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


# What makes a kind of step smaller on the same GPUs, as a config says it. Accumulation: one row at a time, at the most.
CHANGES: dict[str, dict[str, Change]] = {
    "prune": {"a smaller calibration.batch_size": _of("calibration", batch_size=1)},
    "recover": {
        "recover.gradient_checkpointing: true": _training(gradient_checkpointing=True),
        "a larger recover.accumulation": _training(accumulation=1 << 30),
        "recover.sharding: fsdp": _training(sharding="fsdp"),
    },
    "evaluate": {
        "a smaller evaluate.batch_size": _of("evaluate", batch_size=1),
        "evaluate.backend: vllm (with evaluate.speed.repeats: 0), which divides the model among the GPUs": _of(
            "evaluate", backend="vllm"
        ),
    },
}


def _remedy(stage: str, shape: Shape, assumed: Assumptions) -> str:
    """The fewest changes of the config that make such a step fit; where none does, more GPUs, adapters, larger GPUs."""
    remedies = _fitting(stage, shape, assumed)
    if not remedies:
        more = (_fitting(stage, shape, larger, name) for name, larger in _more_gpus(stage, assumed).items())
        remedies = next(filter(None, more), [])
        stages = assumed.config.recover
        if stage == "recover" and all(isinstance(each, NextToken) and each.lora is None for each in stages):
            adapted = replace(assumed, config=_training(lora=Lora())(assumed.config))
            remedies += _fitting(stage, shape, adapted, "recover.lora")
    if remedies:
        return ", or ".join(remedies)
    larger_gpus = [kind for kind, card in GPUS.items() if _fitting(stage, shape, replace(assumed, card=card))]
    none = "no setting makes it fit"
    return f"{none}: take a larger GPU ({', '.join(larger_gpus)})" if larger_gpus else none


def _fitting(stage: str, shape: Shape, assumed: Assumptions, first: str = "") -> list[str]:
    """The smallest sets of changes with which a step fits, each in words after `first`; empty where none is enough."""
    changes = CHANGES[stage]

    def fits(names: Sequence[str]) -> bool:
        config = assumed.config
        for name in names:
            config = changes[name](config)
        return assumed.fits(_memory(stage, shape, replace(assumed, config=config)))

    for count in range(len(changes) + 1):
        enough = [names for names in combinations(changes, count) if fits(names)]
        if enough:
            return [" with ".join(filter(None, [first, " and ".join(names)])) for names in enough]
    return []


def _memory(stage: str, shape: Shape, assumed: Assumptions) -> float:
    """Bytes on each GPU in a kind of step."""
    if stage == "prune":
        return prune_step(stage, shape, shape.params, assumed).memory
    if stage == "evaluate":
        return evaluate_step(stage, shape, assumed).memory
    trained = assumed.config.recover
    return max(training_memory(shape, each, assumed.dense, assumed.group(each)) for each in trained)


def _more_gpus(stage: str, assumed: Assumptions) -> dict[str, Assumptions]:
    """Larger groups of GPUs for a kind of step, the smallest first, by what a config says of them."""
    held = assumed.gpus[stage]
    larger = {}
    for count in COUNTS:
        if count > held and (assumed.nodes == 1 or stage != "recover"):
            larger[f"{count} GPUs"] = replace(assumed, gpus={**assumed.gpus, stage: count})
    node = max(held, FULL_NODE)
    for nodes in NODES if stage == "recover" else ():
        if nodes > assumed.nodes:
            name = f"resources.steps.recover.nodes: {nodes} (of {node} GPUs)"
            larger[name] = replace(assumed, gpus={**assumed.gpus, stage: node}, nodes=nodes)
    return larger


def _waiting(steps: Sequence[StepForecast], assumed: Assumptions) -> list[str]:
    """A warning of recoveries whose GPUs wait for weights and gradients of the others."""
    slow = [step for step in steps if step.waiting >= WAITING]
    if not slow:
        return []
    stages = assumed.config.recover
    remedies = []
    if any(stage.sharding == "fsdp" and stage.accumulation > 1 for stage in stages):
        remedies.append("a smaller recover.accumulation, as weights are gathered for every pass")
    remedies.append("a larger recover.batch_size")
    if assumed.nodes > 1:
        remedies.append("or fewer nodes")
    worst = max(step.waiting for step in slow)
    names = listed([step.step for step in slow])
    return [f"{names}: GPUs wait for each other up to {100 * worst:.0f} % of the time: {', '.join(remedies)}"]


def _short_of_host_memory(steps: Sequence[StepForecast], assumed: Assumptions) -> list[str]:
    """A warning where the pods of prune request less memory than one of them keeps."""
    resources = assumed.config.resources
    own = resources.of_step("prune").memory
    requested = own or resources.memory
    # The dense model's is the largest: the first is enough.
    largest = max((step for step in steps if stage_of(step.step) == "prune"), key=lambda step: step.host_memory)
    if requested is None or quantity(requested) >= largest.host_memory:
        return []
    field = "resources.steps.prune.memory" if own else "resources.memory"
    return [
        f"{largest.step}: about {largest.host_memory / GIB:.1f} GiB of hidden states in host memory, and "
        f"{field}={requested}: raise it, lower calibration.num_sequences, or set prune.criterion=max"
    ]
