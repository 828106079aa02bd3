"""What a run needs of its model, data and tasks, checked before any work and without weights in memory; and warnings
of settings that are allowed, and yet likely to waste a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ptl.config.base import FILL_IN
from ptl.config.run import Config
from ptl.config.schedule import Prune, Schedule
from ptl.data import chat_templates
from ptl.data.sources import local_file
from ptl.errors import InputError
from ptl.evaluation import tasks
from ptl.evaluation.tasks import answer_tokens, check_gate, check_greedy, check_tasks, hub_data
from ptl.model import checkpoint, hub, pretrained, text_tower
from ptl.model.dimensions import ModelDimensions, model_dimensions
from ptl.model.families import family_of
from ptl.preflight import target
from ptl.preflight.limits import check_settings
from ptl.preflight.rows import check_data, check_own_answers, check_rewards, named_sources
from ptl.units import listed, numbered

THOUGHT = 8192  # tokens of an answer that may hold a thought


def preflight(config: Config, *, hub_rows: bool = False) -> tuple[Path, ModelDimensions | None]:
    """Check all that a run needs, without weights in memory; returns the model's local folder and its dimensions.

    With `hub_rows` data sets of the hub are downloaded, and their rows checked too.
    """
    check_data(config.calibration, config.training, config.recover, hub_rows=hub_rows)
    check_rewards(config.recover, config.training)
    check_own_answers(config.training)
    check_tasks(config.evaluate)
    # The gate compares item by item, so its task must call each item right or wrong.
    check_gate(config.evaluate, config.gate)
    if any(export.format == "gguf" for export in config.export):
        check_greedy(config.evaluate)
    # Only now a download, which may take an hour.
    folder = hub.locate(config.model.path, config.model.revision)
    dimensions = check_model(folder, config.schedule, config.prune)
    if dimensions is not None:
        check_settings(
            folder,
            config.calibration,
            config.training,
            config.evaluate,
            config.recover,
            config.chat,
        )
    return folder, dimensions


def check_filled_in(config: Config) -> None:
    """Raise InputError that names all fields which `ptl init` has left to the user."""
    sources = named_sources(config.calibration, config.training, config.recover)
    open_fields = [
        f"{field}.source"
        for field, source in sources.items()
        if Path(source.source).name.startswith(FILL_IN)
    ]
    open_fields += [
        f"evaluate.tasks.{i}.name"
        for i, task in enumerate(config.evaluate.tasks)
        if task.name == FILL_IN
    ]
    if open_fields:
        raise InputError(
            f"{FILL_IN} is still to be filled in",
            field=listed(open_fields),
            remedy="give your rows (a .jsonl, .jsonl.gz or .parquet file, or a hub id) and a task, such as gsm8k or "
            "the path of a task YAML",
        )


def hub_data_not_asked_for(config: Config) -> list[str]:
    """Data sets of the hub that it could not be asked for. Raises InputError that names the field of an unknown one."""
    sources = named_sources(config.calibration, config.training, config.recover)
    fields = {
        (source.source, source.revision): f"{field}.source"
        for field, source in sources.items()
        if local_file(source, field) is None
    }
    if not config.evaluate.data_dir:
        fields |= {(name, None): "evaluate.tasks" for name in hub_data(config.evaluate)}
    not_asked: list[str] = []
    for (name, revision), field in fields.items():
        # One try is enough where there is no connection.
        if not_asked or not hub.has_dataset(name, revision, field):
            not_asked.append(name)
    return not_asked


def check_model(folder: Path, schedule: Schedule, prune: Prune) -> ModelDimensions | None:
    """Check files, family and target without loading weights; returns the model's dimensions, None without torch.

    Raises InputError for a missing or damaged file, pickled weights, a missing tokenizer, an unsupported family, or a
    target that the plan cannot reach.
    """
    # Its files.
    family = family_of(text_tower.read_config(folder))
    checkpoint.check_links(folder)
    checkpoint.check_tokenizer(folder)
    if not pretrained.can_build():
        return None
    dimensions = model_dimensions(folder, family)
    # What the config will do to it.
    target.possible_paths(dimensions, schedule, prune)
    return dimensions


def warnings(config: Config) -> list[str]:
    """What `ptl validate`, `plan`, `run` and `submit` say before anything starts: field, value and remedy each."""
    return [
        *_idle_accelerators(config),
        *_unfit_for_the_gate(config),
        *tasks.warnings(config.evaluate),
    ]


def model_warnings(config: Config, model: ModelDimensions) -> list[str]:
    """Iterations that find nothing left to remove, as an earlier one was rounded below their goal.

    `model` has the dense model's sizes, and the schedule's target is a number.
    """
    paths = target.possible_paths(model, config.schedule, config.prune)
    idle = set()
    for path in paths:
        before = [model, *(after for _, after in path)]
        idle |= {
            step.index
            for (step, after), earlier in zip(path, before, strict=False)
            if after == earlier
        }
    if not idle:
        return []
    return [
        f"{'' if len(paths) == 1 else 'perhaps '}nothing is left to remove for "
        f"{numbered('iteration', sorted(idle))}, as an earlier one removes more than its share: "
        f"layers and experts go in whole, and widths by multiples (prune.width_multiple="
        f"{config.prune.width_multiple}): set schedule.cuts=uniform, or take fewer iterations"
    ]


def chat_warnings(config: Config, folder: Path) -> Iterator[str]:
    """Where a model that thinks would be pruned and measured as nobody serves it, or its thoughts would be cut."""
    tokenizer = pretrained.load_tokenizer(folder)
    if config.chat.enabled and chat_templates.has_date(tokenizer, config.chat):
        yield (
            "chat: the model's chat template writes today's date, and items that are asked on different days are not "
            "compared: give a date in chat.template_kwargs, where the template has a variable for it (date_string)"
        )
    if not chat_templates.thinks(tokenizer, config.chat):
        return
    if not config.chat.enabled:
        yield (
            "chat.enabled=false, and the model thinks before it answers: it would be calibrated, trained and scored "
            "without its chat template, as nobody serves it: set chat.enabled=true"
        )
        return
    positions = checkpoint.read_config(folder).get("max_position_embeddings") or THOUGHT
    short = [
        task.name
        for task in config.evaluate.tasks
        if answer_tokens(task) < min(THOUGHT, positions // 2)
    ]
    if short:
        yield (
            f"evaluate.tasks: {listed(short)}: the model thinks before it answers, and a thought that is cut is no "
            f"answer: set max_new_tokens of the task to {THOUGHT} or more"
        )


def _idle_accelerators(config: Config) -> Iterator[str]:
    """Accelerators that a step holds and cannot use."""
    # A stage without `processes` has one for each accelerator.
    used = max(stage.processes or math.inf for stage in config.recover)
    held = config.resources.accelerators_of("recover")
    if held > used:
        yield (
            f"resources.accelerators: recover holds {held} and uses {used}: set "
            "resources.steps.recover.accelerators, or raise recover.processes"
        )
    held = config.resources.accelerators_of("evaluate")
    if held > 1 and config.evaluate.backend == "hf":
        yield (
            f"resources.accelerators: evaluate holds {held} and uses 1: set evaluate.backend=vllm with "
            "evaluate.speed.repeats=0, which uses all, or resources.steps.evaluate.accelerators=1"
        )


def _unfit_for_the_gate(config: Config) -> Iterator[str]:
    """The gate judges each iteration right after its recovery, and the loop may end with any that it accepts."""
    schedule = config.schedule
    if not config.gate.enabled or schedule.iterations == 1:
        return
    if schedule.tokens != "uniform":
        yield (
            f"schedule.tokens={schedule.tokens}, with the gate on: early iterations get less of the recovery than "
            "later ones and are judged right after it; a rejection halves the cuts that follow: set "
            "schedule.tokens=uniform"
        )
    decays = [
        stage.decay for stage in config.recover if stage.method != "grpo" and stage.decay != "each"
    ]
    if decays:
        yield (
            f"recover.decay={decays[0]:g}, with the gate on: early iterations are judged at the full learning rate, "
            "and a loop that the gate stops ends with such a model: set decay: each in every stage of recover"
        )
