"""What a run needs of its model, data and tasks, checked before any work and without weights in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptl.config.recover import RecoverStage, TrainingData
from ptl.config.run import Calibration, Config, Evaluate, Gate
from ptl.config.schedule import Prune, Schedule
from ptl.data.checks import check_data, check_rewards, check_settings, named_sources
from ptl.data.sources import local_file
from ptl.evaluation.tasks import check_gate, check_tasks, hub_data
from ptl.model import checkpoint, hub, pretrained, text_tower
from ptl.model.dimensions import ModelDimensions, model_dimensions
from ptl.model.families import family_of
from ptl.preflight import target


def preflight(
    path: str,
    revision: str | None,
    schedule: Schedule,
    prune: Prune,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    gate: Gate,
    recover: Sequence[RecoverStage] = (),
) -> tuple[Path, ModelDimensions | None]:
    """Check all that a run needs, without weights in memory; returns the model's local folder and its dimensions.

    Where the recovery is not known yet (the import step), the first recover step checks it.
    """
    check_data_and_tasks(calibration, training, evaluate, gate, recover)
    # Only now a download, which may take an hour.
    folder = hub.locate(path, revision)
    dimensions = check_model(folder, schedule, prune)
    if dimensions is not None:
        check_settings(folder, calibration, training, evaluate, recover)
    return folder, dimensions


def check_data_and_tasks(
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    gate: Gate,
    recover: Sequence[RecoverStage],
) -> None:
    """Check what does not depend on the model: data files, rewards, benchmarks, and that the gate can decide."""
    check_data(calibration, training, recover)
    check_rewards(recover, training)
    check_tasks(evaluate)
    # The gate compares item by item, so its task must call each item right or wrong.
    check_gate(evaluate, gate)


def hub_data_not_asked_for(config: Config) -> list[str]:
    """Data sets of the hub that it could not be asked for. Raises InputError that names the field of an unknown one."""
    fields: dict[tuple[str, str | None], str] = {}
    for field, source in named_sources(config.calibration, config.training, config.recover).items():
        if local_file(source, field) is None:
            fields.setdefault((source.source, source.revision), f"{field}.source")
    for name in [] if config.evaluate.data_dir else hub_data(config.evaluate):
        fields.setdefault((name, None), "evaluate.tasks")
    not_asked: list[str] = []
    for (name, revision), field in fields.items():
        # One try is enough where there is no connection.
        if not_asked or not hub.has_dataset(name, revision, field):
            not_asked.append(name)
    return list(dict.fromkeys(not_asked))


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
    target.after_iterations(dimensions, target.resolved(schedule, prune, folder), prune)
    return dimensions
