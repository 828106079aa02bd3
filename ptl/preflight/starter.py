"""The first config for a model, as `ptl init` writes it: templates/starter.yaml, filled in and checked.

Learning rates and tokens are those of the shipped configs, and the schedule is the default, which rests on
docs/results.md. What fits on the GPUs is what `ptl plan` says.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

from ptl.config import yaml_text
from ptl.config.dag import stage_of
from ptl.config.goal import MemoryGoal
from ptl.config.paths import FILL_IN
from ptl.config.run import Config, ModelSource, Task, check
from ptl.config.schedule import Prune, Schedule
from ptl.data.training_amount import PASSES, PER_PARAMETER, Amount
from ptl.errors import InputError
from ptl.evaluation import tasks
from ptl.model import hub
from ptl.model.dimensions import ModelDimensions
from ptl.preflight import remedies
from ptl.preflight import target as goals
from ptl.preflight.forecast import Forecast, forecast
from ptl.preflight.forecast_model import Shape, shape_of
from ptl.preflight.gpus import GIB, GPUS
from ptl.preflight.starter_rows import QUESTION, Rows
from ptl.units import billions, decimal_hours

TEMPLATE = Path(__file__).parent / "templates/starter.yaml"
SNAPSHOTS = "snapshots"  # in the hub's cache: the folder above those of the commits

TARGET, TARGET_STEP = 0.3, 0.05  # share of the parameters
LEAST_TOKENS = 500_000  # of a recovery: a small model learns little from a batch
FEWEST_TOKENS = 10_000  # whatever the data
STEPS = 200  # optimizer steps that a run should have at least
BATCH_SIZES = (64, 32, 16, 8)
CALIBRATION_LENGTH = 512  # tokens
# Parameters up to which a learning rate holds where SHARES[0] of them go, of the shipped configs if there is one of
# that size. With each RATE_DOUBLES more the rate doubles, as the best rates of the tiny reasoner's loops do within
# SHARES (docs/results.md).
SHARES = (0.3, 0.66)
RATE_DOUBLES = 0.1
LEARNING_RATES = {
    1e7: 1.2e-4,
    3e8: 2e-4,
    1e9: 1e-4,
    2e9: 5e-5,
    4.5e9: 2e-5,
    1e10: 8e-6,
    math.inf: 4e-6,
}
LARGEST_RATE = 6e-4  # of adapters
LORA_FACTOR = 10  # an adapter's learning rate over that of all weights

ROOM = 0.85  # share of a GPU's memory that a choice may need: the forecast does not know every buffer
LOGITS = 8.0  # bytes of a logit in training, with its gradient; the forecast of a recovery leaves them out
SMALL = 10**9  # parameters up to which activations stay in memory
BATCHES = (64, 32, 16, 8, 4, 2, 1)  # of scoring and evaluation
WITHOUT_BF16 = ("t4",)
PROCESS = 8  # GiB of the host for Python, CUDA and caches of a process; /dev/shm has as much

Values = dict[str, Any]  # of the template's placeholders; without one, or with None, a line is left out


@dataclass(frozen=True)
class Request:
    """What the user says."""

    model: str  # hub id, or folder
    rows: Rows | None = None  # None: to be filled in
    tasks: Sequence[str] = ()  # names or paths; none: to be filled in
    target: float | MemoryGoal | None = None  # as schedule.target; None: TARGET, or less
    gpu: str | None = None  # kind; None: no GPU
    gpus: int = 1  # of a recovery


@dataclass(frozen=True)
class Starter:
    """A config that can be written, and what is known about it."""

    text: str
    amount: Amount  # of the recovery
    warnings: Sequence[str]


def starter(request: Request, folder: Path) -> Starter:
    """The config for `folder`, where its file will be. Raises InputError that names a field of it, or --gpu."""
    model = hub.locate(request.model, None, ["config.json"])  # perhaps without weights
    shape = shape_of(str(model))
    prune = Prune(target="experts", criterion="reap") if shape.dimensions.experts else Prune()
    there = request.rows.tokens if request.rows else None
    usual = default_target(shape.dimensions, there)
    target = request.target or usual
    removed = _removed(shape.dimensions, target, prune, model)
    tokens = _tokens(removed, there)

    values = _model_values(request.model, model, shape, removed) | _data_values(request, folder)
    values |= _training_values(request, shape, tokens, removed)
    values |= {
        "path": json.dumps(_as_seen_from(folder, request.model)),
        "target": f"{target:_.12g}" if isinstance(target, float) else f"{{memory: {target.memory}}}",
        "lowered": "" if request.target is None and usual < TARGET else None,
        "units": prune.target,
        "criterion": prune.criterion,
    }
    warnings: list[str] = []
    if request.gpu is not None:
        values = _on_gpus(values, request.gpu, request.gpus, shape)
        values, run = _fitted(values, shape, model, folder)
        values |= _estimates(run, shape.params, request.gpus)
        warnings = remedies.warnings(run)
    text = render(values)
    _config(text, folder)
    return Starter(text, Amount(tokens, removed, passes=tokens / there if there else None), warnings)


def render(values: Values) -> str:
    """The template, without the lines that have a placeholder without a value."""
    kept = []
    for line in TEMPLATE.read_text(encoding="utf-8").splitlines():
        names = Template(line).get_identifiers()
        if all(values.get(name) is not None for name in names):
            kept.append(Template(line).substitute(values))
    return "\n".join(kept).rstrip() + "\n"


def _config(text: str, folder: Path) -> Config:
    settings: Any = yaml_text.load(text, "the config")
    return check(Config, settings, "the config", folder=folder)


def default_target(before: ModelDimensions, tokens: float | None) -> float:
    """The share to remove by default: TARGET, or less where rows of so many tokens cannot recover that.

    Not more than half of what can go: in small models most parameters are embeddings.
    """
    removable = before.width * before.params_per_neuron
    if before.experts:  # those that a token can do without
        removable = (before.experts - before.fewest_experts) * before.params_per_expert
    recovered = math.inf if tokens is None else PASSES * tokens / PER_PARAMETER
    share = min(removable / 2, recovered) / before.params
    return TARGET if share >= TARGET else max(TARGET_STEP, round(share // TARGET_STEP * TARGET_STEP, 2))


def _removed(dense: ModelDimensions, target: float | MemoryGoal, prune: Prune, model: Path) -> int:
    """The parameters that a target removes. Raises InputError where it cannot be reached."""
    schedule = Schedule(target=target, iterations=1, recovery_tokens=1)
    ((_, after),) = goals.after_iterations(dense, goals.resolved(schedule, prune, model), prune)
    return dense.params - after.params


def _tokens(removed: int, there: float | None) -> int:
    """Tokens of recovery over all iterations, where the rows have so many."""
    tokens = max(PER_PARAMETER * removed, LEAST_TOKENS)
    if there is not None:
        tokens = min(tokens, max(PASSES * there, FEWEST_TOKENS))
    return int(float(f"{tokens:.2g}"))


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
    path = Path(name).expanduser()
    if path.is_absolute() or not path.exists():
        return str(path)
    return f"./{os.path.relpath(path, folder)}"


def _model_values(name: str, model: Path, shape: Shape, removed: int) -> Values:
    """What the file says of the model, and of what is removed of it."""
    # A snapshot of the hub is in a folder of its commit's name; a user's own folder may be named like that too.
    is_snapshot = not hub.is_local(name) and model.parent.name == SNAPSHOTS
    return {
        "title": name,
        "name": json.dumps(run_name(name)),
        "model_revision": json.dumps(model.name) if is_snapshot else None,
        "before": billions(shape.params),
        "after": billions(shape.params - removed),
        "percent": f"{100 * removed / shape.params:.0f}",
    }


def _data_values(request: Request, folder: Path) -> Values:
    """What the file says of rows and benchmarks; fields to fill in where the user has named none."""
    source: Values = {"source": f"{FILL_IN}.jsonl"} | QUESTION
    if request.rows is not None:
        source = request.rows.source.model_dump(exclude_defaults=True)
        source["source"] = _as_seen_from(folder, source["source"])
    specs = [spec for name in request.tasks if tasks.can_find(name) for spec in tasks.find(name)]
    return {
        **{name: json.dumps(value) for name, value in source.items()},
        "fill_in": None if request.rows else "",
        "tasks": json.dumps([_task(name, folder) for name in request.tasks] or [{"name": FILL_IN}]),
        "allow_code": "true" if any(spec.unsafe_code for spec in specs) else None,
        "chat_template": "true" if source.get("format") == "messages" else None,
    }


def _task(name: str, folder: Path) -> Values:
    """A task with its metric: the default one, or the first that it has, of a group the first that all members have."""
    specs = tasks.find(name) if tasks.can_find(name) else []  # without lm_eval the step will look
    metrics = [metric for spec in specs[:1] for metric in spec.metrics if all(metric in each.metrics for each in specs)]
    default = Task.model_fields["metric"].default
    task = {"name": _as_seen_from(folder, name) if tasks.is_path(name) else name}
    return task if default in metrics or not metrics else task | {"metric": metrics[0]}


def _training_values(request: Request, shape: Shape, tokens: int, removed: int) -> Values:
    """What the file says of scoring and recovery, but for how they fit on GPUs."""
    positions = shape.context or 2**31
    max_length = min(request.rows.max_length if request.rows else CALIBRATION_LENGTH, positions)
    rows = tokens / (max_length / 2)  # of about half of the longest row's tokens
    rate = default_rate(shape.params, removed / shape.params)
    return {
        "tokens": f"{tokens:_}",
        "calibration_length": min(CALIBRATION_LENGTH, positions),
        "calibration_batch": 16,
        "learning_rate": f"{rate:.1e}",
        "lora_rate": f"{max(rate, min(LORA_FACTOR * rate, LARGEST_RATE)):.1e}",
        "max_length": max_length,
        "batch_size": next((size for size in BATCH_SIZES if rows / size >= STEPS), BATCH_SIZES[-1]),
        "evaluate_batch": 64,
    }


def _on_gpus(values: Values, gpu: str, gpus: int, shape: Shape) -> Values:
    """The values for so many GPUs of a kind, with a batch that they can divide."""
    return values | {
        "on_gpu": "",
        "gpu": gpu,
        "gpus": gpus,
        "card": f"{GPUS[gpu].memory / GIB:.0f}",
        "dtype": None if gpu in WITHOUT_BF16 else "bfloat16",
        "checkpointing": "true" if shape.params > SMALL else None,
        "batch_size": max(1, values["batch_size"] // gpus) * gpus,
    }


def _fitted(values: Values, shape: Shape, model: Path, folder: Path) -> tuple[Values, Forecast]:
    """The values with the first choice of each stage that fits on the GPUs, and their forecast.

    Raises InputError where none fits.
    """
    gpu, gpus = values["gpu"], values["gpus"]
    room = ROOM * GPUS[gpu].memory
    local = {"model": ModelSource(path=str(model))}  # so that the hub is asked once

    def run(choice: Values) -> Forecast:
        config = _config(render(values | choice), folder)
        return forecast(config.model_copy(update=local), gpu, gpus)

    for stage in ("prune", "evaluate", "recover"):
        for choice in _choices(stage, values):
            needed = _peak(run(choice), stage)
            if stage == "recover":
                rows = values["batch_size"] // gpus // (choice["accumulation"] or 1)
                needed += LOGITS * rows * values["max_length"] * shape.vocabulary
            if needed <= room:
                break
        else:
            larger = ", ".join(kind for kind, card in GPUS.items() if needed <= ROOM * card.memory)
            raise InputError(
                f"{stage} needs about {needed / GIB:.0f} GiB on each {gpu} with the smallest batches, more than "
                f"{room / GIB:.0f} of its {values['card']} GiB",
                field="--gpu",
                remedy=f"name a larger GPU ({larger}), give more --gpus, or start from a smaller model",
            )
        values = values | choice
    return values, run({})


def _choices(stage: str, values: Values) -> Iterator[Values]:
    """What may be chosen for a stage, the fastest first: smaller batches; for recovery adapters last."""
    if stage == "prune":
        yield from ({"calibration_batch": batch} for batch in BATCHES[2:])
        return
    if stage == "evaluate":
        yield from ({"evaluate_batch": batch} for batch in BATCHES)
        return
    rows = values["batch_size"] // values["gpus"]  # of an optimizer step on each GPU
    adapter = {"lora": "{rank: 64}", "learning_rate": values["lora_rate"]}
    shardings = (None, "fsdp") if values["gpus"] > 1 else (None,)
    accumulations = [number for number in range(1, rows + 1) if rows % number == 0]
    for weights, sharding, number in product(({}, adapter), shardings, accumulations):
        yield weights | {"sharding": sharding, "accumulation": number if number > 1 else None}


def _peak(run: Forecast, stage: str) -> float:
    """Bytes on the fullest GPU in the steps of a stage."""
    return max(step.work.memory for step in run.steps if stage_of(step.step) == stage)


def _estimates(run: Forecast, params: int, gpus: int) -> Values:
    """What the file says of the GPUs' and the host's memory, and of time."""
    stages = ("prune", "recover", "evaluate")
    peaks = [f"{stage} {_peak(run, stage) / GIB:.0f}" for stage in stages]
    processes = PROCESS * (gpus + 1)  # at most one for each GPU
    weights = 4 * params / GIB  # of a recovery each process reads them in float32, and one collects them again
    return {
        "peaks": ", ".join(peaks),
        "gpu_hours": decimal_hours(run.gpu_hours),
        "memory": math.ceil(processes + weights),
        "recover_memory": math.ceil(processes + weights * (gpus + 1)),
    }
