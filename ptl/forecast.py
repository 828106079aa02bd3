"""What a run will need, from the model's config alone: parameters, tokens, FLOPs, GPU memory and hours for each step.

Estimates, not measurements. FLOPs: 2 per weight and token forward, 6 with backward (Kaplan et al. 2020, 2001.08361,
section 2.1), attention's products added. Activations: Korthikanti et al. 2022 (2205.05198), equation 2 without the
attention matrix, which is never stored. Hours assume the shares of the peak below. Steps that do not wait for each
other run at the same time on a cluster: the critical path through them is the time from start to end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptl import advice, checkpoint, hub, shapes
from ptl.config import Config, Distil, Grpo, Iteration, NextToken, RecoverStage, Recovery, one_shot, plan, removal
from ptl.dag import Node, critical_path, nodes, stage_of
from ptl.errors import InputError
from ptl.families import family_of
from ptl.gpus import GIB, GPUS, Gpu

TRAINING_SHARE = 0.35  # of the peak that training reaches
FORWARD_SHARE = 0.4  # the same for scoring and prompts
DECODE_SHARE = 0.5  # of the memory bandwidth that generation reaches
FULL = 0.92  # share of a GPU's memory above which we say that it does not fit
CONTEXT = 1 << 30  # bytes for CUDA, kernels and fragments
ITEMS = {"gsm8k": 1319, "gsm8k_cot": 1319, "minerva_math500": 500, "humaneval": 164, "mbpp": 500}
UNKNOWN_ITEMS, PROMPT_TOKENS, NEW_TOKENS = 1000, 512, 256  # where a task does not say


@dataclass(frozen=True)
class Shape:
    """A model as its config says it."""

    params: int
    matrices: int  # weights of linear layers, the output layer included: the ones that cost FLOPs
    layers: int
    hidden: int
    vocabulary: int
    heads_width: int  # heads * head_dim
    kv_bytes: int  # per token of context
    itemsize: int  # bytes of a stored weight

    def scaled(self, params: int) -> Shape:
        """The shape with fewer parameters, all of them taken from the linear layers."""
        return replace(self, params=params, matrices=self.matrices - (self.params - params))


@dataclass(frozen=True)
class StepForecast:
    """One step: `memory` in bytes for each GPU, `hours` of the whole step."""

    step: str
    params: int
    tokens: int
    flops: float
    memory: float
    hours: float
    fits: bool
    note: str = ""


@dataclass(frozen=True)
class Forecast:
    """A whole run on `count` GPUs of a kind for each step.

    `critical_hours` is the time from start to end where no step waits for a GPU, `critical_steps` the chain of steps
    that takes it. `busiest` are the steps that then run at the same time where their `busiest_gpus` are most.
    """

    gpu: str
    count: int
    params: int
    steps: tuple[StepForecast, ...]
    warnings: tuple[str, ...]
    critical_hours: float
    critical_steps: tuple[str, ...]
    busiest: tuple[str, ...]
    busiest_gpus: int

    @property
    def hours(self) -> float:
        """Of all steps, one after another."""
        return sum(step.hours for step in self.steps)


def forecast(config: Config, gpu: str = "h100", count: int | None = None) -> Forecast:
    """Estimate every step of a run on `count` GPUs (none: what the config asks for recovery, at least one).

    Raises InputError for an unknown GPU, a model whose config cannot be had, or a target that leaves nothing.
    """
    if gpu not in GPUS:
        raise InputError(f"gpu: {gpu!r} is not known; it must be one of {', '.join(GPUS)}")
    number = max(1, _gpus(config, "recover", count))
    shape = shape_of(config.model.path, config.model.revision)
    total = removal(shape.params, config.schedule.target)
    if not 0 < total < shape.matrices:
        raise InputError(
            f"schedule.target: {config.schedule.target:g} would remove {total:,} of {shape.params:,} parameters; "
            "give a share between 0 and 1, or the number of parameters to end with"
        )
    steps = [_evaluate("evaluate-0", config, shape, gpu)]
    arms = [("", plan(config.schedule, config.prune))]
    arms += [("control-", plan(one_shot(config.schedule), config.prune))] if config.control else []
    for prefix, rounds in arms:
        before = shape
        for it in rounds:
            after = shape.scaled(shape.params - int(it.progress * total))
            suffix = "" if prefix else f"-{it.index}"
            steps.append(_prune(f"{prefix}prune{suffix}", config, before, after, gpu))
            steps.append(_recover(f"{prefix}recover{suffix}", config, rounds, it, after, shape, gpu, number))
            steps.append(_evaluate(f"{prefix}evaluate{suffix}", config, after, gpu))
            before = after
    too_large = tuple(
        f"{step.step}: about {step.memory / GIB:.0f} GiB on each GPU, {gpu} has {GPUS[gpu].memory / GIB:.0f} GiB: "
        f"{_remedy(step.step, config, number)}"
        for step in steps
        if not step.fits
    )
    dag, hours = nodes(config), {step.step: step.hours for step in steps}
    critical, path = critical_path(dag, hours)
    asked = {step.step: _gpus(config, step.step, count) for step in steps}
    together = busiest(dag, hours, asked)
    gpus = sum(asked[name] for name in together)
    return Forecast(
        gpu,
        number,
        shape.params,
        tuple(steps),
        (*advice.warnings(config), *too_large),
        critical,
        tuple(path),
        together,
        gpus,
    )


def busiest(dag: Sequence[Node], hours: Mapping[str, float], gpus: Mapping[str, int]) -> tuple[str, ...]:
    """The steps that run at the same time when most GPUs are held, each step starting as soon as it can.

    Steps without hours (import, report) hold none. Of several such moments the first.
    """
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    for node in dag:
        starts[node.name] = max((ends[name] for name in node.needs), default=0.0)
        ends[node.name] = starts[node.name] + hours.get(node.name, 0.0)
    working = [node.name for node in dag if hours.get(node.name)]
    moments = sorted({starts[name] for name in working})
    running = [tuple(name for name in working if starts[name] <= moment < ends[name]) for moment in moments]
    return max(running, key=lambda names: sum(gpus[name] for name in names), default=())


def _gpus(config: Config, step: str, count: int | None) -> int:
    """GPUs that a step holds while it runs: `count` where it is given, else what the config says.

    A config without accelerators, for machines without GPUs, is forecast with one for each step.
    """
    own = config.resources.steps.get(stage_of(step))  # type: ignore[call-overload]
    if count is None and own and own.accelerators is not None:
        return int(own.accelerators)
    return count or max(1, config.resources.accelerators)


def table(said: Forecast) -> Any:
    """A forecast as a rich table; a star marks the steps of the critical path."""
    from rich.table import Table

    model = f"{said.params:,} parameters on {said.count} x {said.gpu}"
    title = f"{model}: {_duration(said.hours)} of work, {_duration(said.critical_hours)} from start to end (estimates)"
    shown = Table(title=title, title_justify="left", caption=concurrency(said), caption_justify="left")
    for heading in ("Step", "Parameters", "Tokens", "FLOPs", "GiB per GPU", "Hours", "Note"):
        shown.add_column(heading, justify="left" if heading in ("Step", "Note") else "right")
    for step in said.steps:
        note = step.note if step.fits else f"does not fit; {step.note}".removesuffix("; ")
        memory, hours = f"{step.memory / GIB:.1f}", f"{step.hours:.2f}"
        tokens = f"{step.tokens:,}" if step.tokens else ""
        style = None if step.fits else "red"
        name = f"{step.step} *" if step.step in said.critical_steps else step.step
        shown.add_row(name, f"{step.params:,}", tokens, f"{step.flops:.1e}", memory, hours, note, style=style)
    return shown


def concurrency(said: Forecast) -> str:
    """What the time from start to end rests on: the steps marked, and the GPUs that must be free at the same time."""
    *others, last = said.busiest
    return (
        "* critical path: no run ends sooner than these steps take, one after another. At its busiest the run holds "
        f"{said.busiest_gpus} GPUs: {', '.join(others)} and {last} at the same time. With fewer, steps wait for each "
        "other; on the GPUs of one step the run takes as long as its work. Start-up of pods and queues are not counted."
    )


def _duration(hours: float) -> str:
    """11.24 -> `11.2 hours`, 0.2 -> `12 minutes`, 0.001 -> `3.6 seconds`."""
    for value, unit in ((hours, "hours"), (hours * 60, "minutes")):
        if value >= 1:
            return f"{value:.1f} {unit}" if unit == "hours" else f"{value:.0f} {unit}"
    return f"{hours * 3600:.2g} seconds"


def shape_of(path: str, revision: str | None = None) -> Shape:
    """A model's shape from its config.json alone; of a folder without a dtype there, from the weights' headers too."""
    folder = hub.locate_config(path, revision)
    config = checkpoint.read_config(folder)
    family = family_of(config)
    sizes = shapes.sizes(config, family, f"config.json of {path}")
    params, matrices = shapes.count(config, family, sizes)
    itemsize = checkpoint.itemsize(folder)
    return Shape(
        params=params,
        matrices=matrices,
        layers=sizes.layers,
        hidden=sizes.hidden_size,
        vocabulary=sizes.vocab_size,
        heads_width=sizes.num_attention_heads * sizes.head_dim,
        kv_bytes=2 * sizes.layers * sizes.num_key_value_heads * sizes.head_dim * itemsize,
        itemsize=itemsize,
    )


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """FLOPs of a forward pass over `tokens`, each looking back over half of `context` on average."""
    return tokens * (2 * shape.matrices + 2 * shape.layers * shape.heads_width * context)


def activations(shape: Shape, tokens: float, itemsize: int, checkpointed: bool) -> float:
    """Bytes kept for the backward pass of `tokens` tokens on one device."""
    layer = 34 / 2 * itemsize * shape.hidden * tokens
    inputs = itemsize * shape.hidden * tokens
    return shape.layers * inputs + layer if checkpointed else shape.layers * layer


def training_memory(shape: Shape, stage: RecoverStage, teacher: Shape, count: int) -> float:
    """Bytes on each of `count` GPUs: float32 weights, gradients and Adam's moments, activations, logits, teacher."""
    itemsize = 2 if stage.dtype == "bfloat16" else 4
    lora = isinstance(stage, NextToken) and stage.lora is not None
    fixed, moving = 4.0 * shape.params, (0.0 if lora else 12.0 * shape.params)  # weights; gradients and moments
    if stage.sharding == "fsdp":
        fixed, moving = fixed / count, moving / count
    elif stage.sharding == "zero2":
        moving /= count
    rows = math.ceil(stage.batch_size / (stage.accumulation * count))
    length = stage.max_length if isinstance(stage, NextToken) else PROMPT_TOKENS + stage.max_completion_length
    memory = fixed + moving + activations(shape, rows * length, itemsize, stage.gradient_checkpointing)
    if isinstance(stage, Distil):  # logits of both and their gradient, and the teacher
        memory += 3 * 4.0 * rows * length * shape.vocabulary + teacher.params * teacher.itemsize
    if isinstance(stage, Grpo):  # reference model and the cache while it generates
        memory += (4.0 * shape.params if stage.beta else 0) + rows * length * shape.kv_bytes
    return memory + CONTEXT


def _recover(
    name: str,
    config: Config,
    rounds: Sequence[Iteration],
    it: Iteration,
    shape: Shape,
    dense: Shape,
    gpu: str,
    count: int,
) -> StepForecast:
    """All stages of one recovery; the hungriest decides the memory."""
    card = GPUS[gpu]
    flops = seconds = memory = 0.0
    tokens = 0
    recovery = Recovery(stages=config.recover)
    for stage, budget in zip(recovery.stages, recovery.budgets(it.tokens), strict=True):
        used = devices(stage, count)
        peak = card.bf16 if stage.dtype == "bfloat16" else card.fp32
        memory = max(memory, training_memory(shape, stage, dense, used))
        if isinstance(stage, Grpo):
            shared = config.schedule.model_copy(update={"iterations": len(rounds), "recovery_tokens": stage.steps})
            answers = plan(shared, config.prune)[it.index - 1].tokens * stage.batch_size
            longest = answers * (PROMPT_TOKENS + stage.max_completion_length)
            seen = float(longest if budget is None else budget)
            passes = 4 if stage.beta else 3  # forward and backward, and the reference's forward
            decoded = seen * stage.max_completion_length / (PROMPT_TOKENS + stage.max_completion_length)
            rows = stage.batch_size / used
            seconds += decoded / stage.batch_size * _token_seconds(shape, rows, 4, stage.max_completion_length, card)
            context = PROMPT_TOKENS + stage.max_completion_length
        else:
            seen, passes, context = float(budget or 0), 3, stage.max_length
        work = passes * forward_flops(shape, seen, context)
        if isinstance(stage, Distil):
            work += forward_flops(dense, seen, context)
        if stage.gradient_checkpointing:
            work += forward_flops(shape, seen, context)
        flops += work
        seconds += work / (peak * TRAINING_SHARE * used)
        tokens += int(seen)
    fits = memory <= FULL * card.memory
    return StepForecast(name, shape.params, tokens, flops, memory, seconds / 3600, fits)


def devices(stage: RecoverStage, count: int) -> int:
    """GPUs that a stage trains on."""
    return min(stage.processes or count, count)


def _prune(name: str, config: Config, before: Shape, after: Shape, gpu: str) -> StepForecast:
    """Scoring: one forward pass over the calibration text, with Taylor a backward pass too; whole model on one GPU."""
    scored = config.calibration
    tokens = scored.num_sequences * scored.max_length
    backward = config.prune.criterion == "taylor"
    flops = forward_flops(before, tokens, scored.max_length) * (3 if backward else 1)
    batch = scored.batch_size * scored.max_length
    memory = float(before.params * before.itemsize * (2 if backward else 1) + CONTEXT)
    memory += activations(before, batch, 4, not backward) + 4.0 * batch * before.vocabulary
    card = GPUS[gpu]
    hours = flops / (card.fp32 * FORWARD_SHARE) / 3600
    return StepForecast(name, after.params, tokens, flops, memory, hours, memory <= FULL * card.memory)


def _evaluate(name: str, config: Config, shape: Shape, gpu: str) -> StepForecast:
    """Generation on one GPU: prompts at a share of the peak, answers at a share of the bandwidth."""
    card, settings = GPUS[gpu], config.evaluate
    tokens, flops, seconds, guessed = 0, 0.0, 0.0, False
    longest = 0
    for task in settings.tasks:
        known = task.limit or ITEMS.get(task.name)
        guessed = guessed or known is None
        items, new = known or UNKNOWN_ITEMS, task.max_new_tokens or NEW_TOKENS
        length = PROMPT_TOKENS + new
        longest = max(longest, length)
        prefill = forward_flops(shape, items * PROMPT_TOKENS, PROMPT_TOKENS)
        flops += prefill + forward_flops(shape, items * new, length)
        tokens += items * length
        seconds += prefill / (card.bf16 * FORWARD_SHARE)
        seconds += (
            math.ceil(items / settings.batch_size)
            * new
            * _token_seconds(shape, settings.batch_size, shape.itemsize, length, card)
        )
    memory = shape.params * shape.itemsize + settings.batch_size * longest * shape.kv_bytes + CONTEXT
    note = f"{UNKNOWN_ITEMS} items assumed for a task of unknown size" if guessed else ""
    return StepForecast(name, shape.params, tokens, flops, memory, seconds / 3600, memory <= FULL * card.memory, note)


def _token_seconds(shape: Shape, rows: float, itemsize: int, context: float, card: Gpu) -> float:
    """Seconds to decode one token of every row: all weights and the cache are read once."""
    return (shape.params * itemsize + rows * context * shape.kv_bytes) / (card.bandwidth * DECODE_SHARE)


def _remedy(step: str, config: Config, count: int) -> str:
    if "recover" not in step:
        return "lower the batch size, or take a larger GPU"
    ways = []
    stages = config.recover
    if any(stage.sharding == "none" for stage in stages):
        ways.append("recover.sharding: fsdp over several GPUs")
    if any(isinstance(stage, NextToken) and stage.lora is None for stage in stages):
        ways.append("recover.lora")
    if not all(stage.gradient_checkpointing for stage in stages):
        ways.append("recover.gradient_checkpointing: true")
    ways.append("a larger recover.accumulation")
    return ", ".join(ways) + (" or more GPUs" if count > 1 else "")
