"""What each kind of step takes on a GPU: tokens, FLOPs, memory and hours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ptl.config.recover import Distil, Grpo, RecoverStage, Recovery
from ptl.config.run import Calibration, Config
from ptl.config.schedule import Schedule, plan
from ptl.preflight.forecast_model import (
    CONTEXT,
    PROMPT_TOKENS,
    GpuGroup,
    Shape,
    activations,
    decode_seconds,
    forward_flops,
    sequence_length,
    training_memory,
)
from ptl.preflight.forecast_network import exchange, waiting_seconds
from ptl.preflight.gpus import GIB, Gpu

TRAINING_SHARE = 0.35  # of the peak that training reaches
FORWARD_SHARE = 0.4  # the same for scoring and prompts
BACKWARD = 2  # forward passes that a backward pass costs
SOME_WAITING = 0.01  # share of the time from which it is noted
FULL = 0.92  # share of a GPU's memory above which we say that it does not fit
HOUR = 3600  # seconds
ITEMS = {  # of tasks' test splits
    "gsm8k": 1319,
    "gsm8k_cot": 1319,
    "minerva_math500": 500,
    "humaneval": 164,
    "mbpp": 500,
}
UNKNOWN_ITEMS, NEW_TOKENS = 1000, 256  # where a task does not say


@dataclass(frozen=True)
class Assumptions:
    """What all steps of a forecast share."""

    config: Config
    dense: Shape  # the original model, which is the teacher of distillation
    card: Gpu
    gpus: Mapping[str, int]  # that a step holds on a node, by its kind: prune, recover, evaluate
    nodes: int = 1  # of a recovery

    def group(self, stage: RecoverStage) -> GpuGroup:
        """The GPUs that train together in a stage."""
        return GpuGroup(devices(stage.processes, self.gpus["recover"]), self.nodes)

    def fits(self, memory: float) -> bool:
        """Whether so many bytes fit on a GPU."""
        return memory <= FULL * self.card.memory


@dataclass(frozen=True)
class StepForecast:
    """One step."""

    step: str
    params: int  # of the model that it makes or scores
    tokens: int
    flops: float
    memory: float  # bytes on each GPU
    hours: float  # wall clock of the whole step
    gpus: int  # that it holds, on all nodes
    fits: bool  # whether the memory is enough
    note: str = ""
    host_memory: int = 0  # bytes beside the GPU, where they are many
    nodes: int = 1  # machines that it runs on
    waiting: float = 0.0  # share of the time in which GPUs that train wait for each other

    @property
    def tokens_per_second(self) -> float:
        """Of all its GPUs together."""
        return self.tokens / (self.hours * HOUR) if self.tokens else 0.0

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the step holds."""
        return self.hours * self.gpus


def prune_step(name: str, before: Shape, params: int, assumed: Assumptions) -> StepForecast:
    """Scoring, layer by layer: one forward pass over the calibration text, with Taylor a second one and one back."""
    calibration = assumed.config.calibration
    prune = assumed.config.prune
    taylor = prune.criterion == "taylor" and prune.target != "layers"

    tokens = calibration.num_sequences * calibration.max_length
    passes = 3 if taylor else 1
    flops = forward_flops(before, tokens, calibration.max_length) * passes

    memory = _scoring_memory(before, calibration)
    if calibration.answers == "self":
        memory = max(memory, _generation_memory(before, calibration))
    # Taylor goes back through the hidden states before each layer and after the last one, and through one gradient.
    hidden_states = tokens * before.hidden * before.itemsize
    host_memory = (before.layers + 2) * hidden_states if taylor else 0

    return StepForecast(
        step=name,
        params=params,
        tokens=tokens,
        flops=flops,
        memory=memory,
        hours=flops / (assumed.card.fp32 * FORWARD_SHARE) / HOUR,
        gpus=assumed.gpus["prune"],
        fits=assumed.fits(memory),
        note=f"{host_memory / GIB:.1f} GiB of host memory" if host_memory >= GIB else "",
        host_memory=host_memory,
    )


def _scoring_memory(shape: Shape, calibration: Calibration) -> float:
    """Bytes on the GPU: one layer, or embeddings and head; all hidden states once, and one batch at work."""
    # The linear layers are all but the output layer.
    weights = max(shape.in_layers / shape.layers, shape.params - shape.in_layers) * shape.itemsize
    tokens = calibration.num_sequences * calibration.max_length
    hidden_states = tokens * shape.hidden * shape.itemsize
    batch = activations(
        replace(shape, layers=1), calibration.batch_size * calibration.max_length, shape.itemsize, False
    )
    # Of one sequence, in float32: logits, their logarithms and the gradient.
    logits = 3 * 4.0 * calibration.max_length * shape.vocabulary
    return weights + hidden_states + max(batch, logits) + CONTEXT


def _generation_memory(shape: Shape, calibration: Calibration) -> float:
    """Bytes on the GPU while the model answers the calibration's prompts: all weights, and a batch's cache."""
    cache = calibration.batch_size * calibration.max_length * shape.kv_bytes
    return float(shape.params * shape.itemsize + cache + CONTEXT)


def evaluate_step(name: str, shape: Shape, assumed: Assumptions) -> StepForecast:
    """Generation, the items divided among the GPUs: prompts at a share of the peak, answers of the bandwidth."""
    card = assumed.card
    evaluate = assumed.config.evaluate
    # vLLM divides the model itself, over all GPUs.
    processes = None if evaluate.backend == "vllm" else evaluate.processes
    gpus = devices(processes, assumed.gpus["evaluate"])
    batch_size = evaluate.batch_size
    tokens = longest = 0
    flops = seconds = 0.0
    note = ""
    for task in evaluate.tasks:
        items = task.limit or ITEMS.get(task.name)
        if items is None:
            items = UNKNOWN_ITEMS
            note = f"{UNKNOWN_ITEMS} items assumed for a task of unknown size"
        new_tokens = task.max_new_tokens or NEW_TOKENS
        length = PROMPT_TOKENS + new_tokens
        longest = max(longest, length)
        tokens += items * length

        # All prompts are read at once, then each batch answers token by token.
        prefill = forward_flops(shape, items * PROMPT_TOKENS, PROMPT_TOKENS)
        flops += prefill + forward_flops(shape, items * new_tokens, length)
        batches = math.ceil(items / gpus / batch_size)  # of each GPU
        seconds += prefill / (card.bf16 * FORWARD_SHARE * gpus)
        token_seconds = decode_seconds(shape, batch_size, shape.itemsize, length, card)
        seconds += batches * new_tokens * token_seconds

    memory = float(shape.params * shape.itemsize + batch_size * longest * shape.kv_bytes)  # weights and cache
    if evaluate.backend == "vllm":
        memory /= gpus
    memory += CONTEXT
    return StepForecast(
        step=name,
        params=shape.params,
        tokens=tokens,
        flops=flops,
        memory=memory,
        hours=seconds / HOUR,
        gpus=assumed.gpus["evaluate"],
        fits=assumed.fits(memory),
        note=note,
    )


def recover_step(name: str, pruned: Shape, schedule: Schedule, number: int, assumed: Assumptions) -> StepForecast:
    """All stages of the recovery of iteration `number`; the hungriest decides the memory. `schedule`: of the arm."""
    tokens = 0
    flops = seconds = waiting = memory = 0.0
    recovery = Recovery(stages=assumed.config.recover)
    iteration = plan(schedule, assumed.config.prune)[number - 1]
    budgets = recovery.budgets(iteration.tokens)
    for stage, budget in zip(recovery.stages, budgets, strict=True):
        if isinstance(stage, Grpo):
            # Steps are shared out over the iterations as tokens are.
            shared = schedule.model_copy(update={"recovery_tokens": stage.steps})
            steps = plan(shared, assumed.config.prune)[number - 1].tokens
            work = _reinforcement_learning(stage, budget, steps, pruned, assumed)
        else:
            work = _Work(tokens=float(budget or 0), passes=3, context=stage.max_length)
        tokens += int(work.tokens)
        forward = _forward_flops(stage, work, pruned, assumed.dense)
        backward = _backward_flops(stage, work, pruned)
        flops += forward + backward

        # Generating, then training on what was generated.
        waits = _waiting_seconds(stage, work, forward, backward, pruned, assumed)
        waiting += waits
        seconds += work.decode_seconds + (forward + backward) / _flops_per_second(stage, assumed) + waits
        memory = max(memory, training_memory(pruned, stage, assumed.dense, assumed.group(stage)))
    waiting_share = waiting / seconds if seconds else 0.0
    return StepForecast(
        step=name,
        params=pruned.params,
        tokens=tokens,
        flops=flops,
        memory=memory,
        hours=seconds / HOUR,
        gpus=assumed.gpus["recover"] * assumed.nodes,
        fits=assumed.fits(memory),
        note=f"GPUs wait {100 * waiting_share:.0f} %" if waiting_share >= SOME_WAITING else "",
        nodes=assumed.nodes,
        waiting=waiting_share,
    )


def _flops_per_second(stage: RecoverStage, assumed: Assumptions) -> float:
    """What all GPUs of a stage together compute, while they do not wait for each other."""
    peak = assumed.card.bf16 if stage.dtype == "bfloat16" else assumed.card.fp32
    return peak * TRAINING_SHARE * assumed.group(stage).count


def _waiting_seconds(
    stage: RecoverStage,
    work: _Work,
    forward: float,  # FLOPs of the whole stage
    backward: float,
    pruned: Shape,
    assumed: Assumptions,
) -> float:
    """Seconds of a stage in which its GPUs wait for weights or gradients of the others."""
    optimizer_steps = work.tokens / (stage.batch_size * work.context)
    if not optimizer_steps:
        return 0.0
    # Of one forward pass, and of the backward pass after it.
    rate = _flops_per_second(stage, assumed) * optimizer_steps * stage.accumulation
    sent = exchange(pruned, stage, assumed.group(stage), assumed.card)
    return optimizer_steps * waiting_seconds(sent, forward / rate, backward / rate, stage.accumulation)


@dataclass(frozen=True)
class _Work:
    """What a stage does with the model that it trains."""

    tokens: float  # read or generated
    passes: int  # over each of them, in units of a forward pass: the backward pass counts BACKWARD
    context: int  # tokens
    decode_seconds: float = 0.0  # in which answers are generated


def _reinforcement_learning(stage: Grpo, budget: int | None, steps: int, pruned: Shape, assumed: Assumptions) -> _Work:
    """A stage ends with its steps or its tokens; where nothing limits the tokens, each answer is of full length."""
    context = sequence_length(stage)
    answers = steps * stage.batch_size
    tokens = float(answers * context) if budget is None else float(budget)

    # The answers' part of the tokens, a batch at a time.
    new_tokens = stage.max_completion_length
    decoded = tokens * new_tokens / context
    rows = stage.batch_size / assumed.group(stage).count
    seconds = decode_seconds(pruned, rows, 4, new_tokens, assumed.card)
    return _Work(
        tokens=tokens,
        passes=4 if stage.beta else 3,  # with beta the reference model's forward pass too
        context=context,
        decode_seconds=decoded / stage.batch_size * seconds,
    )


def _forward_flops(stage: RecoverStage, work: _Work, pruned: Shape, teacher: Shape) -> float:
    """Of the model, and of another one whose output the loss needs."""
    flops = (work.passes - BACKWARD) * forward_flops(pruned, work.tokens, work.context)
    if isinstance(stage, Distil):
        flops += forward_flops(teacher, work.tokens, work.context)
    return flops


def _backward_flops(stage: RecoverStage, work: _Work, pruned: Shape) -> float:
    """With the forward pass that is computed again for it, where activations are not kept."""
    passes = BACKWARD + 1 if stage.gradient_checkpointing else BACKWARD
    return passes * forward_flops(pruned, work.tokens, work.context)


def devices(processes: int | None, count: int) -> int:
    """GPUs of a step that work: with one process for each, or as many as the config says."""
    count = max(1, count)
    return min(processes or count, count)
