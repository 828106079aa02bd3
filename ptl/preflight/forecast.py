"""What each step of a run will need, from the model's config alone: tokens, GPU memory and hours.

Estimates, not measurements: a share of the data sheets' peak, or of a CPU what it reached in a second, without waiting
for other GPUs, pods or queues. What a step really takes on the machines that it will run on, a rehearsal measures
(`--rehearse`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ptl.config.dag import ANSWERS, arm_of, iteration_of, kind_of, nodes, stage_of
from ptl.config.recover import RecoverStage, Recovery
from ptl.config.run import Config
from ptl.config.schedule import Schedule, Unit, one_shot, plan
from ptl.errors import InputError
from ptl.evaluation import tasks
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import machine, target
from ptl.preflight.forecast_model import (
    GIB,
    GPUS,
    NO_GPU,
    PROMPT_TOKENS,
    USUAL_GPU,
    Gpu,
    Shape,
    answering_memory,
    decode_seconds,
    forward_flops,
    scoring_memory,
    sequence_length,
    shape_of,
    training_memory,
)

FULL = 0.92  # share of a GPU's memory above which we say that it does not fit
HOUR = 3600  # seconds
# Of tasks' test splits.
ITEMS = {"gsm8k": 1319, "gsm8k_cot": 1319, "minerva_math500": 500, "humaneval": 164, "mbpp": 500}
ITEMS |= {"humaneval_instruct": 164, "mbpp_chat": 500, "mbpp_code": 500}
# examples/math_suite
ITEMS |= {
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "math500": 500,
    "minerva": 272,
    "olympiadbench": 674,
}
UNKNOWN_ITEMS = 1000

Work = tuple[int, float, str]  # tokens, seconds, and a note for the user


@dataclass(frozen=True)
class StepForecast:
    """One step."""

    step: str
    model: ModelDimensions  # that it makes or scores
    tokens: int
    hours: float  # wall clock
    memory: float  # bytes on each GPU
    fits: bool  # whether the memory is enough
    gpus: int  # that it holds, on each of its nodes
    nodes: int  # machines that it runs on
    note: str

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the step holds, whether it uses them or not."""
        return self.hours * self.gpus * self.nodes


@dataclass(frozen=True)
class Forecast:
    """A whole run on some machines."""

    config: Config  # with a number as its target
    shape: Shape
    kind: str  # of GPU, or NO_GPU
    gpus: Mapping[str, int]  # that a step holds on a node, by its kind: prune, recover, evaluate
    nodes: int  # of a recovery

    @property
    def gpu(self) -> Gpu:
        """The GPU's data sheet, or what this machine's CPU reaches."""
        if self.kind == NO_GPU:
            return machine.cpu(self.shape.dimensions.hidden, self.shape.dimensions.width)
        return GPUS[self.kind]

    @cached_property
    def schedules(self) -> dict[str, Schedule]:
        """Of each arm."""
        control = {"control": one_shot(self.config.schedule)} if self.config.control else {}
        return {"loop": self.config.schedule, **control}

    @cached_property
    def paths(self) -> dict[str, list[target.SizePath]]:
        """The model's possible sizes after each iteration of each arm."""
        dense, prune = self.shape.dimensions, self.config.prune
        return {
            arm: target.possible_paths(dense, schedule, prune)
            for arm, schedule in self.schedules.items()
        }

    @cached_property
    def steps(self) -> tuple[StepForecast, ...]:
        """Each step that computes, in the DAG's order."""
        return tuple(_steps(self))

    @property
    def hours(self) -> float:
        """Of all steps, one after another."""
        return sum(step.hours for step in self.steps)

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the steps hold."""
        return 0.0 if self.kind == NO_GPU else sum(step.gpu_hours for step in self.steps)

    def of(self, stage: str) -> list[StepForecast]:
        """The steps of a kind: prune, recover or evaluate, which own answers are made like."""
        return [step for step in self.steps if kind_of(step.step) == stage]

    def training(self, stage: RecoverStage) -> int:
        """GPUs that train together in a stage."""
        return devices(stage.processes, self.gpus["recover"]) * self.nodes

    def answering(self) -> int:
        """GPUs that work in an evaluation: vLLM takes all, transformers one."""
        if self.config.evaluate.backend == "hf":
            return 1
        return devices(None, self.gpus["evaluate"])

    def memory(self, stage: str, model: ModelDimensions) -> float:
        """Bytes on each GPU in a kind of step that reads a model; of a recovery's stages the hungriest decides."""
        if stage == "prune":
            return scoring_memory(
                self.shape.of(model), self.config.calibration, self.config.prune.repair
            )
        if stage == "evaluate":
            return answering_memory(self.shape, model, self.config, self.answering())
        return max(
            training_memory(self.shape, model, each, self.training(each))
            for each in self.config.recover
        )

    def fits(self, stage: str, model: ModelDimensions, share: float) -> bool:
        """Whether a kind of step takes at most a share of each GPU's memory."""
        return self.memory(stage, model) <= share * self.gpu.gib * GIB


def forecast(
    config: Config, gpu: str = USUAL_GPU, count: int | None = None, num_nodes: int | None = None
) -> Forecast:
    """Estimate every step of a run on `count` GPUs (none: what the config asks for recovery, at least one).

    `num_nodes`: machines of a recovery, in place of the config's. With NO_GPU in place of a kind every step is on this
    machine's CPU, of which its speed is measured. Raises InputError for an unknown GPU or a model whose config cannot
    be had, and its `steps` for a target that leaves nothing.
    """
    if gpu not in (*GPUS, NO_GPU):
        raise InputError(
            f"{gpu!r} is not known; it must be one of {', '.join(GPUS)}, or {NO_GPU}", field="--gpu"
        )
    if gpu == NO_GPU:
        count = num_nodes = 1
    shape = shape_of(config.model.path, config.model.revision)
    # A config without accelerators, for machines without GPUs, is forecast with one for each step.
    held = config.resources.model_copy(
        update={"accelerators": count or config.resources.accelerators or 1}
    )
    gpus = {stage: held.accelerators_of(stage) for stage in ("prune", "recover", "evaluate")}
    return Forecast(config, shape, gpu, gpus, num_nodes or config.resources.nodes_of("recover"))


def _steps(run: Forecast) -> Iterator[StepForecast]:
    dense = run.shape.dimensions
    for node in nodes(run.config):
        stage, arm, number = stage_of(node.name), arm_of(node.name), iteration_of(node.name)
        kind = kind_of(node.name)
        if stage == "doctor" or kind not in run.gpus:
            continue  # minutes
        path = run.paths[arm][0]
        models = [dense, *(left for _, left in path)]
        model = read = models[number]
        if stage == ANSWERS:
            tokens, seconds, note = _answers(model, run)
        elif stage == "evaluate":
            tokens, seconds, note = _evaluation(model, run)
        elif stage == "prune":
            read = models[number - 1]
            ends = target.ends(run.paths[arm])
            unit = path[number - 1][0].unit
            tokens, seconds, note = _pruning(unit, read, ends, run)
            note = _left(unit, model, ends, dense) + note
        else:
            tokens, seconds, note = _recovery(model, run.schedules[arm], number, run)
        yield StepForecast(
            step=node.name,
            model=model,
            tokens=tokens,
            hours=seconds / HOUR,
            memory=run.memory(kind, read),
            fits=run.fits(kind, read, FULL),
            gpus=run.gpus[kind],
            nodes=run.nodes if stage == "recover" else 1,
            note=note,
        )


def sizes(model: ModelDimensions) -> str:
    """Hidden size, FFN neurons and KV heads, `56/57/1`; experts where their neurons cannot be pruned."""
    return f"{model.hidden}/{model.width if model.narrowable else model.experts}/{model.kv_heads}"


def narrows(ends: list[ModelDimensions], dense: ModelDimensions) -> bool:
    """Whether a model that the loop may end with has another hidden size than the dense one, or fewer KV heads."""
    return any((end.hidden, end.kv_heads) != (dense.hidden, dense.kv_heads) for end in ends)


def _left(
    unit: Unit, model: ModelDimensions, ends: list[ModelDimensions], dense: ModelDimensions
) -> str:
    """What is left of what an iteration removes: `25 of 192 neurons`."""
    if narrows(ends, dense):
        return f"{'about ' if len(ends) > 1 else ''}{sizes(model)} of {sizes(dense)}"
    if unit == "width":
        unit = "neurons" if dense.narrowable else "experts"
    field = "width" if unit == "neurons" else unit
    return f"{getattr(model, field)} of {getattr(dense, field)} {unit}"


def _pruning(
    unit: Unit, before: ModelDimensions, ends: list[ModelDimensions], run: Forecast
) -> Work:
    """Scoring, layer by layer: one forward pass over the calibration text, with Taylor a second one and one back.

    One more through each of several models that the loop may end with. Over a repair's text one, and two through the
    cut model; its products are as large as another.
    """
    shape, calibration = run.shape, run.config.calibration
    taylor = run.config.prune.criterion == "taylor" and unit != "layers"
    tokens = calibration.num_sequences * calibration.max_length
    passes = 3 if taylor else 1
    if unit == "width" and not before.narrowable:
        passes += 1  # of the experts, which have a score of their own
    flops = passes * forward_flops(shape, before, tokens, calibration.max_length)
    if len(ends) > 1:
        flops += sum(forward_flops(shape, end, tokens, calibration.max_length) for end in ends)
    # Taylor goes back through the hidden states before each layer and after the last one, and through one gradient.
    states = (before.layers + 2) * tokens if taylor else 0
    if unit != "layers":
        repaired = run.config.prune.repair * calibration.max_length
        flops += 4 * forward_flops(shape, before, repaired, calibration.max_length)
        states = max(states, 2 * repaired)  # of both models
    host_memory = states * before.hidden * shape.itemsize
    note = f", {host_memory / GIB:.1f} GiB of host memory" if host_memory >= GIB else ""
    return tokens, flops / run.gpu.flops("float32"), note


def _answers(model: ModelDimensions, run: Forecast) -> Work:
    """Generation of a model's own answers."""
    training = run.config.training
    items = training.num_prompts * training.samples
    return *_generation(model, run, items, training.max_new_tokens), "each of full length"


def _generation(
    model: ModelDimensions, run: Forecast, items: int, new_tokens: int
) -> tuple[int, float]:
    """Tokens and seconds, items divided among the GPUs: prompts at a share of the peak, answers of the bandwidth."""
    shape, gpu, gpus = run.shape, run.gpu, run.answering()
    rows = run.config.evaluate.batch_size
    length = PROMPT_TOKENS + new_tokens
    # All prompts are read at once, then each batch answers token by token.
    prefill = forward_flops(shape, model, items * PROMPT_TOKENS, PROMPT_TOKENS)
    seconds = prefill / (gpu.flops("float32" if shape.itemsize == 4 else "bfloat16") * gpus)
    batches = math.ceil(items / gpus / rows)  # of each GPU
    seconds += (
        batches * new_tokens * decode_seconds(shape, model, rows, shape.itemsize, length, gpu)
    )
    return items * length, seconds


def _evaluation(model: ModelDimensions, run: Forecast) -> Work:
    """Generation of the answers to all benchmarks."""
    tokens, seconds, note = 0, 0.0, ""
    for task in run.config.evaluate.tasks:
        items = task.limit or ITEMS.get(Path(task.name).stem)
        if items is None:
            items = UNKNOWN_ITEMS
            note = f"{UNKNOWN_ITEMS} items assumed for a task of unknown size"
        of_task = _generation(model, run, items * task.samples, tasks.answer_tokens(task))
        tokens, seconds = tokens + of_task[0], seconds + of_task[1]
    return tokens, seconds, note


def _recovery(model: ModelDimensions, schedule: Schedule, number: int, run: Forecast) -> Work:
    """All stages of the recovery of iteration `number`; `schedule` is that of the arm."""
    tokens, seconds = 0, 0.0
    recovery = Recovery(stages=run.config.recover)
    iteration = plan(schedule, run.config.prune)[number - 1]
    for stage, budget in zip(recovery.stages, recovery.budgets(iteration.tokens), strict=True):
        gpus = run.training(stage)
        read = float(budget or 0)
        if stage.method == "grpo":
            context = sequence_length(stage)
            # it ends with its steps, shared out as tokens are; each answer is of full length
            if budget is None:
                shared = schedule.model_copy(update={"recovery_tokens": stage.steps})
                steps = plan(shared, run.config.prune)[number - 1].tokens
                read = float(steps * stage.batch_size * context)
            # Its answers, a batch at a time.
            rows, new_tokens = stage.batch_size / gpus, stage.max_completion_length
            each = decode_seconds(run.shape, model, rows, 4, new_tokens, run.gpu)
            seconds += read / context / stage.batch_size * new_tokens * each
        seconds += _training_flops(stage, model, read, run.shape) / (
            run.gpu.flops(stage.dtype) * gpus
        )
        tokens += int(read)
    return tokens, seconds, ""


def _training_flops(
    stage: RecoverStage, model: ModelDimensions, tokens: float, shape: Shape
) -> float:
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
