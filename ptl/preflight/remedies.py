"""Steps that do not fit on their GPUs, and what makes them fit: applied and forecast before it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from ptl.config.dag import stage_of
from ptl.config.recover import Lora, NextToken
from ptl.model.dimensions import ModelDimensions
from ptl.preflight.forecast import Assumptions, Forecast, evaluation
from ptl.preflight.forecast_model import scoring_memory, training_memory
from ptl.preflight.gpus import GIB, GPUS
from ptl.units import listed

# That are tried for a model that does not fit: GPUs of a node, and then nodes of as many.
COUNTS, NODES = (2, 4, 8), (2, 4, 8, 16, 32, 64)


def warnings(run: Forecast) -> list[str]:
    """A sentence for each kind of step that does not fit, and what a config asks for that cannot work."""
    return [*_undivided(run.assumed), *_too_large(run)]


def _undivided(assumed: Assumptions) -> list[str]:
    """A warning of a batch that a recovery on several nodes would refuse."""
    for stage in assumed.config.recover if assumed.nodes > 1 else ():
        parts = stage.accumulation * assumed.training(stage)
        if stage.batch_size % parts:
            possible = -(-stage.batch_size // parts) * parts
            return [
                f"recover.batch_size={stage.batch_size} is no multiple of accumulation={stage.accumulation} times the "
                f"{assumed.training(stage)} training processes of {assumed.nodes} nodes, and recover will refuse "
                f"it: set recover.batch_size={possible}"
            ]
    return []


def _too_large(run: Forecast) -> list[str]:
    """The warning of the steps that do not fit: one for each kind of step, whose remedy is the same."""
    sentences = []
    for stage in ("prune", "recover", "evaluate"):
        large = [step for step in run.steps if stage_of(step.step) == stage and not step.fits]
        if not large:
            continue
        # Models become smaller from one iteration to the next.
        needed = sorted({f"{step.memory / GIB:.0f}" for step in large}, key=int)
        largest = replace(run.assumed.shape.dimensions, params=max(step.params for step in large))
        amount = " to ".join(dict.fromkeys([needed[0], needed[-1]]))
        sentences.append(
            f"{listed([step.step for step in large])}: about {amount} GiB on each GPU, {run.gpu} has "
            f"{run.assumed.gpu.memory / GIB:.0f} GiB: {_remedy(stage, largest, run.assumed)}"
        )
    return sentences


# What makes a kind of step smaller on the same GPUs, as a config says it: words, section, fields. Accumulation: one row
# at a time, at the most.
CHANGES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "prune": [("a smaller calibration.batch_size", "calibration", {"batch_size": 1})],
    "recover": [
        ("recover.gradient_checkpointing: true", "recover", {"gradient_checkpointing": True}),
        ("a larger recover.accumulation", "recover", {"accumulation": 1 << 30}),
        ("recover.sharding: fsdp", "recover", {"sharding": "fsdp"}),
    ],
    "evaluate": [
        ("a smaller evaluate.batch_size", "evaluate", {"batch_size": 1}),
        (
            "evaluate.backend: vllm (with evaluate.speed.repeats: 0), which divides the model among the GPUs",
            "evaluate",
            {"backend": "vllm"},
        ),
    ],
}


def _changed(assumed: Assumptions, section: str, fields: dict[str, Any]) -> Assumptions:
    """The same with other fields of a section of the config; of `recover`, in every stage."""
    value = getattr(assumed.config, section)
    if isinstance(value, tuple):
        changed: Any = tuple(stage.model_copy(update=fields) for stage in value)
    else:
        changed = value.model_copy(update=fields)
    return replace(assumed, config=assumed.config.model_copy(update={section: changed}))


def _remedy(stage: str, model: ModelDimensions, assumed: Assumptions) -> str:
    """The fewest changes with which a step of such a model fits; else with more GPUs, or a larger GPU."""
    remedies = []
    for words, larger in [("", assumed), *_more_gpus(stage, assumed)]:
        changes = _smallest_change(stage, model, larger)
        if changes is not None:
            remedies.append(" with ".join(filter(None, [words, changes])))
            break
    stages = assumed.config.recover
    if stage == "recover" and all(isinstance(each, NextToken) and each.lora is None for each in stages):
        changes = _smallest_change(stage, model, _changed(assumed, "recover", {"lora": Lora()}))
        if changes is not None:
            remedies.append(" with ".join(filter(None, ["recover.lora", changes])))
    if remedies:
        return ", or ".join(remedies)
    kinds = [
        kind for kind, gpu in GPUS.items() if _smallest_change(stage, model, replace(assumed, gpu=gpu)) is not None
    ]
    return f"no setting makes it fit: take a larger GPU ({', '.join(kinds)})" if kinds else "no setting makes it fit"


def _smallest_change(stage: str, model: ModelDimensions, assumed: Assumptions) -> str | None:
    """The first smallest set of changes that is enough, in words; empty where nothing must change; None: none is."""
    for count in range(len(CHANGES[stage]) + 1):
        for changes in combinations(CHANGES[stage], count):
            smaller = assumed
            for _, section, fields in changes:
                smaller = _changed(smaller, section, fields)
            if smaller.fits(_memory(stage, model, smaller)):
                return " and ".join(words for words, *_ in changes)
    return None


def _memory(stage: str, model: ModelDimensions, assumed: Assumptions) -> float:
    """Bytes on each GPU in a kind of step."""
    if stage == "prune":
        return scoring_memory(assumed.shape, assumed.config.calibration)
    if stage == "evaluate":
        return evaluation(model, assumed).memory
    stages = assumed.config.recover
    return max(training_memory(assumed.shape, model, each, assumed.training(each)) for each in stages)


def _more_gpus(stage: str, assumed: Assumptions) -> Iterator[tuple[str, Assumptions]]:
    """Larger groups of GPUs for a kind of step, the smallest first, in words."""
    held = assumed.gpus[stage]
    for count in COUNTS if assumed.nodes == 1 or stage != "recover" else ():
        if count > held and stage != "prune":
            yield f"{count} GPUs", replace(assumed, gpus={**assumed.gpus, stage: count})
    node = max(held, COUNTS[-1])
    for count in NODES if stage == "recover" else ():
        if count > assumed.nodes:
            words = f"resources.steps.recover.nodes: {count} (of {node} GPUs)"
            yield words, replace(assumed, gpus={**assumed.gpus, stage: node}, nodes=count)
