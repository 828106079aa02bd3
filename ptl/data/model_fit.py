"""Whether a model can do what the config asks of it: lengths, chats, teachers. Reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptl.config.recover import Distil, Grpo, NextToken, RecoverStage, TrainingData
from ptl.config.run import Calibration, Evaluate
from ptl.errors import InputError
from ptl.model import checks, hub

TEACHER = "recover.teacher"


def check_settings(
    folder: Path,
    calibration: Calibration,
    training: TrainingData,
    evaluate: Evaluate,
    recover: Sequence[RecoverStage],
) -> None:
    """Raise InputError for what the model in `folder` cannot do of all that the config asks of it."""
    # What every step needs.
    tokenizer = checks.load_tokenizer(folder)
    checks.check_generation_config(folder)

    # Lengths; what is not set follows the model.
    lengths = {"calibration.max_length": calibration.max_length}
    if evaluate.max_length is not None:
        lengths["evaluate.max_length"] = evaluate.max_length
    checks.check_positions(folder, lengths)
    _check_recovery(folder, recover, teacher=None)

    # Chats, by the field that names them.
    if tokenizer.chat_template:
        return
    training_sources = {f"training.sources.{i}": source for i, source in enumerate(training.sources)}
    for field, source in {"calibration.data": calibration.data, **training_sources}.items():
        if source.format == "messages":
            raise InputError(
                f"`messages` needs a chat template, and the tokenizer of {folder} has none",
                field=f"{field}.format",
                remedy="use another format, or a model with a template",
            )


def check_stages(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    """Raise InputError for a recovery that the model in `folder`, or a teacher that is known, cannot do.

    `teacher` is the run's original model; None: not known yet, or the model itself.
    """
    checks.load_tokenizer(folder)
    _check_recovery(folder, stages, teacher)


def _check_recovery(folder: Path, stages: Sequence[RecoverStage], teacher: Path | None) -> None:
    """Lengths and teachers of all stages, before the first of them trains."""
    for stage in stages:
        if isinstance(stage, NextToken):
            checks.check_positions(folder, {"recover.max_length": stage.max_length})
        if isinstance(stage, Grpo):
            checks.check_positions(folder, {"recover.max_completion_length": stage.max_completion_length})
        if isinstance(stage, Distil):
            _check_distillation(folder, stage, teacher)


def _check_distillation(folder: Path, stage: Distil, original: Path | None) -> None:
    """The teacher reads the same sequences, and numbers tokens in the same way."""
    teacher = _teacher_files(stage.teacher) if stage.teacher else original
    if teacher is None:
        return
    checks.check_positions(teacher, {"recover.max_length (for recover.teacher)": stage.max_length})
    checks.compare_vocabularies(
        checks.load_tokenizer(folder).get_vocab(),
        checks.load_tokenizer(teacher, TEACHER).get_vocab(),
        stage.teacher or str(teacher),
    )


def _teacher_files(teacher: str) -> Path:
    """The folder of a teacher's config and tokenizer; of a hub id these alone are downloaded."""
    folder = hub.locate(teacher, None, hub.SMALL_FILES, field=TEACHER)
    # A local path that does not exist is only seen here.
    if not (folder / "config.json").is_file():
        raise InputError(
            f"no config.json in {folder}",
            field=TEACHER,
            remedy="give the folder of a checkpoint, or a hub id",
        )
    return folder
