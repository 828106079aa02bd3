"""Steps that do not fit on their GPUs, and what makes them fit: applied and forecast before it is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from ptl.config.dag import stage_of
from ptl.config.recover import Lora
from ptl.model.dimensions import ModelDimensions
from ptl.preflight.forecast import Assumptions, Forecast, evaluation
from ptl.preflight.forecast_model import scoring_memory, training_memory
from ptl.preflight.gpus import GIB, GPUS
from ptl.units import listed

# That are tried for a model that does not fit: GPUs of a node, and then nodes of as many.
COUNTS, NODES = (2, 4, 8), (2, 4, 8, 16, 32, 64)
# What makes a kind of step smaller on the same GPUs, as a config says it: words, and fields of the section (of
# `recover` in every stage). Accumulation: one row at a time, at the most.
CHANGES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "prune": ("calibration", {"a smaller calibration.batch_size": {"batch_size": 1}}),
    "recover": (
        "recover",
        {
            "recover.gradient_checkpointing: true": {"gradient_checkpointing": True},
            "a larger recover.accumulation": {"accumulation": 1 << 30},
            "recover.sharding: fsdp": {"sharding": "fsdp"},
        },
    ),
    "evaluate": (
        "evaluate",
        {
            "a smaller evaluate.batch_size": {"batch_size": 1},
            "evaluate.backend: vllm (with evaluate.speed.repeats: 0), which divides the model among the GPUs": {
                "backend": "vllm"
            },
        },
    ),
}


def warnings(run: Forecast) -> list[str]:
    """A sentence for each kind of step that does not fit: the remedy is the same for all of a kind."""
    sentences = []
    has = f"{run.gpu} has {run.assumed.gpu.memory / GIB:.0f} GiB"
    for stage in CHANGES:
        large = [step for step in run.steps if stage_of(step.step) == stage and not step.fits]
        if not large:
            continue
        needed = max(step.work.memory for step in large)
        largest = replace(run.assumed.shape.dimensions, params=max(step.params for step in large))
        sentences.append(
            f"{listed([step.step for step in large])}: up to {needed / GIB:.0f} GiB on each GPU, {has}: "
            + _remedy(stage, largest, run.assumed)
        )
    return sentences


def _remedy(stage: str, model: ModelDimensions, assumed: Assumptions) -> str:
    """The fewest changes with which a step of such a model fits; else with more GPUs, or a larger GPU."""
    remedies = []
    for words, larger in _machines(stage, assumed):
        changes = _smallest_change(stage, model, larger)
        if changes is not None:
            remedies.append(" with ".join(filter(None, [words, changes])))
            break
    stages = assumed.config.recover
    trains_all = all(each.method != "grpo" and each.lora is None for each in stages)
    if stage == "recover" and trains_all:
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
    section, changes = CHANGES[stage]
    for count in range(len(changes) + 1):
        for names in combinations(changes, count):
            smaller = assumed
            for name in names:
                smaller = _changed(smaller, section, changes[name])
            if smaller.fits(_memory(stage, model, smaller)):
                return " and ".join(names)
    return None


def _changed(assumed: Assumptions, section: str, fields: dict[str, Any]) -> Assumptions:
    """The same with other fields of a section of the config; of `recover`, in every stage."""
    value = getattr(assumed.config, section)
    if isinstance(value, tuple):
        changed: Any = tuple(stage.model_copy(update=fields) for stage in value)
    else:
        changed = value.model_copy(update=fields)
    return replace(assumed, config=assumed.config.model_copy(update={section: changed}))


def _memory(stage: str, model: ModelDimensions, assumed: Assumptions) -> float:
    """Bytes on each GPU in a kind of step."""
    if stage == "prune":
        return scoring_memory(assumed.shape, assumed.config.calibration)
    if stage == "evaluate":
        return evaluation(model, assumed).memory
    stages = assumed.config.recover
    return max(training_memory(assumed.shape, model, each, assumed.training(each)) for each in stages)


def _machines(stage: str, assumed: Assumptions) -> Iterator[tuple[str, Assumptions]]:
    """The machines as they are, then larger groups of GPUs for a kind of step, in words; pruning takes one GPU."""
    yield "", assumed
    if stage == "prune":
        return
    held = assumed.gpus[stage]
    for count in COUNTS:
        if count > held and (stage != "recover" or assumed.nodes == 1):
            yield f"{count} GPUs", replace(assumed, gpus={**assumed.gpus, stage: count})
    if stage != "recover":
        return
    node = max(held, COUNTS[-1])
    for count in NODES:
        if count > assumed.nodes:
            words = f"resources.steps.recover.nodes: {count} (of {node} GPUs)"
            yield words, replace(assumed, gpus={**assumed.gpus, stage: node}, nodes=count)
