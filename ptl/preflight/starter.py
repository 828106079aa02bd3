"""The first config for a model, as `ptl init` writes it: chosen, checked, and with its forecast.

Learning rates and tokens are those of the shipped configs, what fits on the GPUs is the forecast's, and the schedule is
the default, which rests on docs/results.md.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptl.config import yaml_text
from ptl.config.goal import MemoryGoal
from ptl.config.run import Config, ModelSource, Task, check
from ptl.config.schedule import Prune
from ptl.data.training_amount import PASSES, PER_PARAMETER, Amount
from ptl.errors import InputError
from ptl.evaluation.tasks import is_path
from ptl.model import hub, text_tower
from ptl.model.dimensions import ModelDimensions, dimensions_of_config
from ptl.model.families import family_of
from ptl.preflight import starter_fit, starter_text
from ptl.preflight.forecast import Forecast, forecast
from ptl.preflight.forecast_model import Shape, shape_of
from ptl.preflight.gpus import GPUS
from ptl.preflight.known_models import similar
from ptl.preflight.starter_fit import Choices, Machine
from ptl.preflight.starter_presets import Data
from ptl.preflight.starter_target import chosen_target, pruned_to
from ptl.preflight.starter_text import Plan
from ptl.preflight.target import params as params_at_goal
from ptl.units import billions

SNAPSHOTS = "snapshots"  # in the hub's cache: the folder above those of the commits

# Tokens of recovery.
LEAST_TOKENS = 500_000  # of a small model, which learns little from a batch
FEWEST_TOKENS = 10_000  # whatever the data
STEPS = 200  # optimizer steps that a run should have at least
BATCH_SIZES = (64, 32, 16, 8)
# Parameters up to which a learning rate holds where SHARES[0] of them go, of the shipped configs if there is one of
# that size. With each RATE_DOUBLES more the rate doubles, as the best rates of the tiny reasoner's loops do within
# SHARES (docs/results.md).
SHARES = (0.3, 0.66)
RATE_DOUBLES = 0.1
LEARNING_RATES = ((1e7, 1.2e-4), (3e8, 2e-4), (1e9, 1e-4), (2e9, 5e-5), (4.5e9, 2e-5), (1e10, 8e-6), (math.inf, 4e-6))
LARGEST_RATE = 6e-4  # of adapters
LORA_FACTOR = 10  # an adapter's learning rate over that of all weights
CALIBRATION_LENGTH = 512  # tokens


@dataclass(frozen=True)
class Request:
    """What the user says."""

    model: str  # hub id, or folder
    data: Data
    tasks: Sequence[Task] = ()
    target: float | MemoryGoal | None = None  # as schedule.target; None: 0.3, or less (starter_target)
    gpu: str | None = "h100"  # kind; None: no GPU
    gpus: int | None = None  # of a recovery; None: as many as it takes


@dataclass(frozen=True)
class Starter:
    """A config that can be written, and what is known about it."""

    text: str
    config: Config
    forecast: Forecast | None  # None: without a GPU
    to_fill: tuple[str, ...]  # fields that the user must fill in
    amount: Amount  # of the recovery


@dataclass(frozen=True)
class Model:
    """The checkpoint, as far as its config.json tells."""

    folder: Path  # with config.json, perhaps without weights
    revision: str | None  # the commit on the hub
    family: str
    dimensions: ModelDimensions
    shape: Shape
    positions: int  # tokens of its context


def starter(request: Request, folder: Path) -> Starter:
    """The config for `folder`, where its file will be. Raises InputError that names MODEL, --target or --gpu."""
    if request.gpu is not None and request.gpu not in GPUS:
        raise InputError(f"{request.gpu!r} must be one of {', '.join(GPUS)}, or none", field="--gpu")
    if request.gpu is None and request.gpus is not None:
        raise InputError(f"{request.gpus}, with --gpu none", field="--gpus", remedy="remove one of the two")
    model = read_model(request.model)
    plan = _plan(request, model, folder)
    there = request.data.tokens
    amount = Amount(
        plan.tokens, plan.dimensions.params - plan.pruned.params, passes=plan.tokens / there if there else None
    )

    if request.gpu is None:
        text = starter_text.text(plan, Choices(), plan.batch_size)
        return Starter(text, _checked(text, folder), None, _to_fill(request), amount)

    # The forecast reads the model from where it is, so that the hub is asked once.
    local = {"model": ModelSource(path=str(model.folder))}
    draft = _checked(starter_text.text(plan, Choices(gpus=1), plan.batch_size), folder)
    params, vocabulary = model.shape.params, model.shape.vocabulary
    machine = Machine(request.gpu, draft.model_copy(update=local), params, vocabulary)
    choices = starter_fit.fit(machine, request.gpus)
    if choices.lora:
        plan = replace(plan, all_weights=starter_fit.gpus_for_all_weights(machine))
    batch_size = machine.batch(choices.gpus)

    # Once more with what the forecast of the config itself says.
    config = _checked(starter_text.text(plan, choices, batch_size), folder)
    run_forecast = forecast(config.model_copy(update=local), request.gpu)
    text = starter_text.text(plan, choices, batch_size, run_forecast)
    return Starter(text, _checked(text, folder), run_forecast, _to_fill(request), amount)


def read_model(name: str) -> Model:
    """A checkpoint's config.json, of a folder or from the hub. Raises InputError that names MODEL."""
    try:
        folder = hub.locate(name, None, ["config.json"], field="MODEL")
        config = text_tower.read_config(folder)
        family = family_of(config)
        dimensions = dimensions_of_config(config, family, f"config.json of {name}")
        if dimensions.experts and dimensions.experts == dimensions.fewest_experts:
            raise InputError(
                f"{name} has {dimensions.experts} experts in each layer, and a token needs all of them "
                "(num_experts_per_tok), so that none can be removed",
                field="MODEL",
                remedy="give a mixture with more experts, or write a config with prune.target=layers",
            )
        shape = shape_of(str(folder))
    except InputError as error:
        remedy = error.remedy
        close = similar(name)
        if close and name not in close and not Path(name).exists():
            remedy = f"did you mean {' or '.join(close)}? Else {remedy}"
        raise InputError(error.problem, field="MODEL", remedy=remedy) from error
    return Model(
        folder=folder,
        # A snapshot of the hub is in a folder of its commit's name; a user's own folder may be named like that too.
        revision=folder.name if not hub.is_local(name) and folder.parent.name == SNAPSHOTS else None,
        family=family.model_type,
        dimensions=dimensions,
        shape=shape,
        positions=config.get("max_position_embeddings") or 2**31,
    )


def _plan(request: Request, model: Model, folder: Path) -> Plan:
    """All that does not depend on the number of GPUs."""
    target, target_reason = request.target, ""
    if target is None:
        target, target_reason = chosen_target(model.dimensions, request.data.tokens)
    memory = target.memory if isinstance(target, MemoryGoal) else ""
    if isinstance(target, MemoryGoal):
        prune = Prune(target="experts" if model.dimensions.experts else "neurons")
        target = params_at_goal(target, prune, model.folder)
    pruned, multiple = pruned_to(model.dimensions, target)
    tokens, reason = _tokens(model.dimensions.params - pruned.params, request.data)
    max_length = min(request.data.max_length, model.positions)
    params = model.dimensions.params
    learning_rate = default_rate(params, 1 - pruned.params / params)
    rows = tokens / (max_length / 2)  # of about half of the longest row's tokens
    batch_size = next((size for size in BATCH_SIZES if rows / size >= STEPS), BATCH_SIZES[-1])
    return Plan(
        name=run_name(request.model),
        title=_last_name(request.model) if hub.is_local(request.model) else request.model,
        model=_as_seen_from(folder, request.model),
        revision=model.revision,
        family=model.family,
        dimensions=model.dimensions,
        itemsize=model.shape.itemsize,
        target=target,
        memory=memory,
        target_reason=target_reason,
        pruned=pruned,
        multiple=multiple,
        tokens=tokens,
        tokens_reason=reason,
        max_length=max_length,
        calibration_length=min(CALIBRATION_LENGTH, model.positions),
        batch_size=batch_size,
        learning_rate=learning_rate,
        lora_rate=max(learning_rate, min(LORA_FACTOR * learning_rate, LARGEST_RATE)),
        gpu=request.gpu,
        all_weights=None,
        data=_data_seen_from(folder, request.data),
        tasks=[_task_seen_from(folder, task) for task in request.tasks],
    )


def default_rate(params: int, share: float) -> float:
    """The learning rate of a recovery of a model of so many parameters, of which `share` go."""
    rate = next(rate for largest, rate in LEARNING_RATES if params <= largest)
    fewest, most = SHARES
    return float(rate * 2 ** ((min(max(share, fewest), most) - fewest) / RATE_DOUBLES))


def _tokens(removed: int, data: Data) -> tuple[int, str]:
    """Tokens of recovery over all iterations, and why so many."""
    tokens = PER_PARAMETER * removed
    reason = "one for every 10 parameters that are removed, as in the paper"
    if tokens < LEAST_TOKENS:
        tokens, reason = LEAST_TOKENS, "the least for a small model"
    if data.tokens is not None and tokens > PASSES * data.tokens:
        tokens = max(PASSES * data.tokens, FEWEST_TOKENS)
        reason = f"{PASSES} passes over the rows, about {billions(int(data.tokens))} tokens; more rows allow for more"
    return int(float(f"{tokens:.2g}")), reason


def run_name(model: str) -> str:
    """A pipeline's name after a model: `Qwen/Qwen2.5-7B` -> `qwen2-5-7b`."""
    return re.sub(r"[^a-z0-9]+", "-", _last_name(model).lower()).strip("-")[:60].strip("-") or "model"


def _last_name(model: str) -> str:
    """The folder's name, or a hub id without its owner."""
    return Path(model).expanduser().resolve().name if hub.is_local(model) else model.rpartition("/")[2]


def _as_seen_from(folder: Path, name: str) -> str:
    """A path of the command line as a config in `folder` names it; other names stay as they are."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    if path.is_absolute():
        return str(path)
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"


def _task_seen_from(folder: Path, task: Task) -> Task:
    # A folder may have the name of a task of the harness.
    return task.model_copy(update={"name": _as_seen_from(folder, task.name)}) if is_path(task.name) else task


def _data_seen_from(folder: Path, data: Data) -> Data:
    source = data.calibration
    if source is None:
        return data
    return replace(data, calibration=source.model_copy(update={"source": _as_seen_from(folder, source.source)}))


def _to_fill(request: Request) -> tuple[str, ...]:
    fields = [] if request.data.calibration else ["calibration.data"]
    return (*fields, *(() if request.tasks else ("evaluate.tasks",)))


def _checked(text: str, folder: Path) -> Config:
    settings: Any = yaml_text.load(text, "the config")
    return check(Config, settings, "the config", folder=folder)
