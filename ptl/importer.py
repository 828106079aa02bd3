"""A hub id or a local folder becomes a checked checkpoint; what can be wrong is found here, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptl import checkpoint, hub, model_checks, pretrained
from ptl.anatomy import ModelDimensions, layers_for, model_dimensions, width_for
from ptl.config import (
    Calibration,
    Evaluate,
    Gate,
    Prune,
    RecoverStage,
    Schedule,
    TrainingData,
    plan,
    removal,
)
from ptl.data_checks import check_data, check_rewards
from ptl.errors import InputError
from ptl.families import check_repair, family_of
from ptl.tasks import check_gate, check_tasks


def preflight(
    path: str,
    revision: str | None,
    schedule: Schedule,
    prune: Prune,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    gate: Gate | None = None,
    recover: Sequence[RecoverStage] = (),
) -> tuple[Path, ModelDimensions]:
    """Check all that a run needs, without weights in memory; returns the model's local folder and its sizes.

    Where gate and recovery are not known yet (the import step), the first evaluate and recover steps check them.
    """
    check_data(calibration, training, recover)
    check_rewards(recover, training)
    check_tasks(evaluate)
    if gate is not None:
        check_gate(evaluate, gate)
    folder = hub.locate(path, revision)
    body = check_model(folder, schedule, prune)
    model_checks.check_settings(folder, calibration, training, evaluate, recover)
    return folder, body


def check_model(folder: Path, schedule: Schedule, prune: Prune) -> ModelDimensions:
    """Check files, family and target without loading weights; returns the model's sizes.

    Raises InputError for a missing or damaged file, pickled weights, a missing tokenizer, an unsupported family, or a
    target that the plan cannot reach.
    """
    family = family_of(checkpoint.read_config(folder))
    checkpoint.check_links(folder)
    body = model_dimensions(folder, family)
    checkpoint.check_tokenizer(folder)
    check_repair(prune.repair, family)
    remove = removal(body.params, schedule.target)
    if not 0 < remove < body.params:
        raise InputError(
            f"schedule.target: {schedule.target:g} is no size below the model's own {body.params:,} parameters; "
            "give a share between 0 and 1, or the number of parameters to end with"
        )
    rounds = plan(schedule, prune)
    by_neurons = [it for it in rounds if it.unit == "neurons"]
    if by_neurons:
        goal = body.params - int(by_neurons[-1].progress * remove)
        width_for(body, goal, prune.width_multiple, prune.tensor_parallel)
    if len(by_neurons) < len(rounds):
        already = by_neurons[-1].progress if by_neurons else 0
        layers_for(body, body.params - int((1 - already) * remove))
    return body


def import_checkpoint(path: str, revision: str | None, dst: Path) -> None:
    """Copy an ordinary checkpoint to `dst`, weights checked for NaN; raises InputError for what is wrong with it."""
    import shutil

    src = hub.locate(path, revision)
    family = family_of(checkpoint.read_config(src))
    checkpoint.check_links(src)
    model_dimensions(src, family)
    pretrained.config(src)
    model_checks.check_tokenizer(src)
    weights = checkpoint.shards(src)
    checkpoint.check_finite(weights)
    dst.mkdir(parents=True, exist_ok=True)
    index = src / checkpoint.INDEX
    for file in [*weights, src / "config.json", *([index] if index.is_file() else [])]:
        shutil.copyfile(file, dst / file.name)
    checkpoint.copy_companions(src, dst)
