"""The first config for a model, as `ptl init` writes it: templates/starter.yaml, filled in and checked.

Learning rate and tokens follow the model's size and how much of it goes; the schedule is the default, which rests on
docs/results.md. What fits on the GPUs is what `ptl plan` says.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ptl.config import yaml_text
from ptl.config.base import FILL_IN
from ptl.config.chat import NO_CHAT
from ptl.config.recover import Lora
from ptl.config.run import Config, ModelSource, Task, check
from ptl.config.schedule import MemoryGoal, Prune, Schedule
from ptl.data import chat_templates
from ptl.data.amount import PASSES, PER_PARAMETER, Amount
from ptl.errors import InputError
from ptl.evaluation import tasks
from ptl.model import checkpoint, hub, pretrained
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import remedies, starter_benchmark
from ptl.preflight import target as goals
from ptl.preflight.forecast import forecast
from ptl.preflight.forecast_model import GIB, GPUS, Shape, shape_of
from ptl.preflight.preflight import THOUGHT
from ptl.preflight.starter_benchmark import Benchmark
from ptl.preflight.starter_rows import QUESTION, Rows
from ptl.units import billions, decimal_hours

TEMPLATE = Path(__file__).parent / "templates/starter.yaml"

TARGET, TARGET_STEP = 0.3, 0.05  # share of the parameters
LEAST_TOKENS = 500_000  # of a recovery: a small model learns little from a batch
FEWEST_TOKENS = 10_000  # whatever the data
STEPS = 200  # optimizer steps that a run should have at least
BATCH_SIZES = (64, 32, 16, 8)
CALIBRATION_LENGTH = 512  # tokens
NEURON_TOKENS = 50  # of a repair, for each neuron that stays (docs/scores.md)
ANSWER = 1024  # tokens of one without a thought
FEWEST_PROMPTS = 1000
TYPICAL = 4  # the longest answer is so many times as long as a typical one
# Parameters up to which a learning rate holds where SHARES[0] of them go; that of 0.5B was measured on a chat model's
# own answers, and the shipped configs have their own. With each RATE_DOUBLES more the rate doubles, as the best rates
# of the tiny reasoner's loops do within SHARES (docs/results.md).
SHARES = (0.3, 0.66)
RATE_DOUBLES = 0.1
LEARNING_RATES = {1e7: 1.2e-4, 3e8: 2e-4, 4.5e9: 1e-5, 1e10: 8e-6, math.inf: 4e-6}
LARGEST_RATE = 6e-4  # of adapters
LORA_FACTOR = 10  # an adapter's learning rate over that of all weights

# share of a GPU's memory that a choice may need: the forecast does not know every buffer
ROOM = 0.85
SMALL = 10**9  # parameters up to which activations stay in memory
WITHOUT_BF16 = ("t4",)
PROCESS = 8  # GiB of the host for Python, CUDA and caches of a process; /dev/shm has as much

# of the template's placeholders; without one, or with None, a line is left out
Values = dict[str, Any]


@dataclass(frozen=True)
class Starter:
    """What `ptl init` writes, and how much the recovery trains."""

    text: str  # of the config
    amount: Amount
    task: str  # of the benchmark's YAML; empty without one


def starter(
    model: str,  # hub id, or folder
    file: Path,  # the config's
    *,
    rows: Rows | None,  # None: to be filled in
    benchmark: Benchmark | None,  # which becomes the first task
    task_names: Sequence[str],  # names or paths; none and no benchmark: to be filled in
    target: float | MemoryGoal | None,  # as schedule.target; None: TARGET, or less
    gpu: str | None,  # kind; None: no GPU
    gpus: int,  # of a recovery
) -> Starter:
    """The config for what the user says. Raises InputError that names a field of it, or --gpu."""
    folder = file.parent
    source = hub.locate(model, None, hub.SMALL_FILES)  # perhaps without weights
    shape = shape_of(str(source))
    dense = shape.dimensions
    prune = Prune(target="experts", criterion="reap") if dense.experts else Prune()
    available = rows.tokens if rows else None
    tokenizer = (
        pretrained.load_tokenizer(source) if (source / "tokenizer_config.json").is_file() else None
    )
    format = rows.source.format if rows else ""
    is_post_trained = (
        tokenizer is not None and bool(tokenizer.chat_template) and ends_turns(source, tokenizer)
    )
    # Tokens of the longest of its own answers, of which each row has one; 0: it learns from those of the rows.
    longest = longest_answer(tokenizer, shape) if is_post_trained and format != "text" else 0
    if rows and available and longest:
        available *= longest / TYPICAL / rows.mean_length
    usual = default_target(dense, available, prune.target)
    goal = usual if target is None else target
    schedule = goals.resolved(Schedule(target=goal, iterations=1, recovery_tokens=1), prune, source)
    ((_, after),) = goals.possible_paths(dense, schedule, prune)[0]
    removed = dense.params - after.params
    tokens = _tokens(removed, available)
    is_chat = tokenizer is not None and (is_post_trained or format == "messages")
    task, answer_tokens = "", None
    if benchmark is not None:
        of_chat = longest_answer(tokenizer, shape) if is_chat else 0
        answer_tokens = benchmark.answer_tokens(shape.context, of_chat)
        task_file = benchmark.task_file(file)
        of_task = benchmark.values(task_file, chat=is_chat, answer_tokens=answer_tokens)
        task = render(of_task, starter_benchmark.TEMPLATE)
    values = {
        "title": model,
        "name": json.dumps(run_name(model)),
        "path": json.dumps(_as_seen_from(folder, model)),
        # a snapshot's folder: its commit
        "model_revision": None if hub.is_local(model) else json.dumps(source.name),
        "before": billions(dense.params),
        "after": billions(after.params),
        "percent": f"{100 * removed / dense.params:.0f}",
        "target": f"{schedule.target:_.12g}",
        "lowered": "" if target is None and usual < TARGET else None,
        "iterations": _iterations(dense, schedule, prune),
        "units": prune.target,
        "scored": "widths" if prune.target == "auto" else prune.target,
        "criterion": prune.criterion,
        "tokens": f"{tokens:_}",
        **_data_values(rows, benchmark, task_names, file),
        **_training_values(rows, shape, tokens, removed),
    }
    if is_chat:
        values |= _chat_values(tokenizer, values, longest, tokens, on_gpu=gpu is not None)
    if not dense.experts:
        # rows fill about half of it
        sequences = 2 * NEURON_TOKENS * after.width / values["calibration_length"]
        values["repair"] = f"{_rounded(sequences):_}"
    if gpu is not None:
        values = _fitted(values, gpu, gpus, source, folder, answer_tokens)
    text = render(values)
    _config(text, folder)
    return Starter(
        text, Amount(tokens, removed, passes=tokens / available if available else None), task
    )


def render(values: Values, template_file: Path = TEMPLATE) -> str:
    """The template, without the lines that have a placeholder without a value."""
    kept = []
    for line in template_file.read_text(encoding="utf-8").splitlines():
        template = Template(line)
        if all(values.get(name) is not None for name in template.get_identifiers()):
            kept.append(template.substitute(values))
    return "\n".join(kept).rstrip() + "\n"


def _config(text: str, folder: Path) -> Config:
    settings: Any = yaml_text.load(text, "the config")
    return check(Config, settings, "the config", folder=folder)


def default_target(before: ModelDimensions, tokens: float | None, unit: str = "neurons") -> float:
    """The share to remove by default: TARGET, or less where rows of so many tokens cannot recover that.

    Not more than half of what can go with `unit` as prune.target: in small models most parameters are embeddings, which
    go with the hidden size alone.
    """
    removable = before.width * before.params_per_neuron
    if unit in ("auto", "width") and "hidden" not in before.fixed and not before.square:
        removable = before.params
    elif before.experts:  # those that a token can do without
        removable = (before.experts - before.fewest_experts) * before.params_per_expert
    recovered = math.inf if tokens is None else PASSES * tokens / PER_PARAMETER
    # Shares themselves are inexact: 0.15 // 0.05 is 2.
    steps = min(removable / 2, recovered) // (TARGET_STEP * before.params)
    return min(TARGET, round(max(1, steps) * TARGET_STEP, 2))


def _iterations(dense: ModelDimensions, schedule: Schedule, prune: Prune) -> int | None:
    """The most iterations up to the default that all have something to remove; None: the default."""
    usual: int = Schedule.model_fields["iterations"].default
    for number in range(usual, 0, -1):
        path = goals.possible_paths(
            dense, schedule.model_copy(update={"iterations": number}), prune
        )[0]
        before = [dense, *(after for _, after in path)]
        if all(after != earlier for (_, after), earlier in zip(path, before, strict=False)):
            return None if number == usual else number
    return 1


def _tokens(removed: int, there: float | None) -> int:
    """Tokens of recovery over all iterations, where the rows have so many."""
    tokens = max(PER_PARAMETER * removed, LEAST_TOKENS)
    if there is not None:
        tokens = min(tokens, max(PASSES * there, FEWEST_TOKENS))
    return _rounded(tokens)


def _rounded(number: float) -> int:
    """To two digits: what is forecast has no more."""
    return round(float(f"{number:.2g}"))


def default_rate(params: int, share: float) -> float:
    """The learning rate of a recovery of a model of so many parameters, of which `share` go."""
    rate = next(rate for largest, rate in LEARNING_RATES.items() if params <= largest)
    fewest, most = SHARES
    return float(rate * 2 ** ((min(max(share, fewest), most) - fewest) / RATE_DOUBLES))


def run_name(model: str) -> str:
    """A pipeline's name after a folder's or a model's: `Qwen/Qwen2.5-7B` -> `qwen2-5-7b`."""
    name = Path(model).expanduser().resolve().name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60].strip("-") or "model"


def _as_seen_from(folder: Path, name: str) -> str:
    """A path of the command line as a config in `folder` names it; other names stay as they are."""
    if "://" in name:
        return name
    path = Path(name).expanduser()
    if path.is_absolute() or not path.exists():
        return str(path)
    return f"./{os.path.relpath(path, folder)}"


def _data_values(
    rows: Rows | None, benchmark: Benchmark | None, names: Sequence[str], file: Path
) -> Values:
    """What the file says of rows and benchmarks; fields to fill in where the user has named none."""
    folder = file.parent
    source: Values = {"source": f"{FILL_IN}.jsonl"} | QUESTION
    if rows is not None:
        source = rows.source.model_dump(exclude_defaults=True)
        source["source"] = _as_seen_from(folder, source["source"])
    chosen, runs_code, has_code = [], False, False
    if benchmark is not None:  # its file is not there yet
        chosen.append({"name": f"./{benchmark.task_file(file).relative_to(folder)}"})
        has_code = benchmark.grade == "boxed"
    for name in names:
        specs = tasks.find_here(name)  # without lm_eval the step will look
        runs_code |= any(spec.unsafe_code for spec in specs)
        task = {"name": _as_seen_from(folder, name) if tasks.is_path(name) else name}
        # The default metric, or the first one that all tasks of a group have.
        shared = [
            metric
            for spec in specs[:1]
            for metric in spec.metrics
            if all(metric in s.metrics for s in specs)
        ]
        if shared and Task.model_fields["metric"].default not in shared:
            task["metric"] = shared[0]
        chosen.append(task)
    return {
        **{field: json.dumps(value) for field, value in source.items()},
        "fill_in": None if rows else "",
        "tasks": json.dumps(chosen or [{"name": FILL_IN}]),
        "allow_code": "true" if runs_code or has_code else None,
        "answers_run": "" if runs_code else None,
        "own_code": "" if has_code else None,
    }


def ends_turns(folder: Path, tokenizer: Any) -> bool:
    """Whether a model ends its answers as its chat template ends a turn: base models with a template do not."""
    ends = (checkpoint.generation_config(folder) or checkpoint.read_config(folder)).get(
        "eos_token_id"
    )
    return chat_templates.end_of_turn(tokenizer, NO_CHAT)[0] in (
        ends if isinstance(ends, list) else [ends]
    )


def longest_answer(tokenizer: Any, shape: Shape) -> int:
    """Tokens of an answer for which there is room, of a model that thinks with its thought."""
    longest = THOUGHT if chat_templates.thinks(tokenizer) else ANSWER
    return min(longest, (shape.context or 2 * THOUGHT) // 2)


def _chat_values(
    tokenizer: Any, values: Values, longest: int, tokens: int, *, on_gpu: bool
) -> Values:
    """What the file says of a model that is served as a chat: it learns from its own answers and the dense logits.

    `longest`: tokens of an own answer; 0: it learns from those of the rows. `tokens` of recovery are read PASSES times.
    """
    chat: Values = {"as_chat": ""}
    if longest:
        chat |= _own_answers(values, longest, tokens)
    if not chat_templates.thinks(tokenizer):
        return chat
    tasks = [{**task, "max_new_tokens": longest or THOUGHT} for task in json.loads(values["tasks"])]
    switch = (
        json.dumps({chat_templates.SWITCH: True}) if chat_templates.has_switch(tokenizer) else None
    )
    backend = "vllm" if on_gpu else None
    return chat | {
        "template_kwargs": switch,
        "tasks": json.dumps(tasks),
        "evaluate_backend": backend,
    }


def _own_answers(values: Values, longest: int, tokens: int) -> Values:
    """The fields of calibration and training for answers that the model writes."""
    is_question = all(values.get(name) == json.dumps(text) for name, text in QUESTION.items())
    num_prompts = max(FEWEST_PROMPTS, tokens / PASSES / (longest / TYPICAL))
    answers = {
        "method": "distil",
        "given": None,
        "own": "",
        "answers": "self",
        "num_prompts": f"{_rounded(num_prompts):_}",
        "answer_tokens": longest,
        "keep": "correct" if is_question else "ended",
        "max_length": max(values["max_length"], longest // 2),  # few are longer
        "calibration_length": max(values["calibration_length"], longest // TYPICAL),
    }
    # A benchmark's words are for models that continue a text.
    plain = {
        name: json.dumps(text)
        for name, text in (("prompt", "{question}"), ("completion", "{answer}"))
    }
    return answers | plain if is_question else answers


def _training_values(rows: Rows | None, shape: Shape, tokens: int, removed: int) -> Values:
    """What the file says of scoring and recovery, but for how they fit on GPUs."""
    positions = shape.context or 2**31
    max_length = min(rows.max_length if rows else CALIBRATION_LENGTH, positions)
    num_rows = tokens / (max_length / 2)  # of about half of the longest row's tokens
    return {
        "calibration_length": min(CALIBRATION_LENGTH, positions),
        "calibration_batch_size": 16,
        "given": "",
        "method": "cpt",
        "learning_rate": f"{default_rate(shape.params, removed / shape.params):.1e}",
        "max_length": max_length,
        "batch_size": next(
            (size for size in BATCH_SIZES if num_rows / size >= STEPS), BATCH_SIZES[-1]
        ),
        "recover_gradient_checkpointing": "true" if shape.params > SMALL else None,
        "evaluate_batch_size": 64,
    }


def _fitted(
    values: Values,
    gpu: str,
    gpus: int,
    source: Path,
    folder: Path,
    answer_tokens: int | None,  # of the first task, whose file is not there yet; None: it is
) -> Values:
    """The values with the first settings of each stage that fit on the GPUs, and with what they then take.

    Raises InputError where none fits.
    """
    values = values | {
        "on_gpu": "",
        "gpu": gpu,
        "gpus": gpus,
        "evaluate_gpus": gpus if values.get("evaluate_backend") == "vllm" else 1,
        "card": GPUS[gpu].gib,
        "dtype": None if gpu in WITHOUT_BF16 else "bfloat16",
        "batch_size": max(1, values["batch_size"] // gpus) * gpus,  # which they can divide
    }
    config = _config(render(values), folder)
    local: Values = {"model": ModelSource(path=str(source))}  # so that the hub is asked once
    if answer_tokens is not None:
        first, *others = config.evaluate.tasks
        first = first.model_copy(update={"max_new_tokens": first.max_new_tokens or answer_tokens})
        local["evaluate"] = config.evaluate.model_copy(update={"tasks": (first, *others)})
    run = forecast(config.model_copy(update=local), gpu, gpus)
    for stage in run.gpus:
        model = remedies.largest(run, stage)
        changes = remedies.smallest_change(stage, model, run, ROOM)
        if changes is None and stage == "recover":
            rate = float(values["learning_rate"])
            lora_rate = max(rate, min(LORA_FACTOR * rate, LARGEST_RATE))
            values |= {"recover_lora": "{rank: 64}", "learning_rate": f"{lora_rate:.1e}"}
            run = remedies.changed(run, {"recover.lora": Lora(rank=64)})
            changes = remedies.smallest_change(stage, model, run, ROOM)
        if changes is None:
            raise InputError(
                f"{stage} does not fit on {gpus} x {gpu}, even with the smallest batches",
                field="--gpu",
                remedy=f"name a larger GPU ({remedies.larger_gpus(stage, model, run, ROOM)}), give more --gpus, or "
                "start from a smaller model",
            )
        values |= {field.replace(".", "_"): json.dumps(value) for field, value in changes.items()}
        run = remedies.changed(run, changes)
    peaks = [
        f"{stage} {max(step.memory for step in run.of(stage)) / GIB:.0f}" for stage in run.gpus
    ]
    processes = PROCESS * (gpus + 1)  # at most one for each GPU
    # of a recovery each process reads them in float32, and one collects them
    weights = 4 * run.shape.params / GIB
    return values | {
        "peaks": ", ".join(peaks),
        "gpu_hours": decimal_hours(run.gpu_hours),
        "memory": math.ceil(processes + weights),
        "recover_memory": math.ceil(processes + weights * (gpus + 1)),
    }
