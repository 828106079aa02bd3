"""What each step of a run will need, from the model's config alone: tokens, FLOPs, GPU memory and hours.

Estimates, not measurements: a share of the data sheets' peak, without waiting for other GPUs, pods or queues. What a
step really takes on the machines that it will run on, a rehearsal measures (`--rehearse`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ptl.config.dag import arm_of, iteration_of, nodes, stage_of
from ptl.config.recover import RecoverStage, Recovery
from ptl.config.run import Config
from ptl.config.schedule import Schedule, one_shot, plan
from ptl.errors import InputError
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import target
from ptl.preflight.forecast_model import (
    CONTEXT,
    PROMPT_TOKENS,
    Shape,
    decode_seconds,
    forward_flops,
    scoring_memory,
    sequence_length,
    shape_of,
    training_memory,
)
from ptl.preflight.gpus import GIB, GPUS, Gpu
from ptl.tables import table_text
from ptl.units import decimal_hours, duration

PEAK_SHARE = 0.35  # of the data sheet's FLOP/s that is reached
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
    shape: Shape
    gpu: Gpu
    gpus: Mapping[str, int]  # that a step holds on a node, by its kind: prune, recover, evaluate
    nodes: int  # of a recovery

    def training(self, stage: RecoverStage) -> int:
        """GPUs that train together in a stage."""
        return devices(stage.processes, self.gpus["recover"]) * self.nodes

    def fits(self, memory: float) -> bool:
        """Whether so many bytes fit on a GPU."""
        return memory <= FULL * self.gpu.memory


@dataclass(frozen=True)
class Work:
    """What a step computes."""

    tokens: int
    flops: float
    seconds: float
    memory: float  # bytes on each GPU
    note: str = ""


@dataclass(frozen=True)
class StepForecast:
    """One step."""

    step: str
    params: int  # of the model that it makes or scores
    work: Work
    gpus: int  # that it holds, on each of its nodes
    nodes: int  # machines that it runs on
    fits: bool  # whether the memory is enough

    @property
    def hours(self) -> float:
        """Wall clock of the whole step."""
        return self.work.seconds / HOUR

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the step holds, whether it uses them or not."""
        return self.hours * self.gpus * self.nodes


@dataclass(frozen=True)
class Forecast:
    """A whole run."""

    gpu: str  # kind
    assumed: Assumptions
    steps: tuple[StepForecast, ...]

    @property
    def params(self) -> int:
        """Of the dense model."""
        return self.assumed.shape.params

    @property
    def hours(self) -> float:
        """Of all steps, one after another."""
        return sum(step.hours for step in self.steps)

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the steps hold."""
        return sum(step.gpu_hours for step in self.steps)


def forecast(config: Config, gpu: str = "h100", count: int | None = None, num_nodes: int | None = None) -> Forecast:
    """Estimate every step of a run on `count` GPUs (none: what the config asks for recovery, at least one).

    `num_nodes`: machines of a recovery, in place of the config's. Raises InputError for an unknown GPU, a model whose
    config cannot be had, or a target that leaves nothing.
    """
    if gpu not in GPUS:
        raise InputError(f"{gpu!r} is not known; it must be one of {', '.join(GPUS)}", field="gpu")
    config = target.with_number(config)
    shape = shape_of(config.model.path, config.model.revision)
    gpus = {stage: _gpus(config, stage, count) for stage in ("prune", "recover", "evaluate")}
    assumed = Assumptions(
        config,
        shape,
        GPUS[gpu],
        gpus,
        num_nodes or config.resources.nodes_of("recover"),
    )
    return Forecast(gpu, assumed, tuple(_steps(assumed)))


def _gpus(config: Config, stage: str, count: int | None) -> int:
    """GPUs that a kind of step holds while it runs, by the config; `count` takes the place of `resources.accelerators`.

    A config without accelerators, for machines without GPUs, is forecast with one for each step.
    """
    resources = config.resources
    accelerators = count or resources.accelerators or 1
    return resources.model_copy(update={"accelerators": accelerators}).accelerators_of(stage)


def _steps(assumed: Assumptions) -> Iterator[StepForecast]:
    """What each step that computes takes, in the DAG's order."""
    config = assumed.config
    schedules = {"loop": config.schedule, "control": one_shot(config.schedule)}
    dense = assumed.shape.dimensions
    models = {
        arm: [dense, *(after for _, after in target.after_iterations(dense, schedule, config.prune))]
        for arm, schedule in schedules.items()
    }
    for node in nodes(config):
        stage, arm, number = stage_of(node.name), arm_of(node.name), iteration_of(node.name)
        if stage not in assumed.gpus:
            continue  # minutes, without a GPU
        model = models[arm][number]
        if stage == "evaluate":
            work = evaluation(model, assumed)
        elif stage == "prune":
            work = _pruning(models[arm][number - 1], assumed)
        else:
            work = _recovery(model, schedules[arm], number, assumed)
        machines = assumed.nodes if stage == "recover" else 1
        yield StepForecast(
            node.name,
            model.params,
            work,
            assumed.gpus[stage],
            machines,
            assumed.fits(work.memory),
        )


def _pruning(before: ModelDimensions, assumed: Assumptions) -> Work:
    """Scoring, layer by layer: one forward pass over the calibration text, with Taylor a second one and one back."""
    shape, calibration, prune = assumed.shape, assumed.config.calibration, assumed.config.prune
    taylor = prune.criterion == "taylor" and prune.target != "layers"
    tokens = calibration.num_sequences * calibration.max_length
    flops = forward_flops(shape, before, tokens, calibration.max_length) * (3 if taylor else 1)
    # Taylor goes back through the hidden states before each layer and after the last one, and through one gradient.
    host_memory = (before.layers + 2) * tokens * shape.hidden * shape.itemsize if taylor else 0
    return Work(
        tokens=tokens,
        flops=flops,
        seconds=flops / (assumed.gpu.fp32 * PEAK_SHARE),
        memory=scoring_memory(shape, calibration),
        note=f"{host_memory / GIB:.1f} GiB of host memory" if host_memory >= GIB else "",
    )


def evaluation(model: ModelDimensions, assumed: Assumptions) -> Work:
    """Generation, the items divided among the GPUs: prompts at a share of the peak, answers of the bandwidth."""
    shape, gpu, evaluate = assumed.shape, assumed.gpu, assumed.config.evaluate
    # vLLM divides the model itself, over all GPUs.
    processes = None if evaluate.backend == "vllm" else evaluate.processes
    gpus = devices(processes, assumed.gpus["evaluate"])
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
        prefill = forward_flops(shape, model, items * PROMPT_TOKENS, PROMPT_TOKENS)
        flops += prefill + forward_flops(shape, model, items * new_tokens, length)
        batches = math.ceil(items / gpus / evaluate.batch_size)  # of each GPU
        seconds += prefill / (gpu.bf16 * PEAK_SHARE * gpus)
        seconds += batches * new_tokens * decode_seconds(shape, model, evaluate.batch_size, shape.itemsize, length, gpu)

    memory = float(model.params * shape.itemsize + evaluate.batch_size * longest * shape.kv_bytes)  # weights and cache
    memory = CONTEXT + (memory / gpus if evaluate.backend == "vllm" else memory)
    return Work(tokens, flops, seconds, memory, note)


def _recovery(model: ModelDimensions, schedule: Schedule, number: int, assumed: Assumptions) -> Work:
    """All stages of the recovery of iteration `number`; the hungriest decides the memory. `schedule`: of the arm."""
    tokens = 0
    flops = seconds = memory = 0.0
    recovery = Recovery(stages=assumed.config.recover)
    iteration = plan(schedule, assumed.config.prune)[number - 1]
    for stage, budget in zip(recovery.stages, recovery.budgets(iteration.tokens), strict=True):
        gpus = assumed.training(stage)
        read = float(budget or 0)
        if stage.method == "grpo":
            context = sequence_length(stage)
            if budget is None:  # it ends with its steps, shared out as tokens are; each answer is of full length
                shared = schedule.model_copy(update={"recovery_tokens": stage.steps})
                steps = plan(shared, assumed.config.prune)[number - 1].tokens
                read = float(steps * stage.batch_size * context)
            # Its answers, a batch at a time.
            rows, new_tokens = stage.batch_size / gpus, stage.max_completion_length
            each = decode_seconds(assumed.shape, model, rows, 4, new_tokens, assumed.gpu)
            seconds += read / context / stage.batch_size * new_tokens * each
        work = _training_flops(stage, model, read, assumed.shape)
        peak = assumed.gpu.bf16 if stage.dtype == "bfloat16" else assumed.gpu.fp32
        tokens += int(read)
        flops += work
        seconds += work / (peak * PEAK_SHARE * gpus)
        memory = max(memory, training_memory(assumed.shape, model, stage, gpus))
    return Work(tokens, flops, seconds, memory)


def _training_flops(stage: RecoverStage, model: ModelDimensions, tokens: float, shape: Shape) -> float:
    """FLOPs of training on so many tokens, with those of another model whose output the loss needs."""
    # A backward pass costs two forward passes, and one more where activations are computed again.
    passes = 4 if stage.gradient_checkpointing else 3
    if stage.method == "grpo" and stage.beta:
        passes += 1  # of the reference model
    context = sequence_length(stage)
    flops = passes * forward_flops(shape, model, tokens, context)
    if stage.method == "distil":
        flops += forward_flops(shape, shape.dimensions, tokens, context)
    return flops


def devices(processes: int | None, count: int) -> int:
    """GPUs of a step that work: with one process for each, or as many as the config says."""
    count = max(1, count)
    return min(processes or count, count)


def table(run: Forecast) -> str:
    """A forecast as a table."""
    headings = ["Step", "Parameters", "Tokens", "FLOPs", "GPUs", "GiB per GPU", "Hours", "Note"]
    rows = []
    for step in run.steps:
        notes = [] if step.fits else ["does not fit"]
        row = [
            step.step,
            f"{step.params:,}",
            f"{step.work.tokens:,}",
            f"{step.work.flops:.1e}",
            f"{step.nodes} x {step.gpus}" if step.nodes > 1 else str(step.gpus),
            f"{step.work.memory / GIB:.1f}",
            decimal_hours(step.hours),
            ", ".join([*notes, step.work.note]).strip(", "),
        ]
        rows.append(row)
    machines = f"{run.assumed.nodes} nodes of " if run.assumed.nodes > 1 else ""
    gpus = max(1, run.assumed.gpus["recover"])  # on each node
    title = (
        f"{run.params:,} parameters on {machines}{gpus} x {run.gpu}: "
        f"{duration(run.hours * HOUR)} of work, {decimal_hours(run.gpu_hours)} GPU-hours (estimates from data sheets, "
        "without exports, queues and the start of pods)"
    )
    return table_text(title, headings, rows, numbers=headings[1:-1])
