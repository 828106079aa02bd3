"""Warnings that need a forecast: what does not fit or cannot be divided, and GPUs that wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

from ptl.config.dag import export_step, stage_of
from ptl.config.recover import NextToken, RecoverStage
from ptl.config.run import Config
from ptl.preflight.forecast_model import FULL_SHARD, GpuGroup, Shape, training_memory
from ptl.preflight.forecast_network import exchange
from ptl.preflight.forecast_steps import Assumptions, StepForecast
from ptl.preflight.gpus import GIB
from ptl.units import listed, quantity

WAITING = 0.1  # share of a recovery's time from which waiting is warned of
NODES = (1, 2, 4, 8, 16, 32, 64)  # that are tried for a model that does not fit
FULL_NODE = 8  # GPUs: with fewer, more of them come before more nodes


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
        remedy = {
            "prune": "lower calibration.batch_size, or take a larger GPU",
            "recover": _smaller_recovery(max(step.params for step in large), assumed),
            "evaluate": "lower evaluate.batch_size, or take a larger GPU",
        }[stage]
        sentences.append(f"{names}: about {amount} GiB on each GPU, {gpu} has {available:.0f} GiB: {remedy}")
    return sentences


def _smaller_recovery(params: int, assumed: Assumptions) -> str:
    """What makes the recovery of a model with so many parameters smaller, and is not used yet."""
    remedies: list[str] = []
    stages = assumed.config.recover
    adapters = [isinstance(stage, NextToken) and stage.lora is not None for stage in stages]
    # A stage with LoRA cannot be sharded, and one that is sharded cannot have LoRA.
    whole = [stage for stage, lora in zip(stages, adapters, strict=True) if not lora and stage.sharding == "none"]
    if whole:
        remedies.append("recover.sharding: fsdp over several GPUs")
    elif any(stage.sharding == "hybrid" for stage in stages):
        remedies.append("recover.sharding: fsdp, which divides the model over all nodes")
    pruned = assumed.dense.scaled(params, assumed.config.prune.target)
    nodes = _nodes_for(pruned, assumed)
    if nodes is not None and nodes > assumed.nodes and not any(adapters) and assumed.gpus["recover"] >= FULL_NODE:
        remedies.append(f"resources.steps.recover.nodes: {nodes}")
    if any(isinstance(stage, NextToken) for stage in whole):
        remedies.append("or recover.lora" if remedies else "recover.lora")
    if not all(stage.gradient_checkpointing for stage in stages):
        remedies.append("recover.gradient_checkpointing: true")
    if all(_accumulation_helps(pruned, stage, assumed) for stage in stages):
        remedies.append("a larger recover.accumulation")
    if assumed.gpus["recover"] * assumed.nodes > 1:
        remedies.append("or more GPUs")
    return ", ".join(remedies) or "take a larger GPU"


def _accumulation_helps(pruned: Shape, stage: RecoverStage, assumed: Assumptions) -> bool:
    """Whether a stage needs less memory with one row at a time on each GPU."""
    group = assumed.group(stage)
    one_row = stage.model_copy(update={"accumulation": max(1, stage.batch_size // group.count)})
    now, then = (training_memory(pruned, choice, assumed.dense, group) for choice in (stage, one_row))
    return then < now


def _nodes_for(pruned: Shape, assumed: Assumptions) -> int | None:
    """The fewest nodes on which all stages fit with FSDP over all GPUs; None: none of NODES."""
    stages = [stage.model_copy(update={"sharding": "fsdp"}) for stage in assumed.config.recover]

    def fits(stage: RecoverStage, nodes: int) -> bool:
        group = GpuGroup(assumed.group(stage).per_node, nodes)
        return assumed.fits(training_memory(pruned, stage, assumed.dense, group))

    return next((nodes for nodes in NODES if all(fits(stage, nodes) for stage in stages)), None)


def _waiting(steps: Sequence[StepForecast], assumed: Assumptions) -> list[str]:
    """A warning of recoveries whose GPUs wait for weights and gradients of the others."""
    slow = [step for step in steps if step.waiting >= WAITING]
    if not slow:
        return []
    stages = assumed.config.recover
    largest = assumed.dense.scaled(max(step.params for step in slow), assumed.config.prune.target)
    remedies = []
    if any(_hybrid_helps(largest, stage, assumed) for stage in stages):
        remedies.append("recover.sharding: hybrid, which gathers weights within a node")
    if any(stage.sharding in FULL_SHARD and stage.accumulation > 1 for stage in stages):
        remedies.append("a smaller recover.accumulation, as weights are gathered for every pass")
    remedies.append("a larger recover.batch_size")
    if assumed.nodes > 1:
        remedies.append("or fewer nodes")
    worst = max(step.waiting for step in slow)
    names = listed([step.step for step in slow])
    return [f"{names}: GPUs wait for each other up to {100 * worst:.0f} % of the time: {', '.join(remedies)}"]


def _hybrid_helps(pruned: Shape, stage: RecoverStage, assumed: Assumptions) -> bool:
    """Whether a stage with FSDP over several nodes would fit on each of them, and wait less for the network."""
    if stage.sharding != "fsdp" or assumed.nodes == 1:
        return False
    hybrid = stage.model_copy(update={"sharding": "hybrid"})
    group = assumed.group(stage)
    now, then = (exchange(pruned, choice, group, assumed.card).total(stage.accumulation) for choice in (stage, hybrid))
    return then < now and assumed.fits(training_memory(pruned, hybrid, assumed.dense, group))


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
